"""docs/which_scheme.md: the table of calibration/advice as a page.

`python -m benchmarks.which_scheme`. It measures nothing: it compares every figure of ours in the table with the JSON
file in results/ that another script wrote, or with the page if that has no such file, and stops at one that differs.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.serving.page import FLOAT
from calibration.advice.claims import CLAIMS, Ours, sources
from calibration.advice.table import AGAINST, HARDWARE, MODELS, TAKE, USES, Topic
from vllm_smoothquant.format.errors import SmoothQuantError

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "which_scheme.md"
RESULTS = ROOT / "benchmarks" / "results"
HEADER = """# Which scheme?

Written by `python -m benchmarks.which_scheme`; not by hand. `smoothquant doctor MODEL` prints the rows for your machine
and your model, with the sizes of its weights; both come from one table (`calibration/advice`).

**Nothing of ours has run on a GPU, on a CPU with AMX or on Arm.** Rows for them rest on the documentation, the code and
the figures of others, which are named. Our own figures are of small models on one or two cores of an EPYC: 135 M is
SmolLM2-135M-Instruct, 0.5 G Qwen2.5-Coder-0.5B-Instruct, 0.92 G a Llama of that size with random weights. Compare on
your model and machine with `smoothquant evaluate OUT --baseline MODEL --text TEXT --table DIR`.
"""


def measured(figure: Ours) -> str:
    """The value of `figure` as its source has it now.

    Errors (SmoothQuantError): the source has no such figure.
    """
    name = {"serving_vnni": "serving", "vision": "shapes", "experts_vnni": "experts"}.get(figure.page, figure.page)
    try:
        if name not in READERS:
            return _cell(figure)
        path = RESULTS / f"{'shapes' if figure.page == 'vision' else figure.page}.json"
        return READERS[name](json.loads(path.read_text(encoding="utf-8")), figure.where)
    except (OSError, LookupError, TypeError, ValueError) as error:
        where, fix = f"benchmarks/results/{figure.page}.json", "correct the claim in calibration/advice/claims.py"
        raise SmoothQuantError(where, f"a figure at {', '.join(figure.where)}", error, fix) from error


def _serving(data: Any, where: tuple[str, ...]) -> str:
    """Time of an arm, of floating point's: the quotient of the medians of two ratios, as in the page."""
    model, mode, arm, case = where
    rows = data[model][mode]["rows"]
    return f"{median(rows[arm]['ratios'][case]) / median(rows[FLOAT]['ratios'][case]):.2f}"


# Page -> from the JSON file and the path to the text of the value.
READERS: dict[str, Callable[[Any, tuple[str, ...]], str]] = {
    "serving": _serving,
    "experts": lambda data, at: f"{data[at[0]]['vllm'][1] / data[at[0]][at[1]][1]:.2f}",
    "accuracy": lambda data, at: f"{data['models'][at[0]][at[1]]['perplexity_change']:+.2%}",
    "four_bits": lambda data, at: f"{data['models'][at[0]][at[1]][at[2]]['perplexity_change']:+.2%}",
    "kv_cache": lambda data, at: f"{data[at[0]][at[1]]:.4f}",
    "shapes": lambda data, at: f"{1e6 * data['rows'][at[0]][2]:.2f}",
}


def _cell(figure: Ours) -> str:
    """The cell in a table of the page: the row that begins with where[:-1], the column where[-1]."""
    *row, column = figure.where
    columns: list[str] = []
    for line in (ROOT / "docs" / f"{figure.page}.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if column in cells:
            columns = cells
        elif columns and cells[: len(row)] == row:
            return cells[columns.index(column)]
    raise LookupError(f"no such row or column in docs/{figure.page}.md")


def check() -> None:
    """Errors (SmoothQuantError): a figure of the table is not that of its source."""
    for key, claim in CLAIMS.items():
        if isinstance(claim, Ours) and (now := measured(claim)) != claim.value:
            fix = "write the new value, and read whether the advice still follows from it"
            raise SmoothQuantError(f"calibration/advice/claims.py: {key}", now, claim.value, fix)


def page() -> str:
    """The page."""
    keys = list(CLAIMS)
    parts = [HEADER, "\n## By hardware\n\n", *_hardware(keys), "\n## By model\n\n", *_topics(MODELS.values(), keys)]
    parts += ["\n## When not to use INT8\n\n", *_topics(AGAINST, keys), "\n## What to type\n\n"]
    parts += [f"    {command:<70} # {what}\n" for what, command in TAKE.values()]
    parts += ["\nWhat `calibrate` writes, `vllm serve OUT` serves. All options: [usage.md](usage.md).\n"]
    parts += ["\n## Figures\n\n| | | source |\n|---|---|---|\n"]
    for number, (text, source, address) in enumerate(sources(keys), 1):
        parts.append(f"| {number} | {text} | [{source.removeprefix('docs/')}]({address}) |\n")
    return "".join(parts)


def _hardware(keys: list[str]) -> Iterator[str]:
    names = list(USES.values())
    yield f"| | {' | '.join(names)} | if only 4 bits fit | executed by us |\n{'|---' * (len(names) + 3)}|\n"
    for row in HARDWARE.values():
        takes = [TAKE[row.uses[use].take][0] for use in USES]
        yield f"| {row.name} | {' | '.join(takes)} | {TAKE[row.four][0] if row.four else 'none'} | {row.ran} |\n"
    yield "\nThe reasons; a number in brackets is a row of [Figures](#figures).\n"
    for row in HARDWARE.values():
        yield f"\n**{row.name}.** {row.note}\n\n"
        for advice in dict.fromkeys(row.uses.values()):
            uses = ", ".join(name for use, name in USES.items() if row.uses[use] == advice)
            yield f"- {uses}: {TAKE[advice.take][0]}, because {advice.why}{_cited(advice.claims, keys)}.\n"


def _topics(topics: Iterable[Topic], keys: list[str]) -> Iterator[str]:
    for topic in topics:
        yield f"- **{topic.name}**: {topic.text.removesuffix('.')}{_cited(topic.claims, keys)}.\n"


def _cited(claims: tuple[str, ...], keys: list[str]) -> str:
    return f" [{', '.join(str(keys.index(claim) + 1) for claim in claims)}]" if claims else ""


def main() -> None:
    check()
    OUTPUT.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
