"""docs/table/: the measured table in the README, made with the commands that a user would type.

`python -m benchmarks.table [--samples 16] [--passages 100]`. SmolLM2-135M-Instruct in floating point, in the default
scheme, static, and with 4-bit weights, calibrated on Wikipedia articles. `smoothquant evaluate --table` then measures
them on other articles; the table contains that command.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from calibration.running.precision import is_native
from demo import assets

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "table"
FOLDER = assets.CACHE / "table"
# Name in the table -> options of the calibration.
CHECKPOINTS = {
    "W8A8 dynamic": [],
    "W8A8 static": ["--activations", "static"],
    "W4A16": ["--bits", "4", "--group-size", "32"],
    "W4A8": ["--bits", "4", "--group-size", "32", "--activations", "token"],
}


def smoothquant(*arguments: str) -> None:
    words = [os.path.relpath(word, ROOT) if os.path.isabs(word) else word for word in arguments]
    subprocess.run([sys.executable, "-m", "calibration", *words], check=True, cwd=ROOT)


def main() -> None:
    """Calibrate, evaluate and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16, help="of 512 tokens, for calibration and for measuring")
    parser.add_argument("--passages", type=int, default=100, help="passages whose last word is guessed")
    args = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    model = str(assets.model_dir())
    size = ["--samples", str(args.samples), "--seq-len", "512"]
    for name, options in CHECKPOINTS.items():
        smoothquant(
            "calibrate", model, "-o", str(FOLDER / name), "--dataset", str(assets.calibration_text()), *size, *options
        )
    # If BF16 is emulated, it is ten times slower than float32; quality is then measured in float32.
    native = is_native(torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")
    smoothquant(
        "evaluate", *(str(FOLDER / name) for name in CHECKPOINTS), "--baseline", model,
        "--text", str(assets.evaluation_text()), *size, "--passages", str(args.passages),
        *([] if native else ["--score-dtype", "float32"]), "--enforce-eager", "--table", str(OUTPUT),
    )  # fmt: skip


if __name__ == "__main__":
    main()
