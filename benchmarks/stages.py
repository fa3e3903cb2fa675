"""docs/stages.md: where the time of a calibration goes, and what discovery, gate and `--alpha auto` add to it.

`python -m benchmarks.stages [--samples N]` runs `smoothquant calibrate` on SmolLM2-135M-Instruct and Wikipedia articles
with a fixed alpha and with auto. The seconds are those that it prints. The last line printed is JSON.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe
from demo import assets

OUTPUT = Path(__file__).parent.parent / "docs" / "stages.md"
COMMAND = "python -m benchmarks.stages"
# Short names of the numbered stages that calibrate prints, in their order.
STAGES = ("load", "read data", "discover", "observe", "plan", "gate", "quantize and export")
PROOF = ("discover", "gate")
NAMES = {"0.5": "alpha 0.5", "auto": "alpha auto"}


def stage_seconds(printed: str) -> dict[str, float]:
    """Stage -> seconds, from what `smoothquant calibrate` printed on stderr."""
    return {STAGES[int(n) - 1]: float(s) for n, s in re.findall(r"^(\d)\. .+: ([\d.]+) s$", printed, re.M)}


def calibrate(alpha: str, samples: int) -> dict[str, float]:
    """Stage -> seconds of one calibration."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "calibration", "calibrate", str(assets.model_dir()), "-o", f"{folder}/out",
             "--dataset", str(assets.calibration_text()), "--samples", str(samples), "--alpha", alpha],
            check=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    return stage_seconds(done.stderr)


def main() -> None:
    """Measure both alphas and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help="of 512 tokens")
    args = parser.parse_args()
    runs = {name: calibrate(alpha, args.samples) for alpha, name in NAMES.items()}
    totals = {name: sum(seconds.values()) for name, seconds in runs.items()}
    fixed, auto = NAMES.values()
    proof = sum(runs[fixed][stage] for stage in PROOF)
    share = proof / (totals[fixed] - proof)
    rows = "".join(
        f"| {stage} | " + " | ".join(f"{seconds.get(stage, 0):.1f}" for seconds in runs.values()) + " |\n"
        for stage in runs[auto]
    )
    OUTPUT.write_text(
        f"# Where the time goes\n\nWritten by `{COMMAND} --samples {args.samples}`; not by hand. {describe()}\n\n"
        f"SmolLM2-135M-Instruct, {args.samples} x 512 tokens, seconds; one run each. Discovery and gate do not grow "
        f"with the samples: here they add {share:.0%} to the rest. Auto takes {totals[auto] / totals[fixed]:.1f} "
        "times as long as a fixed alpha; its search does not grow with the samples either.\n\n"
        f"| stage | {' | '.join(runs)} |\n|---|{'---|' * len(runs)}\n{rows}"
        f"| all | {' | '.join(f'{total:.1f}' for total in totals.values())} |\n"
    )
    result = {"samples": args.samples, "seconds": runs, "proof_adds": share, "auto": totals[auto] / totals[fixed]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
