"""docs/clinic.md: what each scheme costs and saves, with an exam made from text of one domain.

    python -m benchmarks.clinic                      everything
    python -m benchmarks.clinic --parts speed        alone on the machine; the other figures stay as they are

SmolLM2-135M-Instruct in BF16 and in the schemes of CHECKPOINTS; the README has a table of the most important columns
(`summary`). The exam is made by examples/own_exam/make.py
from the medical and biological articles among the Wikipedia articles of demo/assets.py, and no checkpoint is calibrated
on these. accuracy: KL and perplexity. exam: both parts of the exam, in processes that may reach no other machine
(no_network.py). speed: memory and speed. Figures of each part are merged into the JSON file as soon as they are known.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import no_network
from benchmarks.machine import describe
from calibration.evaluation.columns import COLUMNS, Column, cells
from calibration.evaluation.evaluate import evaluate
from calibration.evaluation.evaluate_options import EvaluateOptions
from calibration.evaluation.measure import SERVE, measure, run_tasks
from calibration.evaluation.sizes import weight_bytes
from calibration.evaluation.windows import token_windows
from demo import assets

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "clinic.md"
FIGURES = ROOT / "benchmarks" / "results" / "clinic.json"
FOLDER = assets.CACHE / "clinic"
MAKE_EXAM = ROOT / "examples" / "own_exam" / "make.py"
FLOAT = "BF16"
# Arm -> options of its calibration.
CHECKPOINTS: dict[str, list[str]] = {
    "W8A8 dynamic": [],
    "W8A8 static": ["--activations", "static"],
    "W4A16": ["--bits", "4", "--group-size", "32"],
    "W4A8": ["--bits", "4", "--group-size", "32", "--activations", "token"],
}
ARMS = (FLOAT, *CHECKPOINTS)
SAMPLES, SEQ_LEN = 16, 512  # to calibrate on
# Quality in float32, because CPUs without BF16 emulate it ten times slower. What is quantised has the same integers.
QUALITY: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
EXAM = {"own_exam_choice": ("acc", "multiple choice"), "own_exam_extraction": ("exact_match", "extraction")}
KEYS = {
    "quality": ("perplexity", "perplexity_change", "kl_divergence", "top1_agreement"),
    "speed": (
        "disk_bytes", "memory_bytes", "peak_memory_bytes", "first_token_seconds", "tokens_per_second_batch_1",
        "tokens_per_second_batch_16",
    ),
}  # fmt: skip

Figures = dict[str, Any]


def exam(folder: Path) -> Figures:
    """Make the exam in `folder` if it is not there; returns its about.json."""
    if not folder.exists():
        assets.articles()  # writes the file that is read here
        with assets.made(folder) as unfinished:
            words = [str(MAKE_EXAM), str(assets.CACHE / "articles.jsonl"), str(unfinished)]
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    return dict(json.loads((folder / "about.json").read_text()))


def calibration_text(folder: Path) -> Path:
    """The articles of assets.calibration_text() without those of the exam in `folder`."""
    target = folder / "calibration.jsonl"
    rest = set((folder / "rest.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [json.loads(line) for line in assets.calibration_text().read_text().splitlines()]
    lines = [line for row in rows if (line := json.dumps(row, ensure_ascii=False)) in rest]
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return target


def checkpoints(arms: Sequence[str], text: Path) -> dict[str, Path]:
    """Arm -> its folder, of BF16 and `arms`. Checkpoints that exist in FOLDER are used as they are."""
    paths = {FLOAT: assets.model_dir()}
    for arm, options in CHECKPOINTS.items():
        if arm not in arms:
            continue
        paths[arm] = FOLDER / arm
        if not paths[arm].exists():
            print(f"calibrate: {arm}", file=sys.stderr, flush=True)
            # Each observes by itself, because the schemes choose different rotations.
            size = ["--dataset", str(text), "--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN)]
            words = ["calibrate", str(paths[FLOAT]), "-o", str(paths[arm]), "--quiet", *size, *options]
            subprocess.run([sys.executable, "-m", "calibration", *words], check=True, cwd=ROOT)
    return paths


def accuracy(paths: Mapping[str, Path], args: argparse.Namespace) -> Iterator[tuple[str, Figures]]:
    """Perplexity, KL and agreement of each arm, on articles that calibration did not see; one process for all."""
    result = evaluate(EvaluateOptions(
        tuple(str(path) for arm, path in paths.items() if arm != FLOAT), baseline=str(paths[FLOAT]),
        text=str(assets.evaluation_text()), samples=args.windows, seq_len=SEQ_LEN, no_speed=True, **QUALITY,
    ))  # fmt: skip
    for arm, row in zip(sorted(paths, key=lambda arm: arm != FLOAT), result["models"], strict=True):
        keys = {key for column in COLUMNS if column.key in KEYS["quality"] for key in (column.key, column.error)}
        yield arm, {key: row[key] for key in keys if key in row} | {"scored_tokens": row["scored_tokens"]}


def sit(paths: Mapping[str, Path], args: argparse.Namespace) -> Iterator[tuple[str, Figures]]:
    """The scores of each arm, and what its processes tried to reach."""
    for arm, path in paths.items():
        print(f"exam: {arm}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory() as folder, variables(no_network.environment(Path(folder))):
            limits: dict[str, Any] = {"include_path": str(FOLDER / "exam"), "limit": args.questions}
            scores = run_tasks(path, ["own_exam"], **limits, max_model_len=1024, **QUALITY)
            yield arm, {"tasks": scores, "refused": no_network.attempts(Path(folder), "lm_eval_tasks")}


def speed(paths: Mapping[str, Path], args: argparse.Namespace) -> Iterator[tuple[str, Figures]]:
    """Memory and speed as a server would have them, each arm in a process of its own, whose peak is measured."""
    windows, _ = token_windows(
        [str(assets.model_dir())], str(assets.evaluation_text()), text_column="text", samples=args.windows,
        seq_len=SEQ_LEN, seed=0,
    )  # fmt: skip
    for arm, path in paths.items():
        print(f"speed: {arm}", file=sys.stderr, flush=True)
        figures = measure(path, windows, score=False, decode=None, serve=SERVE, dtype="auto", enforce_eager=True)
        yield arm, {key: figures[key] for key in KEYS["speed"] if key in figures} | {
            "disk_bytes": weight_bytes(str(path), frozenset())["disk_bytes"], "kernels": figures["kernels"],
        }  # fmt: skip


Measure = Callable[[Mapping[str, Path], argparse.Namespace], Iterator[tuple[str, Figures]]]
PARTS: dict[str, Measure] = {"accuracy": accuracy, "exam": sit, "speed": speed}


@contextmanager
def variables(new: Mapping[str, str]) -> Iterator[None]:
    """The environment with `new` in it, which processes started meanwhile inherit."""
    before = dict(os.environ)
    os.environ.update(new)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def score(arm: Figures, task: str) -> str:
    metric, _ = EXAM[task]
    figures = arm["tasks"][task]
    return f"{figures[metric]:.1%} ± {figures[f'{metric}_stderr']:.1%}"


def table(figures: Figures, part: str, columns: Mapping[str, Callable[[Figures], str]]) -> str:
    """A row for each arm that `part` was measured for, and how it was measured; "" if it was not measured at all."""
    arms = figures.get(part, {})
    if not arms:
        return f"Not measured yet: `python -m benchmarks.clinic --parts {part}`.\n"
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {arm} | {' | '.join(text(arms[arm]) for text in columns.values())} |" for arm in ARMS if arm in arms]
    how = dict.fromkeys(f"{row['machine']} `{row['command']}`" for row in arms.values())
    return "\n".join([*lines, "", *how, ""])


def of_columns(keys: tuple[str, ...]) -> dict[str, Callable[[Figures], str]]:
    return {column.long: partial(cell, column=column) for column in COLUMNS if column.key in keys}


def cell(arm: Figures, column: Column) -> str:
    return next(iter(cells([arm], [column]).values()), [""])[0]


SHORT = ("perplexity_change", "kl_divergence", "memory_bytes", "first_token_seconds", "tokens_per_second_batch_1",
         "tokens_per_second_batch_16")  # fmt: skip


def summary(figures: Figures) -> str:
    """The README's table: a row for each arm of which all parts were measured."""
    arms = {arm: {k: v for part in PARTS for k, v in figures[part].get(arm, {}).items()} for arm in ARMS}
    columns = of_columns(SHORT) | {label: partial(score, task=task) for task, (_, label) in EXAM.items()}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for arm, row in arms.items():
        if all(arm in figures[part] for part in PARTS):
            lines.append(f"| {arm} | {' | '.join(text(row) for text in columns.values())} |")
    return "\n".join(lines)


