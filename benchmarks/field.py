"""docs/field.md: recipes of other papers and of llm-compressor beside ours, on the same tokens.

`python -m benchmarks.field [--models NAME ...] [ROW ...]`. Rows named replace theirs; without names, those that no
result has yet are measured.

What benchmarks/accuracy.py and benchmarks/four_bits.py have measured on the same windows is quoted from their results.
Served rows go through vLLM, llm-compressor's after a conversion to our format, integer for integer. What vLLM does not
serve is simulated: a forward pass of transformers in the same dtype, whose linear layers are replaced by functions of
this file. A control row is both. The last line printed is JSON.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import four_bits as page_of_four_bits
from benchmarks import mixture, qwen_coder
from benchmarks.accuracy import FIGURES as ACCURACY
from benchmarks.accuracy import NORMS_ONLY, PLAIN, llm_int8, write_planned
from benchmarks.calibration.run import their_python, their_versions
from benchmarks.four_bits import FIGURES as FOUR_BITS
from benchmarks.four_bits import theirs
from benchmarks.machine import describe
from benchmarks.simulated import QUANTILES, Rounding, arithmetic, clipped, counting, cross_rounded, ranges, rounded
from calibration.checkpoint.write import write_checkpoint
from calibration.evaluation.evaluate import change
from calibration.evaluation.measure import make_request, measure_all
from calibration.evaluation.windows import token_windows
from calibration.observation.observation import Observation, input_range
from calibration.options import Options
from calibration.pipeline import check_gate, observe_model
from calibration.running.hooks import hooked
from calibration.smoothing import simulate
from calibration.smoothing.factors import Smoothing
from calibration.smoothing.plan import Plan, make_plan
from demo import assets

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "field.json"
OUTPUT = ROOT / "docs" / "field.md"
GROUP_SIZE = 128
LARGE = 6.0  # a value above it keeps its channel in floating point in LLM.int8()
CROSS = 0.15  # CrossQuant's exponent of the row's maximum
KEYS = ("perplexity", "kl_divergence", "kl_standard_error")


@dataclass(frozen=True)
class Model:
    """folder: creates it. dtype: around the integers. The others, as in accuracy.py, whose figures are quoted."""

    folder: Callable[[], Path]
    seq_len: int
    samples: int
    windows: int
    dtype: torch.dtype


MODELS = {
    "SmolLM2-135M-Instruct": Model(assets.model_dir, 512, 16, 16, torch.float32),
    "a Qwen3 trained here": Model(lambda: mixture.model_dir("dense"), 128, 64, 32, torch.float32),
    qwen_coder.NAME: Model(qwen_coder.model_dir, 512, 16, 16, torch.bfloat16),
}


@dataclass(frozen=True)
class Row:
    """How one row is made; exactly one of options, theirs, simulated or four_bits says it.

    options: those of calibrate that differ from their defaults. paper: write_planned's. cross: CrossQuant's factors.
    theirs: a recipe of llm-compressor. simulated: what of this file. accuracy, four_bits: the name of the row there.
    """

    options: dict[str, Any] = field(default_factory=dict)
    paper: bool = False
    cross: bool = False
    theirs: str = ""
    simulated: str = ""
    accuracy: str = ""
    four_bits: str = ""


ROWS = {
    "W8A8, naive": Row({"no_smoothing": True}, accuracy="per token: naive"),
    "LLM.int8()": Row(simulated="llm_int8"),
    "SmoothQuant 0.5, scales per channel and token": Row(PLAIN, paper=True, accuracy=NORMS_ONLY),
    "SmoothQuant 0.5, O1": Row({"level": "O1"} | PLAIN, paper=True),
    "SmoothQuant 0.5, O2": Row({"level": "O2"} | PLAIN, paper=True),
    "SmoothQuant 0.5, O3": Row({"level": "O3"} | PLAIN, paper=True),
    "static range, the maximum": Row(simulated="maximum"),
    "static range, clipped as in Outlier Suppression": Row(simulated="clipped"),
    "CrossQuant, columns of the tokens served": Row(simulated="cross"),
    "CrossQuant, columns of the calibration": Row({"no_smoothing": True}, cross=True),
    "llm-compressor, W8A8": Row(theirs="w8a8"),
    "llm-compressor, W8A8 and SmoothQuant 0.5": Row(theirs="smoothquant"),
    "llm-compressor, W4A16 AWQ": Row(four_bits="llm-compressor, AWQ"),
    "llm-compressor, W4A16 AWQ on 8 samples": Row(four_bits="llm-compressor, AWQ on 8 samples"),
    "llm-compressor, W4A16 GPTQ": Row(four_bits="llm-compressor, GPTQ"),
    "ours": Row(accuracy="per token (default)"),
    "ours, --rotation none --alpha auto": Row(PLAIN | {"alpha": "auto"}, accuracy="per token: smoothing auto"),
    "ours, --alpha learned": Row({"alpha": "learned"}),
    "ours, --activations static": Row({"activations": "static"}, accuracy="static (--activations static)"),
    "ours, --level O3": Row({"level": "O3"}, accuracy="O3"),
    "ours, --bits 4": Row(four_bits="default (--bits 4)"),
    "ours, --bits 4 --activations token": Row(four_bits="default, 8-bit activations"),
    "control: ours, simulated": Row(simulated="ours"),
}
HEADER = """# Accuracy across the field

