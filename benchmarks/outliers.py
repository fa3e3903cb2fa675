"""The paper's experiment on a real model: put OPT-like outliers into SmolLM2-135M, see what each scheme makes of it.

`python -m benchmarks.outliers [ROW ...]`. A few channels of every norm are multiplied by 128 and the columns that
read them divided by it: powers of two, so the model in floating point stays the same bit for bit, and its activations
have the channels that ruin INT8 (figure 4 of arXiv 2211.10438). Perplexity through vLLM on articles that calibration
never saw; LLM.int8()'s decomposition (columns beyond 6.0 stay in floating point) is simulated, vLLM has none.
Named rows are measured anew and replace theirs. Writes docs/outliers.md and docs/outliers.png; the last line is JSON.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe
from calibration.evaluation import evaluate
from calibration.pipeline import Prepared, as_scheme, prepare, prove, write_checkpoint
from calibration.running.precision import compute_dtype
from calibration.smoothing import simulate
from calibration.smoothing.plan import Choice, make_plan
from calibration.smoothing.simulate import LayerScheme
from demo import assets

matplotlib.use("Agg")

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = Path(__file__).parent / "results" / "outliers.json"
FACTOR, CHANNELS = 128.0, (7, 99, 201, 333, 451, 560)
THRESHOLD = 6.0  # LLM.int8()'s
LEVELS = {
    "O1": ("tensor", "token"), "O2": ("tensor", "tensor"), "O3": ("tensor", "static"),
    "O1, channel": ("channel", "token"), "O2, channel": ("channel", "tensor"), "O3, channel": ("channel", "static"),
}  # fmt: skip
# The paper's figure: a scheme that works at the right alpha, so that a wrong one shows.
SWEPT, SWEEP = "O1, channel", (0.0, 0.25, 0.5, 0.75, 1.0)
SWEEP_ROWS = {f"{SWEPT}, alpha {alpha}": alpha for alpha in SWEEP}
COMMAND = "python -m benchmarks.outliers"
WINDOWS, SAMPLES = 4, 16  # of 512 tokens, scored and calibrated on
TEXT = f"""# Outliers

Written by `{{command}}`; not by hand. {{machine}}

SmolLM2-135M-Instruct, with {len(CHANNELS)} channels of every norm multiplied by {FACTOR:.0f} and their readers' columns
divided by it: in floating point the same model, in INT8 the paper's problem. Perplexity through vLLM on {WINDOWS} x 512
tokens of articles that calibration did not see. Beside a scheme: what the outliers change about it.

| | without outliers | with outliers | |
|---|---|---|---|
{{lines}}
With outliers, {SWEPT} for several alphas:

![perplexity over alpha](outliers.png)

| alpha | perplexity |
|---|---|
{{sweep}}"""


def plant(source: Path, folder: Path) -> None:
    """The model of `source` with outliers in the output of every norm that linear layers read; the same function."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    channels = torch.tensor(CHANNELS)
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            ):
                norm.weight[channels] *= FACTOR
                for reader in readers:
                    reader.weight[:, channels] /= FACTOR
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def watch(model: Path) -> Prepared:
    return prepare(
        str(model), dataset=str(assets.calibration_text()), text_column="text", samples=SAMPLES, seq_len=512, seed=0,
        ignore=frozenset(), device_map="auto", quiet=True,
    )  # fmt: skip


def through_vllm(ready: Prepared, scheme: tuple[str, str], choice: Choice, windows: list[list[int]]) -> float:
    """Perplexity of the checkpoint that `choice` makes of `ready`."""
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(ready.watched, as_scheme(*scheme), choice, quiet=True)
        write_checkpoint(ready, plan, prove(ready, plan.smoothing), Path(folder) / "int8")
        return evaluate.perplexity(Path(folder) / "int8", windows, **ENGINE)


def decomposed(ready: Prepared, windows: list[list[int]]) -> float:
    """Perplexity with LLM.int8()'s decomposition, simulated: columns with any |x| above THRESHOLD in floating point."""
    scheme = as_scheme("channel", "token")

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        x, weight = args[0].float(), module.get_parameter("weight").detach().float()
        large = (x.abs() > THRESHOLD).flatten(0, -2).any(0)
        quantised = simulate.output(_Matrix(weight * ~large), x * ~large, LayerScheme(scheme))
        return (quantised + (x * large) @ (weight * large).t()).to(y.dtype)

    model = ready.source.model
    handles = [model.get_submodule(name).register_forward_hook(hook) for name in ready.watched.names]
    try:
        return math.exp(simulate.loss(model, torch.tensor(windows)))
    finally:
        for handle in handles:
            handle.remove()