PAGE = """# The clinic's table: a choice between schemes, with an exam

Written by `python -m benchmarks.clinic`; not by hand. SmolLM2-135M-Instruct, calibrated on {samples} x {seq_len} tokens
of Wikipedia articles that are neither in the exam nor in the text that is scored.

{options}

W4A16 and W4A8 were measured with scales above zero, before scales were signed ([four_bits.md](four_bits.md)).

## Quality

Perplexity of {windows} x {seq_len} tokens of other articles, and KL from BF16's distribution in nats per token.
±: standard error over the windows. All arms compute in {dtype} around what is quantised, in this section and the next.

{accuracy}
## Exam

Made by [examples/own_exam](../examples/own_exam/README.md) with seed {seed}, from all articles of at least {words}
words of which {rate:g} in a thousand are medical or biological (the expression is in make.py):
{documents}.
{asked} The answer is what the article had; whether another
choice would be right, too, no rule can say. ±: standard error over the questions, which are the same for all arms.
Models are trained on Wikipedia, so that scores on private text may be lower.

{exam}
{network}

## Memory and speed

Prompts of {prompt_tokens} tokens, {new_tokens} new ones each, medians of {repeats}, asked of vLLM's engine without
HTTP.

{speed}"""


def network(exam: Figures) -> str:
    """What the hook of no_network.py saw; "" if the exam was not measured."""
    if not exam:
        return ""
    refused = sorted({attempt for arm in exam.values() for attempt in arm["refused"]})
    seen = f"It refused: {', '.join(refused)}." if refused else "No process tried to reach another machine."
    variables = " ".join(f"{name}={value}" for name, value in no_network.QUIET.items())
    return (
        f"These processes ran with `{variables}` and under a hook that\nrefuses and records, in all Python code, every "
        f"name lookup and every address of another machine\n(benchmarks/no_network.py). {seen} The hook does not see "
        "native code."
    )