Written by `python -m benchmarks.field`; not by hand. {machine} llm-compressor: {peers}.

Wikipedia articles; calibrated on some, measured on others. KL: nats per token from floating point's distribution over
its 256 likeliest words and the rest; ±: standard errors over the windows. Weights per channel and activations per token
where a row does not say otherwise; 4-bit weights in groups of {group_size}. *From*: empty, served by vLLM for this
page; *simulated*, by transformers, because vLLM does not serve it; a page, quoted from the results of that page's
script, which scored the same windows. [four_bits.md](four_bits.md) calibrates on more samples, gives the packaged
models another basis first, for all recipes alike, and its changes are from its own floating point; it says what † is.
Rows that were not measured are left out. What the papers do: [method.md](method.md).

- *SmoothQuant*: as the paper has it: norms alone are folded into, no bound for quiet channels.
- *LLM.int8()*: input channels with a value above 6 stay in floating point.
- *Static range*: one stored scale for all inputs of a layer. *Clipped*: the range, among {quantiles} quantiles of the
  tokens' maxima, with the smallest squared error of the layer's output on the samples that searches use. Outlier
  Suppression searches so, and then refines; it also migrates the norms' weights, which this row does not.
- *CrossQuant*: x_ij is rounded under t_i^a c_j^(1-a) / 127, t and c the maxima of rows and columns, a = {cross}. *Of
  the tokens served*: c is the maximum over the window that is scored, which no integer product can have, because c_j is
  inside its sum. *Of the calibration*: c_j^(1-a) is stored as a factor at run time (`smoothing_factor`), its inverse
  multiplies the weights before they are rounded, and the row's scale is that of the divided row.
- *llm-compressor*: its integers, converted to our format and served by our kernels.
- *Ours*: `smoothquant calibrate` without options, or with those named. *Control*: the same recipe as *ours*, simulated.
  Simulation and serving must agree within the errors: of one checkpoint, only roundings near a tie differ. Where *ours*
  is quoted, the recipe ran on another machine, whose arithmetic gave a slightly different checkpoint.
"""
SECTION = """
## {name}

{samples} samples and {windows} windows of {seq_len} tokens, {dtype} around the integers.