class _Matrix(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


# One text at a time: O2 takes its scale over all that run together.
ENGINE: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 1}


def cases(
    source: Path, planted: Path, before: Prepared, after: Prepared, windows: list[list[int]]
) -> dict[str, Callable[[], dict[str, float]]]:
    """Row -> what measures it: perplexity `after` outliers were put in, and `before`, where that is of interest."""

    def both(scheme: tuple[str, str], choice: Choice) -> dict[str, float]:
        return {
            "before": through_vllm(before, scheme, choice, windows),
            "after": through_vllm(after, scheme, choice, windows),
        }

    def one(scheme: tuple[str, str], choice: Choice) -> dict[str, float]:
        return {"after": through_vllm(after, scheme, choice, windows)}

    return {
        "floating point": lambda: {
            "before": evaluate.perplexity(source, windows, **ENGINE),
            "after": evaluate.perplexity(planted, windows, **ENGINE),
        },
        "naive W8A8 (O1, no smoothing)": lambda: one(LEVELS["O1"], Choice(None)),
        "naive, channel": lambda: one(LEVELS["O1, channel"], Choice(None)),
        "LLM.int8(), simulated": lambda: {"after": decomposed(after, windows)},
        **{f"{name}, alpha 0.5": partial(both, scheme, Choice(0.5)) for name, scheme in LEVELS.items()},
        **{name: partial(one, LEVELS[SWEPT], Choice(alpha)) for name, alpha in SWEEP_ROWS.items() if alpha != 0.5},
        "O1, channel, auto": lambda: both(LEVELS["O1, channel"], Choice("auto")),
    }


def main() -> None:
    """Measure, write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="all of them, where none is named")
    args = parser.parse_args()
    source = assets.model_dir()
    windows, _ = evaluate.token_windows(
        [str(source)], str(assets.evaluation_text()), text_column="text", samples=WINDOWS, seq_len=512, seed=0
    )
    figures = json.loads(FIGURES.read_text()) if args.rows and FIGURES.exists() else {"rows": {}}
    figures["about"] = {"command": COMMAND, "machine": describe()}
    with tempfile.TemporaryDirectory(prefix="outliers-") as folder:
        planted = Path(folder) / "with-outliers"
        plant(source, planted)
        before, after = watch(source), watch(planted)
        # Where the CPU has no BF16 arithmetic, activations are float32: faster, and the same for every row.
        ENGINE["dtype"] = str(compute_dtype(before.source.model)).removeprefix("torch.")
        possible = cases(source, planted, before, after, windows)
        for name in args.rows or possible:
            figures["rows"][name] = possible[name]()
            print(f"{name:30} {figures['rows'][name]}", file=sys.stderr, flush=True)
            FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
    plot(figures["rows"])
    (DOCS / "outliers.md").write_text(table(figures))
    print(json.dumps(figures))


def table(figures: dict[str, Any]) -> str:
    rows, exact = figures["rows"], figures["rows"]["floating point"]["after"]
    lines = []
    for name, row in rows.items():
        if name in SWEEP_ROWS and "before" not in row:
            continue
        after, before = row["after"], row.get("before")
        beside = f"{after / exact:.1f} times floating point" if before is None else f"{after / before - 1:+.1%}"
        lines.append(f"| {name} | {'' if before is None else f'{before:.2f}'} | {after:.2f} | {beside} |\n")
    sweep = "".join(f"| {alpha} | {rows[row]['after']:.2f} |\n" for row, alpha in SWEEP_ROWS.items() if row in rows)
    return TEXT.format(**figures["about"], lines="".join(lines), sweep=sweep)


def plot(rows: dict[str, Any]) -> None:
    points = {alpha: rows[row]["after"] for row, alpha in SWEEP_ROWS.items() if row in rows}
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(list(points), list(points.values()), marker="o", label=f"{SWEPT}, with outliers")
    axes.axhline(rows["floating point"]["after"], color="grey", linestyle="--", label="floating point")
    axes.set(xlabel="alpha", ylabel="perplexity", yscale="log")
    axes.legend()
    figure.savefig(DOCS / "outliers.png", dpi=120)


if __name__ == "__main__":
    main()
