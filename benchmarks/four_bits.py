"""docs/four_bits.md: what 4-bit weights cost: our recipes, the papers' and llm-compressor's, on the same tokens.

`python -m benchmarks.four_bits [--models NAME ...] [--groups 128 32] [ROW ...]`. Rows named replace theirs.

The packaged models were stored in 4 to 8 bits once, so that their weights lie near a grid that is not ours. They are
first rotated by a seeded orthogonal matrix, folded into the weights, which keeps the function and destroys the grid.
All recipes, the peers' as well, start from the rotated model. A rotation also spreads outliers, so that recipes without
smoothing look better than on a model as it was trained: hence a model that was trained here and that nobody rounded.

Peers' checkpoints are converted to our format, integer for integer, and served by the same kernel. KL from floating
point is measured through vLLM in float32 on articles that neither calibration nor a choice saw. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import mixture, qwen_coder
from benchmarks.calibration.run import their_python, their_versions
from benchmarks.machine import describe
from calibration.checkpoint.convert import convert
from calibration.discovery.rotations import find_rotations
from calibration.evaluation.evaluate import change
from calibration.evaluation.measure import measure
from calibration.evaluation.windows import token_windows
from calibration.inputs.model import load, untie_head
from calibration.inputs.text import load_samples
from calibration.pipeline import calibrate
from calibration.running.modules import weight_shape
from calibration.smoothing.choose_rotation import rotation_of
from demo import assets
from vllm_smoothquant.format.int4 import GROUP_SIZES

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "four_bits.json"
OUTPUT = ROOT / "docs" / "four_bits.md"
SEED = 17  # of the rotation that destroys the grid; calibrate's own has another


@dataclass(frozen=True)
class Model:
    """folder: creates it. rotated: whether its grid is destroyed first. The others: as in accuracy.py."""

    folder: Callable[[], Path]
    rotated: bool
    seq_len: int
    samples: int
    windows: int


MODELS = {
    "SmolLM2-135M-Instruct": Model(assets.model_dir, True, 512, 32, 16),
    qwen_coder.NAME: Model(qwen_coder.model_dir, True, 512, 32, 16),
    "a Qwen3 trained here": Model(lambda: mixture.model_dir("dense"), False, 128, 64, 32),
}


class Theirs(NamedTuple):
    """A recipe of llm-compressor. samples: on the first ones of the model's; None: on all."""

    recipe: str
    samples: int | None = None


# Row -> options of calibrate, or what llm-compressor does.
ROWS: dict[str, dict[str, Any] | Theirs] = {
    "nearest, no smoothing": {"no_smoothing": True, "rounding": "nearest"},
    "SmoothQuant+ (one alpha for the model)": {"alpha": "grid", "rotation": "none", "rounding": "nearest"},
    "an alpha for each group, as AWQ": {"alpha": "auto", "rotation": "none", "rounding": "nearest"},
    "GPTQ, no smoothing": {"no_smoothing": True},
    "GPTQ, alpha 0.5": {"alpha": 0.5, "rotation": "none"},
    "GPTQ, an alpha for each group": {"alpha": "auto", "rotation": "none"},
    "default (--bits 4)": {},
    "default, 8-bit activations": {"activations": "token"},
    "llm-compressor, AWQ": Theirs("awq"),
    "llm-compressor, AWQ on 8 samples": Theirs("awq", 8),
    "llm-compressor, GPTQ": Theirs("gptq"),
}
HEADER = """# 4-bit weights

Written by `python -m benchmarks.four_bits`; not by hand. {machine} Peers: {peers}.

Wikipedia articles; calibrated on some, measured through vLLM on others, in float32 around the integers. Symmetric 4-bit
weights; a layer whose inputs a group does not divide has the next smaller one, in peers' recipes as well. KL: nats per
token from floating point's distribution; ±: standard errors over the windows. The packaged models were rotated first,
which destroys the grid on which they were stored once, and their outliers with it. llm-compressor's AWQ runs each block
20 times on all samples, an hour of one core for Qwen2.5-Coder; on 8 of the 32 samples it takes a quarter of that.
†: of ours, measured before scales were signed, with scales above zero; to be measured again.
"""
BEFORE = " †"  # after the name of a row of ours without the key "signed" in the figures
SECTION = """
## {name}, groups of {group}

| | KL | perplexity | change |
|---|---|---|---|
"""


def without_grid(name: str, model: Model) -> Path:
    """The folder of the model that all recipes start from."""
    if not model.rotated:
        return model.folder()
    target = assets.CACHE / f"{name}-rotated"
    if not target.is_dir():
        source = load(str(model.folder()))
        source.model.float()
        graph = find_rotations(source.model, torch.arange(100, 164).reshape(2, 32))
        untie_head(source.name, source.model)
        rotation_of(graph, source.model, seed=SEED).apply_()
        with assets.made(target) as folder:
            source.model.save_pretrained(folder)
            source.tokenizer.save_pretrained(folder)
    return target


