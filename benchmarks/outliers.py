"""The paper's experiment on a real model: put OPT-like outliers into SmolLM2-135M, see what each scheme makes of it.

`python -m benchmarks.outliers [--windows N]`. A few channels of every norm are multiplied by 128 and the columns that
read them divided by it: powers of two, so the model in floating point stays the same bit for bit, and its activations
have the channels that ruin INT8 (figure 4 of arXiv 2211.10438). Perplexity through vLLM on articles that calibration
never saw; LLM.int8()'s decomposition (columns beyond 6.0 stay in floating point) is simulated, vLLM has none.
Writes docs/outliers.md and docs/outliers.png; the last line printed is JSON.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import describe
from calibration import evaluate, simulate
from calibration.arithmetic import compute_dtype
from calibration.pipeline import Prepared, as_scheme, prepare, prove, write_checkpoint
from calibration.plan import Choice, make_plan
from calibration.simulate import Served
from demo import assets

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent / "docs"
FACTOR, CHANNELS = 128.0, (7, 99, 201, 333, 451, 560)
THRESHOLD = 6.0  # LLM.int8()'s
LEVELS = {
    "O1": ("tensor", "token"), "O2": ("tensor", "tensor"), "O3": ("tensor", "static"),
    "O1, channel": ("channel", "token"), "O2, channel": ("channel", "tensor"), "O3, channel": ("channel", "static"),
}  # fmt: skip
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0)
COMMAND = "python -m benchmarks.outliers"


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


def watch(model: Path, samples: int) -> Prepared:
    return prepare(
        str(model), dataset=str(assets.calibration_text()), text_column="text", samples=samples, seq_len=512, seed=0,
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
        quantised = simulate.output(_Matrix(weight * ~large), x * ~large, Served(scheme))
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


ENGINE: dict[str, Any] = {"enforce_eager": True}


def main() -> None:
    """Measure, write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=4, help="of 512 tokens, that perplexity is measured on")
    parser.add_argument("--samples", type=int, default=16, help="of 512 tokens, that calibration sees")
    args = parser.parse_args()
    source = assets.model_dir()
    folder = Path(tempfile.mkdtemp(prefix="outliers-"))
    try:
        result = measure(source, folder / "with-outliers", args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    plot(result)
    (DOCS / "outliers.md").write_text(table(result))
    print(json.dumps(result))


def measure(source: Path, planted: Path, args: argparse.Namespace) -> dict[str, Any]:
    plant(source, planted)
    windows, text = evaluate.token_windows(
        [str(source)], str(assets.evaluation_text()), text_column="text", samples=args.windows, seq_len=512, seed=0
    )
    before, after = watch(source, args.samples), watch(planted, args.samples)
    # Where the CPU has no BF16 arithmetic, activations are float32: faster, and the same for every row.
    ENGINE["dtype"] = str(compute_dtype(before.source.model)).removeprefix("torch.")
    rows: dict[str, dict[str, float]] = {}

    def row(name: str, **figures: float) -> None:
        rows[name] = figures
        print(f"{name:24} {figures}", file=sys.stderr, flush=True)

    row(
        "floating point",
        before=evaluate.perplexity(source, windows, **ENGINE), after=evaluate.perplexity(planted, windows, **ENGINE),
    )  # fmt: skip
    row("naive W8A8 (O1, no smoothing)", after=through_vllm(after, LEVELS["O1"], Choice(None), windows))
    row("naive, channel", after=through_vllm(after, LEVELS["O1, channel"], Choice(None), windows))
    row("LLM.int8(), simulated", after=decomposed(after, windows))
    for name, scheme in LEVELS.items():
        row(
            f"{name}, alpha 0.5",
            before=through_vllm(before, scheme, Choice(0.5), windows),
            after=through_vllm(after, scheme, Choice(0.5), windows),
        )
    sweep = {}
    for alpha in SWEEP:
        sweep[alpha] = through_vllm(after, LEVELS["O3"], Choice(alpha), windows)
        print(f"O3, alpha {alpha}: {sweep[alpha]:.2f}", file=sys.stderr, flush=True)
    row(
        "O1, channel, auto",
        before=through_vllm(before, LEVELS["O1, channel"], Choice("auto"), windows),
        after=through_vllm(after, LEVELS["O1, channel"], Choice("auto"), windows),
    )
    return {
        "command": f"{COMMAND} --windows {args.windows} --samples {args.samples}",
        "machine": describe(),
        "text": text | {"source": Path(text["source"]).name},
        "rows": rows,
        "sweep": sweep,
    }


def table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    exact = rows["floating point"]["after"]
    lines = []
    for name, figures in rows.items():
        after, before = figures["after"], figures.get("before")
        beside = f"{after / exact:.1f} times floating point" if before is None else f"{after / before - 1:+.1%}"
        lines.append(f"| {name} | {'' if before is None else f'{before:.2f}'} | {after:.2f} | {beside} |")
    return (
        f"# Outliers\n\nWritten by `{result['command']}`; not by hand. {result['machine']}\n\n"
        f"SmolLM2-135M-Instruct, with {len(CHANNELS)} channels of every norm multiplied by {FACTOR:.0f} and their "
        "readers' columns divided by it: in floating point the same model, in INT8 the paper's problem. Perplexity "
        f"through vLLM on {result['text']['windows']} x 512 tokens of articles that calibration did not see.\n\n"
        "| | without outliers | with outliers | |\n|---|---|---|---|\n" + "\n".join(lines) + "\n\n"
        "With outliers, O3 (everything per tensor, static) for several alphas; too small and too large both fail:\n\n"
        "![perplexity over alpha](outliers.png)\n\n| alpha | perplexity |\n|---|---|\n"
        + "".join(f"| {alpha} | {value:.2f} |\n" for alpha, value in result["sweep"].items())
    )


def plot(result: dict[str, Any]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(list(result["sweep"]), list(result["sweep"].values()), marker="o", label="O3, with outliers")
    axes.axhline(result["rows"]["floating point"]["after"], color="grey", linestyle="--", label="floating point")
    axes.set(xlabel="alpha", ylabel="perplexity", yscale="log")
    axes.legend()
    figure.savefig(DOCS / "outliers.png", dpi=120)


if __name__ == "__main__":
    main()
