"""docs/generation.md: a judge that is not kind. Exact answers of checkpoints, paired with those of floating point.

`python -m benchmarks.generation [MODEL ...] [--checkpoints ROW ...]`. Perplexity averages over tokens that any model
guesses; a generated answer of several tokens is right or wrong. The questions are made by a seeded script, with worked
examples before each, so that a small model knows the form:

    lookup    eight words with a number of four digits each; one word again: its number
    sum       the sum of two numbers below fifty
    reverse   four words; the same words from the last to the first

Each model answers all of them through vLLM, greedily. Answers are compared question by question with floating point's.
The last line printed is JSON.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import qwen_coder
from benchmarks.machine import describe
from calibration.evaluation.measure import engine_environment
from calibration.pipeline import calibrate
from demo import assets

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "generation.json"
OUTPUT = ROOT / "docs" / "generation.md"
MODELS = {"SmolLM2-135M-Instruct": assets.model_dir, qwen_coder.NAME: qwen_coder.model_dir}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "per token (default)": {},
    "static (--activations static)": {"activations": "static"},
    "static everywhere": {"level": "O3", "weights": "channel"},
    "static everywhere, smoothing 0.5 alone": {"level": "O3", "weights": "channel", "rotation": "none", "alpha": 0.5},
}
FLOAT, DYNAMIC = "floating point", "per token (default)"
QUESTIONS = 150  # of each kind
WORDS = (
    *("apple", "river", "stone", "cloud", "tiger", "lemon", "chair", "bread", "horse", "glass", "paper", "light"),
    *(
        "table",
        "music",
        "ocean",
        "piano",
        "silver",
        "garden",
        "window",
        "bridge",
        "candle",
        "forest",
        "rocket",
        "basket",
    ),
)
HEADER = """# Generation

Written by `python -m benchmarks.generation`; not by hand. {machine}

{questions} questions of each of three kinds (the script's first lines say which), answered greedily through vLLM in
float32 around the integers. *Against*: the difference of the shares of right answers, over the same questions, with its
95 % confidence interval (paired; McNemar's variance). *Other answers*: questions that are answered in other words.
"""
SECTION = """
## {name}

| | lookup | sum | reverse | all | against floating point | against per token | other answers |
|---|---|---|---|---|---|---|---|
"""


def questions(seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """(kind, prompt, answer)"""
    rng = random.Random(seed)

    def lookup() -> tuple[str, str]:
        words = rng.sample(WORDS, 8)
        codes = dict(zip(words, rng.sample(range(1000, 10000), 8), strict=True))
        asked = rng.sample(words, 3)
        table = "".join(f"{word}: {code}\n" for word, code in codes.items())
        examples = "".join(f"The number of {word} is {codes[word]}.\n" for word in asked[:2])
        return f"{table}{examples}The number of {asked[2]} is", f" {codes[asked[2]]}."

    def sums() -> tuple[str, str]:
        pairs = [(rng.randrange(2, 50), rng.randrange(2, 50)) for _ in range(5)]
        examples = "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs[:4])
        return f"{examples}{pairs[4][0]} + {pairs[4][1]} =", f" {sum(pairs[4])}\n"

    def reverse() -> tuple[str, str]:
        lists = [rng.sample(WORDS, 4) for _ in range(5)]
        lines = [f"{' '.join(words)} -> {' '.join(reversed(words))}\n" for words in lists]
        prompt, arrow, answer = lines[4].partition(" ->")
        return "".join(lines[:4]) + prompt + arrow, answer

    for kind, make in (("lookup", lookup), ("sum", sums), ("reverse", reverse)):
        for _ in range(QUESTIONS):
            yield (kind, *make())


def answer(model: str, prompts: list[str]) -> list[str]:
    """The continuation of each prompt, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "prompts.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps(prompts))
        command = [sys.executable, "-m", "benchmarks.generation", "--answer", model, str(asked), str(answered)]
        environment = engine_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(answered.read_text())


def _answer_here(model: str, asked: Path, answered: Path) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=1 << 30, seed=0)
    outputs = llm.generate(json.loads(asked.read_text()), SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    answered.write_text(json.dumps([output.outputs[0].text for output in outputs]))


def difference(a: list[bool], b: list[bool]) -> tuple[float, float]:
    """(share of right answers in a minus that in b, half of its 95 % interval): only questions that differ count."""
    gained = sum(x and not y for x, y in zip(a, b, strict=True))
    lost = sum(y and not x for x, y in zip(a, b, strict=True))
    n = len(a)
    return (gained - lost) / n, 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n


def measure(name: str, checkpoints: list[str]) -> dict[str, Any]:
    """Row -> its answers, whether each is right; of floating point and of `checkpoints`."""
    asked = list(questions())
    prompts, source = [prompt for _, prompt, _ in asked], str(MODELS[name]())
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for row, options in {FLOAT: None, **{row: CHECKPOINTS[row] for row in checkpoints}}.items():
            model = source
            if options is not None:
                model = str(Path(folder, row.replace(" ", "-")))
                calibrate(source, model, dataset=str(assets.calibration_text()), samples=16, quiet=True, **options)
            texts = answer(model, prompts)
            right = [text.startswith(expected) for text, (_, _, expected) in zip(texts, asked, strict=True)]
            rows[row] = {"texts": texts, "right": right}
            print(f"{name}: {row}: {sum(right) / len(right):.1%}", file=sys.stderr, flush=True)
    return rows


def page(figures: dict[str, Any]) -> str:
    kinds = [kind for kind, _, _ in questions()]
    text = HEADER.format(machine=figures["machine"], questions=QUESTIONS)
    for name, rows in figures["models"].items():
        text += SECTION.format(name=name)
        for row, found in rows.items():
            right = found["right"]
            shares = [
                sum(r for r, kind in zip(right, kinds, strict=True) if kind == each) / QUESTIONS
                for each in dict.fromkeys(kinds)
            ]
            against = [difference(right, rows[other]["right"]) for other in (FLOAT, DYNAMIC)]
            texts = ["{:+.1%} ± {:.1%}".format(*each) if row != FLOAT else "" for each in against]
            other = sum(a != b for a, b in zip(found["texts"], rows[FLOAT]["texts"], strict=True))
            cells = [*(f"{share:.1%}" for share in shares), f"{sum(right) / len(right):.1%}", *texts, other or ""]
            text += f"| {row} | {' | '.join(map(str, cells))} |\n"
    return text


def main() -> None:
    """Measure the models named on the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--checkpoints", nargs="+", choices=CHECKPOINTS, default=list(CHECKPOINTS))
    parser.add_argument("--answer", nargs=3, metavar=("MODEL", "PROMPTS", "ANSWERS"), help="used by the script itself")
    args = parser.parse_args()
    if args.answer:
        _answer_here(args.answer[0], Path(args.answer[1]), Path(args.answer[2]))
        return
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"models": {}}
    figures["machine"] = describe()
    for name in args.models or MODELS:
        figures["models"][name] = measure(name, args.checkpoints)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        OUTPUT.write_text(page(figures))
    summary = {
        name: {row: sum(found["right"]) / len(found["right"]) for row, found in rows.items()}
        for name, rows in figures["models"].items()
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
