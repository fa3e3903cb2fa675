"""The paper's experiment on a real model: put outliers like OPT's into SmolLM2-135M and measure every scheme.

`python -m benchmarks.outliers [ROW ...]`. A few channels of every norm are multiplied by 128, and the columns that read
them are divided by 128. These are powers of two, so that the model in floating point stays the same bit for bit, while
its activations get the channels that ruin INT8 (figure 4 of arXiv 2211.10438). Perplexity is measured through vLLM on
articles that calibration did not use. LLM.int8()'s decomposition (columns beyond 6.0 stay in floating point) is
simulated, because vLLM does not have it. Rows named on the command line are measured again and replace theirs. Writes
docs/outliers.md and docs/outliers.png; the last line printed is JSON.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe
from calibration.checkpoint.write import write_checkpoint
from calibration.evaluation.measure import measure
from calibration.evaluation.windows import token_windows
from calibration.observation.observation import Observation
from calibration.options import LEVELS, Options
from calibration.pipeline import check_gate, observe_model
from calibration.running.hooks import hooked
from calibration.running.precision import compute_dtype
from calibration.smoothing import simulate
from calibration.smoothing.plan import make_plan
from calibration.smoothing.simulate import LayerScheme
from demo import assets
from vllm_smoothquant.format.config import Scheme

matplotlib.use("Agg")

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = Path(__file__).parent / "results" / "outliers.json"
FACTOR, CHANNELS = 128.0, (7, 99, 201, 333, 451, 560)
THRESHOLD = 6.0  # LLM.int8()'s
# Scheme -> fields of Options.
SCHEMES = {level: {"level": level} for level in LEVELS}
SCHEMES |= {f"{level}, channel": {"level": level, "weights": "channel"} for level in LEVELS}
# As in the paper's figure, a scheme that works with the right alpha, so that a wrong alpha is visible.
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


def calibration_options(model: Path) -> Options:
    return Options(model=str(model), dataset=str(assets.calibration_text()), samples=SAMPLES, seq_len=512, quiet=True)


def perplexity(model: Path, windows: list[list[int]]) -> float:
    return measure(model, windows, decode=None, **ENGINE)["perplexity"]


def through_vllm(observation: Observation, windows: list[list[int]], **changes: Any) -> float:
    """Perplexity of the checkpoint of the observed model; changes: fields of Options."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "int8"
        given = replace(calibration_options(Path(observation.source.name)), output=str(output), **changes)
        plan = make_plan(observation, given)
        write_checkpoint(observation, plan, check_gate(observation, plan.smoothing), given)
        return perplexity(output, windows)


def decomposed(observation: Observation, windows: list[list[int]]) -> float:
    """Perplexity with LLM.int8()'s decomposition, simulated: columns with any |x| above THRESHOLD in floating point."""

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        x, weight = args[0].float(), module.get_parameter("weight").detach().float()
        large = (x.abs() > THRESHOLD).flatten(0, -2).any(0)
        quantised = simulate.output(_Matrix(weight * ~large), x * ~large, LayerScheme(Scheme()))
        return (quantised + (x * large) @ (weight * large).t()).to(y.dtype)

    model = observation.model
    with hooked(model.get_submodule(name).register_forward_hook(hook) for name in observation.layers):
        return math.exp(simulate.loss(model, torch.tensor(windows)))


class _Matrix(torch.nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight, requires_grad=False)


# One text at a time, because O2 takes its scale over all texts that run together.
ENGINE: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 1}


def cases(
    source: Path, planted: Path, before: Observation, after: Observation, windows: list[list[int]]
) -> dict[str, Callable[[], dict[str, float]]]:
    """Row -> a function that measures perplexity `after` outliers were planted and, for some rows, `before`."""

    def both(**changes: Any) -> dict[str, float]:
        return {
            "before": through_vllm(before, windows, **changes),
            "after": through_vllm(after, windows, **changes),
        }

    def one(**changes: Any) -> dict[str, float]:
        return {"after": through_vllm(after, windows, **changes)}

    return {
        "floating point": lambda: {
            "before": perplexity(source, windows),
            "after": perplexity(planted, windows),
        },
        "naive W8A8 (O1, no smoothing)": partial(one, **SCHEMES["O1"], no_smoothing=True),
        "naive, channel": partial(one, **SCHEMES["O1, channel"], no_smoothing=True),
        "LLM.int8(), simulated": lambda: {"after": decomposed(after, windows)},
        **{f"{name}, alpha 0.5": partial(both, **scheme) for name, scheme in SCHEMES.items()},
        **{name: partial(one, **SCHEMES[SWEPT], alpha=alpha) for name, alpha in SWEEP_ROWS.items() if alpha != 0.5},
        "O1, channel, auto": partial(both, **SCHEMES["O1, channel"], alpha="auto"),
    }


def main() -> None:
    """Measure the rows; write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: all of them")
    args = parser.parse_args()
    source = assets.model_dir()
    windows, _ = token_windows(
        [str(source)], str(assets.evaluation_text()), text_column="text", samples=WINDOWS, seq_len=512, seed=0
    )
    figures = json.loads(FIGURES.read_text()) if args.rows and FIGURES.exists() else {"rows": {}}
    figures["about"] = {"command": COMMAND, "machine": describe()}
    with tempfile.TemporaryDirectory(prefix="outliers-") as folder:
        planted = Path(folder) / "with-outliers"
        plant(source, planted)
        before, after = (observe_model(calibration_options(model)) for model in (source, planted))
        # If the CPU has no BF16 arithmetic, activations are float32 in every row: that is faster.
        ENGINE["dtype"] = str(compute_dtype(before.model)).removeprefix("torch.")
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
        effect = f"{after / exact:.1f} times floating point" if before is None else f"{after / before - 1:+.1%}"
        lines.append(f"| {name} | {'' if before is None else f'{before:.2f}'} | {after:.2f} | {effect} |\n")
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
