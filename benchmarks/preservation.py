"""docs/preservation.md: whether smoothing alone keeps the function of a model, by us and by llm-compressor.

`python -m benchmarks.preservation`. Every tiny model of tests/helpers, with outliers in its norms, in float32, is
smoothed with alpha 0.5 and no rounding: by `calibration.pipeline.smooth`, and by llm-compressor's SmoothQuantModifier
with the mappings that it infers (benchmarks/calibration/smoothing_only.py), on the same samples. Each tool compares the
logits of other inputs with those of the original, both by its own transformers.

    exact             the logits change by at most BOUND, relative to the largest one
    nothing smoothed  the same, because no matrix changed
    WRONG             it ended without an error, and the function is another
    refused           it ended with an error
    not loaded        the original does not load in the tool's version of transformers, or does not run

--llm-compressor: an interpreter that has llm-compressor and torchvision. The last line printed is JSON; the exit code
is 1 if ours is WRONG anywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from benchmarks.calibration import smoothing_only
from benchmarks.calibration.run import their_python, their_versions
from benchmarks.calibration.smoothing_only import change, loaded, logits, matrices, reason, share_of_changed
from benchmarks.machine import describe
from calibration.inputs.text import load_samples
from calibration.pipeline import smooth
from tests.helpers import tiny_architectures, tiny_checkpoints, tiny_vision, vision_engine

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "preservation.md"
FIGURES = ROOT / "benchmarks" / "results" / "preservation.json"
COMMAND = "python -m benchmarks.preservation"
# Between the largest change by rounding (`rounding` below) and the smallest by a forgotten reader: a factor of ten or
# more from each. The page has both.
BOUND = 1e-4
TIMEOUT_S = 180
LONGEST = 150  # of a reason in the table; the figures have more of it
SIZE: dict[str, Any] = {"samples": 8, "seq_len": 32}
ALPHA = 0.5
OUTCOMES = ("exact", "nothing smoothed", "WRONG", "refused", "not loaded")
TOOLS = {"ours": "vllm-smoothquant", "theirs": "llm-compressor"}
LISTED = "llm-compressor, classes of its registry"

ATTENTION = [["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"], "re:.*input_layernorm$"]
ROUTED = ("post_attention_layernorm is read by the router, too", [ATTENTION])
TWO_NORMS = (
    "post_attention_layernorm is before the residual sum; the MLP reads pre_feedforward_layernorm",
    [ATTENTION, [["re:.*gate_proj$", "re:.*up_proj$"], "re:.*pre_feedforward_layernorm$"]],
)
# Model -> what the inferred mappings overlook, and mappings without that; None: the norms cannot be smoothed.
OVERLOOKED: dict[str, tuple[str, list[Any] | None]] = {
    "bloom-postln": ("the residual sum reads the output of the norms, too", None),
    "gemma2": TWO_NORMS,
    "gemma2-tied": TWO_NORMS,
    "gemma3": TWO_NORMS,
    "phi": ("fc1 reads input_layernorm, too", [[[*ATTENTION[0], "re:.*fc1$"], ATTENTION[1]]]),
    "glm4-moe": ROUTED,
    "olmoe": ROUTED,
    "granite-moe": ROUTED,
    "phimoe": ROUTED,
    "gpt-oss": ROUTED,
}
CORRECTED = ", corrected"

PAGE = """# Does smoothing keep the function?

Written by `{command}`; not by hand. {machine} llm-compressor's environment: {theirs}.

Smoothing alone, without rounding, must not change what a model computes. Tiny random models with outliers in their
norms (tests/helpers), in float32, alpha 0.5, the same {samples} samples for both tools. llm-compressor runs
`oneshot` with `SmoothQuantModifier(smoothing_strength=0.5)` and the mappings that it infers: those of its registry, or
its default mappings for a class that is not in it (last line: only classes that are). Experts are opened by its
`load_quantizable_moe`. Each tool's logits are compared with those of the original in the same version of transformers:
ours as written and read again, theirs in memory, so that how its files are read does not count.