def group_of(folder: Path, group_size: int) -> dict[int, list[str]]:
    """Group size -> patterns of the layers that get it, for the peers."""
    source = load(str(folder))
    found: dict[int, set[str]] = {}
    for name, module in source.model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            inputs = weight_shape(module)[1]
            size = next(size for size in GROUP_SIZES if size <= group_size and inputs % size == 0)
            found.setdefault(size, set()).add(f"re:.*{name.rpartition('.')[2]}$")
    return {size: sorted(patterns) for size, patterns in found.items()}


def theirs(
    recipe: str, folder: Path, output: Path, model: Model, group_size: int, python: str, samples: int | None = None
) -> None:
    """Run a recipe of llm-compressor and convert its checkpoint to our format. samples: see Theirs."""
    source = load(str(folder))
    tokens = load_samples(
        str(assets.calibration_text()), source.tokenizer, text_column="text", samples=model.samples,
        seq_len=model.seq_len, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        request = {
            "model": str(folder), "dtype": "float32", "input_ids": tokens.input_ids[:samples].tolist(),
            "recipe": recipe,
            "groups": group_of(folder, group_size), "output": str(Path(temporary, "theirs")), "options": {},
        }  # fmt: skip
        path = Path(temporary, "request.json")
        path.write_text(json.dumps(request))
        script = str(ROOT / "benchmarks" / "calibration" / "llm_compressor.py")
        subprocess.run(
            [python, script, str(path)], check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": ""}
        )
        convert(Path(temporary, "theirs"), output, "smoothquant")


def measure_rows(
    name: str, group_size: int, rows: list[str], figures: dict[str, Any], save: Callable[[], None]
) -> None:
    """Add the figures of `rows` to `figures`; call `save` after each."""
    model = MODELS[name]
    folder, python = (
        without_grid(name, model),
        their_python(None) if any(isinstance(ROWS[row], Theirs) for row in rows) else "",
    )
    windows, _ = token_windows(
        [str(folder)], str(assets.evaluation_text()), text_column="text", samples=model.windows, seq_len=model.seq_len,
        seed=0,
    )  # fmt: skip
    engine: dict[str, Any] = {"enforce_eager": True, "dtype": "float32", "decode": None}
    with tempfile.TemporaryDirectory() as temporary:
        logits = str(Path(temporary, "logits.pt"))
        baseline = measure(folder, windows, keep=logits, **engine)
        figures["floating point"] = {"perplexity": baseline["perplexity"]}
        for row in rows:
            recipe, output = ROWS[row], Path(temporary, "checkpoint")
            try:
                if isinstance(recipe, Theirs):
                    theirs(recipe.recipe, folder, output, model, group_size, python, recipe.samples)
                else:
                    calibrate(
                        str(folder), output, dataset=str(assets.calibration_text()), samples=model.samples, bits=4,
                        seq_len=model.seq_len, group_size=group_size, quiet=True, **recipe,
                    )  # fmt: skip
                found = measure(output, windows, compare=logits, **engine)
                keys = ("perplexity", "kl_divergence", "kl_standard_error")
                signed = {} if isinstance(recipe, Theirs) else {"signed": True}
                figures[row] = {key: found[key] for key in keys} | change(found, baseline) | signed
            except subprocess.CalledProcessError as error:
                figures[row] = {"failed": str(error)}
            print(f"{name}, {group_size}: {row}: {figures[row]}", file=sys.stderr, flush=True)
            subprocess.run(["rm", "-rf", str(output)], check=True)
            save()


def label(row: str, figures: dict[str, Any]) -> str:
    return row if isinstance(ROWS[row], Theirs) or "signed" in figures else row + BEFORE


def page(figures: dict[str, Any]) -> str:
    text = HEADER.format(**figures["about"])
    for name, sections in figures["models"].items():
        for group, rows in sections.items():
            text += SECTION.format(name=name, group=group)
            text += f"| floating point | | {rows['floating point']['perplexity']:.3f} | |\n"
            for row in ROWS:
                f = rows.get(row)
                if f and "failed" in f:
                    text += f"| {row} | failed | | |\n"
                elif f:
                    text += (
                        f"| {label(row, f)} | {f['kl_divergence']:.3g} ± {f['kl_standard_error']:.2g} "
                        f"| {f['perplexity']:.3f} "
                        f"| {f['perplexity_change']:+.2%} ± {f['perplexity_change_standard_error']:.2%} |\n"
                    )
    return text


def main() -> None:
    """Measure the rows named on the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--groups", nargs="+", type=int, choices=GROUP_SIZES, default=[128, 32])
    args = parser.parse_args()
    for row in args.rows:
        if row not in ROWS:
            parser.error(f"no row {row!r}; there are {', '.join(ROWS)}")
    rows = args.rows or list(ROWS)
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"models": {}, "about": {"peers": ""}}
    figures["about"]["machine"] = describe()
    if any(isinstance(ROWS[row], Theirs) for row in rows):
        figures["about"]["peers"] = their_versions(their_python(None))

    def save() -> None:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        OUTPUT.write_text(page(figures))

    for name in args.models:
        for group in args.groups:
            section = figures["models"].setdefault(name, {}).setdefault(str(group), {})
            measure_rows(name, group, rows, section, save)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
