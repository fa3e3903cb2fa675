"""docs/stages.md: where the time of a calibration goes, and what discovery, gate and `--alpha auto` add to it.

`python -m benchmarks.stages [--samples N]`. `smoothquant calibrate` on SmolLM2-135M-Instruct and Wikipedia articles, as
a user would call it, with a fixed alpha and with auto; the seconds are those it prints. The last line printed is JSON.
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
PROOF = ("discover", "gate")
NAMES = {"0.5": "alpha 0.5", "auto": "alpha auto"}


def stages(alpha: str, samples: int) -> dict[str, float]:
    """Stage -> seconds."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "calibration", "calibrate", str(assets.model_dir()), "-o", f"{folder}/out",
             "--dataset", str(assets.calibration_text()), "--samples", str(samples), "--alpha", alpha],
            check=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    return {stage: float(seconds) for stage, seconds in re.findall(r"^([a-z ]+): ([\d.]+) s$", done.stderr, re.M)}


def main() -> None:
    """Measure both, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help="of 512 tokens")
    args = parser.parse_args()
    found = {name: stages(alpha, args.samples) for alpha, name in NAMES.items()}
    totals = {name: sum(seconds.values()) for name, seconds in found.items()}
    fixed, auto = NAMES.values()
    proof = sum(found[fixed][stage] for stage in PROOF)
    share = proof / (totals[fixed] - proof)
    rows = "".join(
        f"| {stage} | " + " | ".join(f"{found[name].get(stage, 0):.1f}" for name in found) + " |\n"
        for stage in found[auto]
    )
    OUTPUT.write_text(
        f"# Where the time goes\n\nWritten by `{COMMAND} --samples {args.samples}`; not by hand. {describe()}\n\n"
        f"SmolLM2-135M-Instruct, {args.samples} x 512 tokens, seconds; one run each. Discovery and gate do not grow "
        f"with the samples: here they add {share:.0%} to the rest. Auto takes {totals[auto] / totals[fixed]:.1f} "
        "times as long as a fixed alpha; its search does not grow with the samples either.\n\n"
        f"| stage | {' | '.join(found)} |\n|---|{'---|' * len(found)}\n{rows}"
        f"| all | {' | '.join(f'{total:.1f}' for total in totals.values())} |\n"
    )
    result = {"samples": args.samples, "seconds": found, "proof_adds": share, "auto": totals[auto] / totals[fixed]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