| | KL | perplexity | change | from |
|---|---|---|---|---|
"""


def cross_plan(observation: Observation, options: Options) -> Plan:
    """CrossQuant with the columns of the calibration: every quantised input is divided by c ** (1 - CROSS)."""
    graph = observation.graph
    uncovered = tuple(replace(linear, uncovered=linear.in_features) for linear in graph.linears)
    graph = replace(graph, groups=(), linears=uncovered).with_inputs(observation.layers)
    factors = {}
    for group in graph.groups:
        columns = observation.absmax[group.readers[0].name]
        factors[group.source] = torch.where(columns > 0, columns, 1.0) ** (1 - CROSS)
    smoothing = Smoothing(observation.model, graph, factors, observation.layers)
    plan = make_plan(observation, options)
    found = {name: input_range(observation.absmax[name], smoothing.input_factor(name)) for name in plan.schemes}
    return replace(plan, smoothing=smoothing, input_ranges=found)


def simulations(
    options: Options, dtype: torch.dtype, kinds: Sequence[str]
) -> Iterator[tuple[str, nn.Module, Sequence[str], AbstractContextManager[None]]]:
    """(kind, model, layers that round, context in which they do) of "exact" and of each of `kinds`."""
    plain = observe_model(replace(options, rotation="none"))
    model, layers = plain.model, make_plan(plain, replace(options, no_smoothing=True)).layers()
    yield "exact", model, [], nullcontext()
    for kind in kinds:
        if kind == "ours":
            ours = observe_model(options)
            planned = make_plan(ours, options).layers()
            yield kind, ours.model, list(planned), simulate.as_served(ours.model, planned)
        elif kind == "llm_int8":
            hooks = {name: partial(llm_int8, layer) for name, layer in layers.items()}
            decomposed = hooked(model.get_submodule(n).register_forward_hook(h) for n, h in hooks.items())
            yield kind, model, list(layers), decomposed
        elif kind == "cross":
            yield (
                kind,
                model,
                list(layers),
                rounded(model, dict.fromkeys(layers, partial(cross_rounded, exponent=CROSS))),
            )
        else:
            limits = {name: float(plain.absmax[name].max()) for name in layers}
            if kind == "clipped":
                with arithmetic(model, dtype):
                    limits = ranges(model, list(layers), plain.search_ids.split(2))
            roundings: dict[str, Rounding] = {name: partial(clipped, limit=limit) for name, limit in limits.items()}
            yield kind, model, list(layers), rounded(model, roundings)


def simulate_rows(
    options: Options, dtype: torch.dtype, windows: list[list[int]], rows: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """(row, figures) of each of `rows`, row -> kind; computed from logits by the code that vLLM's are given to."""
    from calibration.evaluation.engine import Agreement  # imports vLLM, which page() and the tests do not need

    names = {kind: row for row, kind in rows.items()}
    baseline: Agreement | None = None
    exact: dict[str, Any] = {}
    for kind, model, layers, context in simulations(options, dtype, list(names)):
        agreement, losses, shares = Agreement(None if baseline is None else baseline.distributions), [], list[float]()
        watch = counting(model, layers, LARGE, shares) if kind == "llm_int8" else nullcontext()
        with torch.no_grad(), arithmetic(model, dtype), context, watch:
            for ids in torch.tensor(windows):
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
                agreement.add(logits)
                losses.append(float(nn.functional.cross_entropy(logits, ids[1:])))
        found: dict[str, Any] = {"perplexity": math.exp(sum(losses) / len(losses)), "window_losses": losses}
        if baseline is None:
            baseline, exact = agreement, found
            continue
        found |= agreement.result() or {}
        kept = {"in_float": statistics.fmean(shares)} if shares else {}
        yield names[kind], {key: found[key] for key in KEYS} | change(found, exact) | kept


