"""docs/serving.md, written from the figures of run.py."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from vllm_smoothquant.kernels.exact import INEXACT

OUTPUT = Path(__file__).parents[2] / "docs" / "serving.md"
FLOAT, STOCK = "floating point", "compressed-tensors"
FEW = 5
OPERATORS = 4  # named in a profile
HEADER = f"""# Serving on a CPU

Written by `python -m benchmarks.serving`; not by hand. Steps of vLLM's worker, its sampling included, scheduler and
front end not; medians. A ratio is of two runs in one round, seconds apart, and the table has the median of the rounds'
ratios with their quartiles; `of {FLOAT}` is the quotient of two such medians where {FLOAT} is not the reference.
{STOCK}: the default checkpoint's integers in that format through stock vLLM, without the plugin.

`floor` is what the measured bandwidth and the measured rate of large products allow for the weights alone, `over it`
how much longer the step takes: attention, norms, quantisation and sampling are in the step and not in the floor.
Start: from nothing to an engine that is ready, imports and compilation included. Peak: of the worker's process,
imports, weights and room for keys and values included, before quality is measured; anonymous: pages of no file, then.
Where the time goes is seen by torch's profiler in one more run, in the operators themselves; CompiledFxGraph is what
torch.compile made of everything between them.
"""
Section = Mapping[str, Any]
# (whether a section needs the note, the note as a format string for the section's values)
NOTES: tuple[tuple[Callable[[Section], bool], str], ...] = (
    (
        lambda s: "--isa avx2" in s["command"],
        "oneDNN, torch, Inductor and our product were limited to AVX2, as on a CPU that has no later instructions.",
    ),
    (
        lambda s: not _host(s)["onednn_is_exact"],
        f"{INEXACT}. **{STOCK} computes those wrong sums**: its speed is theirs, and the INT8 floor that of the same "
        "instructions. Ours avoids them.",
    ),
    (
        lambda s: not s["native"],
        "This CPU only emulates {dtype}, many times slower than float32: what INT8 is worth beside it says little. "
        "`--dtype float32` is the fair comparison.",
    ),
    (
        lambda s: _host(s)["malloc"] == "glibc",
        "No tcmalloc was found: glibc's malloc serves all arms, where vLLM recommends to preload tcmalloc.",
    ),
    (
        lambda s: s["kept"],
        "Compiled code came from an earlier run where there was one (`--keep`): start is not from nothing.",
    ),
    (
        lambda s: s["rounds"] < FEW,
        "{rounds} rounds: too few for the quartiles to mean much.",
    ),
    (
        lambda s: not s["speaks"],
        "The weights are random, and so is any text to them: no perplexity. KL is nats per token from "
        f"{FLOAT}'s distribution. Random layers amplify what rounding changes, so that only arms with the same "
        f"integers must be alike, {STOCK} and default.",
    ),
)


def ratios(seconds: Mapping[str, Mapping[str, Sequence[float]]], arm: str, reference: str) -> dict[str, list[float]]:
    """Case -> for each round, the time of `arm` divided by the time of `reference`."""
    return {
        case: [a / b for a, b in zip(seconds[arm][case], seconds[reference][case], strict=True)]
        for case in seconds[arm]
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, middle, upper = quantiles(values, n=4, method="inclusive")
    return middle, lower, upper


def page(figures: Mapping[str, Mapping[str, Section]]) -> str:
    """The page of all sections; figures: model -> mode -> section."""
    return HEADER + "".join(_section(mode, s) for modes in figures.values() for mode, s in modes.items())


def _host(section: Section) -> Mapping[str, Any]:
    """The row of the reference, with the description of its process."""
    return section["rows"][section["reference"]]


def _section(mode: str, s: Section) -> str:
    host, limits = _host(s), s["limits"]
    variables = ", ".join(f"{name}={value}" for name, value in host["environment"].items())
    text = (
        f"\n## {s['what']}, {mode}\n\n`{s['command']}`. {s['machine']} {s['dtype']} around the integers, for all arms; "
        f"{s['rounds']} rounds, {s['steps']} steps that decode in each run; calibrated on {s['calibrated'][0]} x "
        f"{s['calibrated'][1]} tokens, quality on {s['windows'][0]} x {s['windows'][1]} others.\n\n"
        f"Worker: {host['threads']} threads on cores {', '.join(map(str, host['cores']))}; malloc: {host['malloc']}; "
        f"{variables or 'nothing of threads or LD_PRELOAD in its environment'}. Measured limits: "
        f"{limits['bytes_per_s'] / 1e9:.1f} GB/s read, {limits['dtype_ops_per_s'] / 1e9:.0f} GOP/s in {s['dtype']}, "
        f"{limits['int8_ops_per_s'] / 1e9:.0f} GOP/s in INT8.\n"
    )
    text += "".join(f"\n- {note.format(**s)}" for applies, note in NOTES if applies(s)) + "\n"
    for case in host["seconds"]:
        text += f"\n### {case}\n\n{_table(*_speed(s, case))}"
    text += f"\n### Where the time goes\n\n{_table(*_profile(s))}"
    return text + f"\n### Start, memory, quality\n\n{_table(*_costs(s))}"


def _served(s: Section) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Arms that ran."""
    return ((arm, row) for arm, row in s["rows"].items() if "failed" not in row)


