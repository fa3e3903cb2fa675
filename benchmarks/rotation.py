"""docs/rotation.md: which orthogonal matrix, and how much chance is in it.

`python -m benchmarks.rotation`. SmolLM2-135M-Instruct is calibrated on some Wikipedia articles, not rotated and rotated
by matrices of both kinds and three seeds, in the default scheme and in O1, with alpha auto; KL from floating point is
measured on other articles by simulate.py, whose integers are those that vLLM serves. The last line printed is JSON.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from calibration.discovery.rotations import find_rotations
from calibration.evaluation.columns import standard_error
from calibration.evaluation.windows import token_windows
from calibration.inputs.model import load, untie_head
from calibration.inputs.text import load_samples
from calibration.options import Options
from calibration.rotation.orthogonal import KINDS
from calibration.smoothing import simulate
from calibration.smoothing.choose_rotation import observe_at_once, rotation_of
from calibration.smoothing.plan import make_plan
from demo import assets

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "rotation.json"
OUTPUT = ROOT / "docs" / "rotation.md"
SEEDS = (0, 1, 2)
NONE = "none"
WINDOWS = 8
SCHEMES: dict[str, dict[str, Any]] = {"default": {}, "O1": {"level": "O1"}}
HEADER = """# Which rotation

Written by `python -m benchmarks.rotation`; not by hand. {machine}

SmolLM2-135M-Instruct, calibrated on 16 x 512 tokens of Wikipedia articles, alpha auto; KL from floating point on
{windows} x 512 tokens of others, simulated, ± its standard error over the windows, which all rows share.

| rotation | seed | KL, default scheme | KL, O1 |
|---|---|---|---|
"""


def measure(kind: str, seed: int, windows: torch.Tensor) -> dict[str, list[float]]:
    """Scheme -> [KL, its standard error] of a model rotated by `kind`; "none" is not rotated."""
    source = load(str(assets.model_dir()))
    samples = load_samples(
        str(assets.calibration_text()), source.tokenizer, text_column="text", samples=16, seq_len=512, seed=0
    )
    exact, rotation = simulate.log_probabilities(source.model, windows, {}), None
    if kind != NONE:
        graph = find_rotations(source.model, samples.input_ids[:2, :16])
        untie_head(source.name, source.model)
        rotation = rotation_of(graph, source.model, kind, seed)
        rotation.apply_()
    figures = {}
    for scheme, changes in SCHEMES.items():
        options = Options(alpha="auto", quiet=True, **changes)
        layers = make_plan(observe_at_once(options, source, samples, rotation), options).layers()
        found = simulate.log_probabilities(source.model, windows, layers)
        means = simulate.divergences(exact, found)
        figures[scheme] = [statistics.fmean(means), standard_error(means)]
        print(kind, seed, scheme, figures[scheme], file=sys.stderr, flush=True)
    return figures


def main() -> None:
    """Measure all rows and write the page."""
    model, text = str(assets.model_dir()), str(assets.evaluation_text())
    rows, _ = token_windows([model], text, text_column="text", samples=WINDOWS, seq_len=512, seed=0)
    cases = [(NONE, 0), *((kind, seed) for kind in KINDS for seed in SEEDS)]
    figures = {f"{kind} {seed}": measure(kind, seed, torch.tensor(rows)) for kind, seed in cases}
    table = HEADER.format(machine=describe(), windows=WINDOWS)
    for row, found in figures.items():
        kind, seed = row.split()
        cells = [f"{kl:.4f} ± {error:.4f}" for kl, error in found.values()]
        table += f"| {kind} | {seed} | {' | '.join(cells)} |\n"
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    OUTPUT.write_text(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