*Exact*: no logit changes by more than {bound:.0e} of the largest one. Rounding alone stays far below that: if each
parameter moves by one unit in its last place, they change by at most {rounding:.0e}. The smallest change of a row that
is WRONG (no error, another function) is {wrong}. *Nothing smoothed*: the function stays because no matrix changed.
*Refused*: an error before a result. In brackets: the change, and the share of the weights of linear layers that were
scaled, towers for images included. A *hybrid* has convolutions or state spaces, and may have experts.

| | {heads} |
|---|{rules}
{counts}
| model | kind | {tools} |
|---|---|---|---|
{rows}"""

WHY = """
## Why llm-compressor's are wrong

*Corrected*: the change with mappings that we wrote for the model, which leave out or complete what is overlooked.

| model | what the inferred mappings overlook | corrected |
|---|---|---|
"""


def kind(model: Any) -> str:
    if getattr(model.config, "vision_config", None) is not None:
        return "vision-language"
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv1d)]
    if convolutions:
        return "hybrid"
    return "experts" if any(weight.dim() == 3 for weight in matrices(model).values()) else "dense"


def rounding(model: Any, batch: dict[str, torch.Tensor], before: torch.Tensor) -> float:
    """Change of the logits if each parameter moves by one unit in the last place, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            sign = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.copy_(torch.nextafter(parameter, sign * float("inf")))
    return change(before, logits(model, batch))


def prepare(name: str, folder: Path, text: Path, pictures: Path) -> tuple[dict[str, Any], Path]:
    """The model `name` and its inputs in `folder`: the entry of a request, and the data set that we read."""
    vision = name in tiny_vision.FAMILIES
    source, dataset = folder / name, pictures if vision else text
    (tiny_vision if vision else tiny_checkpoints).save(name, source)
    samples = load_samples(
        str(dataset), AutoTokenizer.from_pretrained(source), text_column="text", seed=0, model=str(source),
        config=AutoConfig.from_pretrained(source), quiet=True, **SIZE,
    )  # fmt: skip
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in samples.input_ids]
    other = dict(vision_engine.inputs(source, 0)) if vision else {"input_ids": tiny_architectures.tokens(5)}
    inputs = folder / f"{name}.pt"
    torch.save({"calibration": [dict(row) for row in samples.images] or rows, "other": other}, inputs)
    architecture = "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    return {"folder": str(source), "class": architecture, "inputs": str(inputs)}, dataset


def ours(model: dict[str, Any], dataset: Path, output: Path) -> dict[str, Any]:
    """Fields as of smoothing_only.measure, and `kind` and `rounding` of the original."""
    architecture, other = getattr(transformers, model["class"]), torch.load(model["inputs"])["other"]
    try:
        source = loaded(architecture, model["folder"])
        before = logits(source, other)
    except Exception as error:  # of any kind
        return {"unloadable": reason(error)}
    row: dict[str, Any] = {"kind": kind(source)}
    try:
        smooth(model["folder"], output, alpha=ALPHA, dataset=str(dataset), quiet=True, **SIZE)
        smoothed = loaded(architecture, output)
        row["smoothed"] = share_of_changed(matrices(source), matrices(smoothed))
        row["change"] = change(before, logits(smoothed, other))
    except Exception as error:  # of any kind
        row["error"] = reason(error)
    return row | {"rounding": rounding(source, other, before)}


def theirs(models: dict[str, dict[str, Any]], folder: Path, python: str) -> dict[str, dict[str, Any]]:
    corrected = {
        f"{name}{CORRECTED}": models[name] | {"mappings": mappings}
        for name, (_, mappings) in OVERLOOKED.items()
        if mappings is not None and name in models
    }
    request, answer = folder / "request.json", folder / "answer.json"
    request.write_text(
        json.dumps({"models": models | corrected, "alpha": ALPHA, "timeout_s": TIMEOUT_S, "answer": str(answer)})
    )
    # Its errors print sets: with a fixed seed, in one order.
    environment = os.environ | {"PYTHONPATH": "", "PYTHONHASHSEED": "0"}
    subprocess.run([python, smoothing_only.__file__, str(request)], check=True, env=environment)
    return json.loads(answer.read_text())