def measure_rows(name: str, rows: Sequence[str], figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Add the figures of `rows` to `figures`; call `save` after the served ones and after each simulated one."""
    model = MODELS[name]
    folder, text = model.folder(), str(assets.calibration_text())
    size = {"samples": model.samples, "seq_len": model.seq_len}
    options = Options(model=str(folder), dataset=text, quiet=True, **size)
    windows, _ = token_windows(
        [str(folder)], str(assets.evaluation_text()), text_column="text", samples=model.windows, seq_len=model.seq_len,
        seed=0,
    )  # fmt: skip

    def note(row: str, found: dict[str, float]) -> None:
        figures[row] = found
        print(f"{name}: {row}: {found}", file=sys.stderr, flush=True)
        save()

    engine: dict[str, Any] = {
        "enforce_eager": True, "dtype": str(model.dtype).removeprefix("torch."), "decode": None,
    }  # fmt: skip
    served = [row for row in rows if not ROWS[row].simulated]
    with tempfile.TemporaryDirectory() as temporary:
        logits, requests = str(Path(temporary, "logits.pt")), []
        for row in served:
            output = str(Path(temporary, str(len(requests))))
            make(ROWS[row], replace(options, output=output, **ROWS[row].options), model, folder)
            requests.append(make_request(output, windows, compare=logits, **engine))
        if served:
            # In one process, because half of an engine's start is the import of vLLM.
            baseline, *answers = measure_all([make_request(folder, windows, keep=logits, **engine), *requests])
            figures["floating point"] = {"perplexity": baseline["perplexity"]}
            for row, found in zip(served, answers, strict=True):
                note(row, {key: found[key] for key in KEYS} | change(found, baseline))
    simulated = {row: ROWS[row].simulated for row in rows if ROWS[row].simulated}
    if simulated:
        for row, found in simulate_rows(options, model.dtype, windows, simulated):
            note(row, found)


def make(row: Row, options: Options, model: Model, folder: Path) -> None:
    """Write the checkpoint of a served row."""
    if row.theirs:
        theirs(row.theirs, folder, Path(options.output), model, GROUP_SIZE, their_python(None))
        return
    observation = observe_model(replace(options, rotation="none") if options.no_smoothing else options)
    if row.cross:
        plan = cross_plan(observation, options)
        write_checkpoint(observation, plan, check_gate(observation, plan.smoothing), options)
    else:
        write_planned(observation, options, paper=row.paper)


def accuracy(name: str) -> dict[str, Any]:
    """Row -> figures of the model `name` on accuracy.md."""
    return json.loads(ACCURACY.read_text())["models"].get(name, {})


def quoted(name: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Row of this page -> (its figures, the page that has them), of the model `name`."""
    four_bits = json.loads(FOUR_BITS.read_text())["models"].get(name, {}).get(str(GROUP_SIZE), {})
    found = {}
    for title, row in ROWS.items():
        for key, figures, page in ((row.accuracy, accuracy(name), "accuracy"), (row.four_bits, four_bits, "four_bits")):
            if "kl_divergence" in figures.get(key, {}):
                before = page == "four_bits" and page_of_four_bits.label(key, figures[key]) != key
                found[title] = figures[key], f"[{page}.md]({page}.md)" + page_of_four_bits.BEFORE * before
    return found


def page(figures: dict[str, Any]) -> str:
    text = HEADER.format(**figures["about"], group_size=GROUP_SIZE, quantiles=len(QUANTILES), cross=CROSS)
    for name, model in MODELS.items():
        rows, others = figures["models"].get(name, {}), quoted(name)
        text += SECTION.format(name=name, **vars(model) | {"dtype": str(model.dtype).removeprefix("torch.")})
        exact = (rows if "floating point" in rows else accuracy(name)).get("floating point")
        text += f"| floating point | | {exact['perplexity']:.3f} | | |\n" if exact else ""
        for row, how in ROWS.items():
            own = (rows[row], "simulated" * bool(how.simulated)) if row in rows else None
            if found := own or others.get(row):
                f, source = found
                title = row + (f", {f['in_float']:.0%} of the inputs in floating point" if "in_float" in f else "")
                text += (
                    f"| {title} | {f['kl_divergence']:.3g} ± {f['kl_standard_error']:.2g} | {f['perplexity']:.3f} | "
                    f"{f['perplexity_change']:+.2%} ± {f['perplexity_change_standard_error']:.2%} | {source} |\n"
                )
    return text


def main() -> None:
    """Measure the rows named on the command line, or those without figures, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help="default: those that have no figures")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="none: write the page")
    args = parser.parse_args()
    for row in args.rows:
        if row not in ROWS or ROWS[row].four_bits:
            parser.error(f"no row {row!r} to measure; there are {', '.join(r for r in ROWS if not ROWS[r].four_bits)}")
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"models": {}, "about": {}}
    if args.models:
        figures["about"] = {"machine": describe(), "peers": their_versions(their_python(None))}

    def save() -> None:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        OUTPUT.write_text(page(figures))

    for name in args.models:
        rows = figures["models"].setdefault(name, {})
        missing = [row for row in ROWS if row not in rows and row not in quoted(name) and not ROWS[row].four_bits]
        measure_rows(name, args.rows or missing, rows, save)
    save()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