def _speed(s: Section, case: str) -> tuple[list[str], list[list[str]]]:
    reference = s["reference"]
    exact = 1.0 if reference == FLOAT else median(s["rows"][FLOAT]["ratios"][case])
    header = ["", "ms a step", f"of {reference}", "quartiles"]
    header += [] if reference == FLOAT else [f"of {FLOAT}"]
    rows = []
    for arm, row in _served(s):
        seconds, floor = median(row["seconds"][case]), s["floors"][arm][case]
        middle, lower, upper = spread(row["ratios"][case]) if "ratios" in row else (1.0, 1.0, 1.0)
        cells = [arm, _ms(seconds), f"{middle:.3f}", f"{lower:.3f} to {upper:.3f}" if "ratios" in row else ""]
        cells += [] if reference == FLOAT else [f"{middle / exact:.2f}"]
        rows.append([*cells, _ms(floor), f"{seconds / floor - 1:+.0%}"])
    return [*header, "floor, ms", "over it"], rows


def _profile(s: Section) -> tuple[list[str], list[list[str]]]:
    rows = []
    for case in _host(s)["seconds"]:
        for arm, row in _served(s):
            shares = sorted(row["profile"][case].items(), key=lambda item: -item[1])[:OPERATORS]
            named = ", ".join(f"{operator} {share:.0%}" for operator, share in shares)
            rows.append([case, arm, f"{named}, all else {1 - sum(share for _, share in shares):.0%}"])
    return ["", "", "of the steps' time, in the operators that take most"], rows


def _costs(s: Section) -> tuple[list[str], list[list[str]]]:
    header = ["", "start, s", "peak, MiB", "anonymous, MiB", "weights, MiB", "kernel: layers"]
    header += ["perplexity", "change", "KL"] if s["speaks"] else ["KL"]
    rows = []
    for arm, row in _served(s):
        kernels = "; ".join(f"{kernel}: {layers}" for kernel, layers in row["kernels"].items())
        sizes = [row["memory"]["VmHWM"], row["memory"]["RssAnon"], row["weights"]]
        cells = [arm, f"{row['start']:.0f}", *(f"{size / 2**20:.0f}" for size in sizes), kernels]
        quality, exact = row["quality"], s["rows"][FLOAT]["quality"]["perplexity"]
        kl = quality.get("kl_divergence")
        if s["speaks"]:
            cells += [f"{quality['perplexity']:.3f}", "" if kl is None else f"{quality['perplexity'] / exact - 1:+.2%}"]
        cells.append("" if kl is None else f"{kl:.4f}")
        rows.append(cells)
    failed = [[arm, row["failed"]] for arm, row in s["rows"].items() if "failed" in row]
    return header, rows + [[arm, f"failed: {why}", *[""] * (len(header) - 2)] for arm, why in failed]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}" if seconds >= 0.1 else f"{seconds * 1e3:.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