def outcome(row: dict[str, Any]) -> str:
    """One of OUTCOMES."""
    if "unloadable" in row:
        return "not loaded"
    if "error" in row:
        return "refused"
    if not row["change"] <= BOUND:
        return "WRONG"
    return "exact" if row["smoothed"] else "nothing smoothed"


def cell(row: dict[str, Any]) -> str:
    found = outcome(row)
    if found in ("refused", "not loaded"):
        why = row.get("unloadable", row.get("error", ""))
        return f"{found}: {why if len(why) <= LONGEST else f'{why[:LONGEST]}…'}"
    text = f"**{found}**" if found == "WRONG" else found
    text += f" ({row['change']:.1e}, {row['smoothed']:.0%})"
    if row.get("opened", 0.0) > BOUND:
        text += f"; {row['opened']:.1e} before smoothing, by opening the experts"
    return text


def counts(rows: dict[str, dict[str, Any]]) -> dict[str, Counter[str]]:
    """Line of the summary -> outcome -> number of models."""
    lines = {title: [row[tool] for row in rows.values()] for tool, title in TOOLS.items()}
    lines[LISTED] = [row["theirs"] for row in rows.values() if row["theirs"].get("listed")]
    return {title: Counter(map(outcome, answers)) for title, answers in lines.items()}


def page(figures: dict[str, Any]) -> str:
    rows, corrected = figures["rows"], figures["corrected"]
    wrong = [row[tool]["change"] for row in rows.values() for tool in TOOLS if outcome(row[tool]) == "WRONG"]
    text = PAGE.format(
        command=COMMAND, machine=figures["machine"], theirs=figures["theirs"], samples=SIZE["samples"], bound=BOUND,
        rounding=max(row["ours"].get("rounding", 0.0) for row in rows.values()),
        wrong=f"{min(wrong):.0e}" if wrong else "none", heads=" | ".join(OUTCOMES), rules="---|" * len(OUTCOMES),
        counts="".join(
            f"| {title} | {' | '.join(str(line[name]) for name in OUTCOMES)} |\n"
            for title, line in counts(rows).items()
        ),
        tools=" | ".join(TOOLS.values()),
        rows="".join(
            f"| {name} | {row['ours'].get('kind', '')} | {' | '.join(cell(row[tool]) for tool in TOOLS)} |\n"
            for name, row in rows.items()
        ),
    )  # fmt: skip
    names = [name for name, row in rows.items() if outcome(row["theirs"]) == "WRONG"]
    lines = ""
    for name in names:
        why, mappings = OVERLOOKED.get(name, ("not examined", None))
        lines += f"| {name} | {why} | {cell(corrected[name]) if mappings is not None else ''} |\n"
    return text + (WHY + lines if names else "")


def main() -> int:
    """Measure every model with both tools and write page and figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="an interpreter that has it")
    args = parser.parse_args()
    python = their_python(args.llm_compressor)
    code = "import torchvision; print(torchvision.__version__)"
    vision = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    if vision.returncode:
        # load_quantizable_moe imports it, and llm-compressor does not ask for it.
        parser.error(f"{python} needs torchvision (packaging/cpu/torchvision_operators.py beside a CPU torch)")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, pictures = tiny_checkpoints.save_text(folder / "text.jsonl"), tiny_vision.save_pictures(folder / "images")
        models, mine = {}, {}
        for name in (*tiny_architectures.ZOO, *tiny_vision.FAMILIES):
            models[name], dataset = prepare(name, folder, text, pictures)
            mine[name] = ours(models[name], dataset, folder / "ours" / name)
            print(name, mine[name], file=sys.stderr, flush=True)
        answers = theirs(models, folder, python)
    figures: dict[str, Any] = {
        "machine": describe(), "theirs": f"{their_versions(python)}, torchvision {vision.stdout.strip()}",
        "rows": {name: {"ours": mine[name], "theirs": answers[name]} for name in models},
        "corrected": {name: answers[key] for name in OVERLOOKED if (key := f"{name}{CORRECTED}") in answers},
    }  # fmt: skip
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    OUTPUT.write_text(page(figures))
    found = counts(figures["rows"])
    print(json.dumps(found))
    return bool(found[TOOLS["ours"]]["WRONG"])


if __name__ == "__main__":
    sys.exit(main())