def values(figures: Figures, part: str, key: str) -> str:
    """The value of `key` that the arms of `part` share; several of them if they differ."""
    return " or ".join(dict.fromkeys(str(row[key]) for row in figures.get(part, {}).values())) or "N"


def questions_asked(figures: Figures) -> str:
    limit = values(figures, "exam", "limit")
    choice, extraction = (
        str(min(int(limit), count)) if limit.isdigit() else str(count)
        for count in figures["exam made"]["questions"].values()
    )
    return f"{choice} questions of multiple choice (chance: 25%), {extraction} of extraction."


def page(figures: Figures) -> str:
    about, exam = figures["exam made"], figures.get("exam", {})
    options = (f"- {arm}: {f'`{shlex.join(words)}`' if words else 'the default'}" for arm, words in CHECKPOINTS.items())
    return PAGE.format(
        **SERVE, **about | {"documents": ", ".join(about["documents"])}, samples=SAMPLES, seq_len=SEQ_LEN,
        options="\n".join(options),
        windows=values(figures, "accuracy", "windows"), dtype=QUALITY["dtype"],
        accuracy=table(figures, "accuracy", of_columns(KEYS["quality"])), asked=questions_asked(figures),
        exam=table(figures, "exam", {label: partial(score, task=task) for task, (_, label) in EXAM.items()}),
        network=network(exam), speed=table(figures, "speed", of_columns(KEYS["speed"])),
    )  # fmt: skip


def main() -> None:
    """Measure the parts of the command line and write the page; other parts and arms stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS, help="none: only write the page")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS, help=f"accuracy always needs {FLOAT}")
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, to score")
    parser.add_argument("--questions", type=int, help="of each part of the exam (default: all)")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    figures: Figures = json.loads(args.figures.read_text()) if args.figures.exists() else {}
    figures["exam made"] = exam(FOLDER / "exam")
    made = checkpoints(args.arms if args.parts else (), calibration_text(FOLDER / "exam"))
    for part in args.parts:
        arms = {arm: path for arm, path in made.items() if arm in args.arms or (part == "accuracy" and arm == FLOAT)}
        command = shlex.join(["python", "-m", "benchmarks.clinic", *sys.argv[1:]])
        for arm, row in PARTS[part](arms, args):
            run = {"machine": describe(), "command": command, "windows": args.windows, "limit": args.questions}
            figures.setdefault(part, {})[arm] = row | run
            args.figures.write_text(json.dumps(figures, indent=1) + "\n")
            args.output.write_text(page(figures))
    args.output.write_text(page(figures))
    print(args.output.read_text())


if __name__ == "__main__":
    main()
