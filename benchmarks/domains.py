"""docs/domains.md: does smoothing hurt on text of another kind than the text that calibrated it?

`python -m benchmarks.domains [MODEL ...]`. Each model is calibrated on English Wikipedia articles and scored on other
articles, on Python source code and on Bulgarian Wikipedia articles, with and without smoothing. KL is measured on the
calibration host by simulate.py, whose integers are those that vLLM serves. The last line printed is JSON.
"""

import json
import statistics
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import qwen_coder
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.options import Options
from calibration.pipeline import observe_model
from calibration.smoothing import simulate
from calibration.smoothing.plan import make_plan
from demo import assets

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "domains.md"
FIGURES = ROOT / "benchmarks" / "results" / "domains.json"
SAMPLES, WINDOWS, SEQ_LEN = 16, 4, 512
BULGARIAN = "gensim/test/test_data/bgwiki-latest-pages-articles-shortened.xml.bz2"
# Modules of Python's standard library, without tests and tables.
CODE = ("argparse", "ast", "configparser", "difflib", "inspect", "pathlib", "subprocess", "tarfile", "threading")
MODELS: dict[str, Callable[[], Path]] = {
    "SmolLM2-135M-Instruct": assets.model_dir,
    qwen_coder.NAME: qwen_coder.model_dir,
}
SCHEMES: dict[str, dict[str, Any]] = {"per channel, per token (default)": {}, "O1": {"level": "O1"}}
HEADER = """# Smoothing on text of other kinds

Written by `python -m benchmarks.domains`; not by hand. {machine}

Calibrated on {samples} x {seq_len} tokens of English Wikipedia articles, scored on {windows} x {seq_len} tokens of each
text: other articles, Python {python}'s standard library, Bulgarian Wikipedia. KL: nats per token from floating point's
distribution, with the standard error over the windows. Ratio: smoothed (alpha 0.5) to no smoothing. Simulated on the
calibration host: the integers are those that vLLM serves, and everything around them is float32.

| model | scheme | text | no smoothing | smoothed | ratio |
|---|---|---|---|---|---|
"""


def texts() -> dict[str, str]:
    library = Path(sysconfig.get_path("stdlib"))
    lines = assets.evaluation_text().read_text().splitlines()
    return {
        "English Wikipedia": "\n\n".join(json.loads(line)["text"] for line in lines),
        "Python source": "\n\n".join((library / f"{name}.py").read_text() for name in CODE),
        "Bulgarian Wikipedia": "\n\n".join(text for _, text in assets.articles_of(BULGARIAN)),
    }


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), standard_error(values)


def measure(name: str) -> Iterator[tuple[str, str, tuple[float, float], tuple[float, float]]]:
    """(scheme, text, KL without smoothing, KL with it) of the model `name`, each KL with its standard error."""
    calibration = {"dataset": str(assets.calibration_text()), "samples": SAMPLES, "seq_len": SEQ_LEN}
    observation = observe_model(Options(model=str(MODELS[name]()), rotation="none", quiet=True, **calibration))
    model, tokenizer = observation.model, observation.source.tokenizer
    plans = {
        (scheme, plain): make_plan(observation, Options(quiet=True, no_smoothing=plain, **options)).layers()
        for scheme, options in SCHEMES.items()
        for plain in (True, False)
    }
    for text, content in texts().items():
        ids = tokenizer(content, verbose=False)["input_ids"][: WINDOWS * SEQ_LEN]
        windows = torch.tensor(ids).view(WINDOWS, SEQ_LEN)
        expected = simulate.log_probabilities(model, windows, {})
        for scheme in SCHEMES:
            found = (simulate.log_probabilities(model, windows, plans[scheme, plain]) for plain in (True, False))
            without, smoothed = (mean_and_error(simulate.divergences(expected, each)) for each in found)
            yield scheme, text, without, smoothed


def main() -> None:
    figures: dict[str, list[Any]] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for name in sys.argv[1:] or MODELS:
        figures[name] = list(measure(name))
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        OUTPUT.write_text(page(figures))
    print(json.dumps(figures))


def page(figures: dict[str, list[Any]]) -> str:
    python = ".".join(map(str, sys.version_info[:2]))
    facts = {"samples": SAMPLES, "seq_len": SEQ_LEN, "windows": WINDOWS, "python": python}
    rows = []
    for name, measured in figures.items():
        for scheme, text, without, smoothed in measured:
            cells = [f"{kl:.4f} ± {error:.4f}" for kl, error in (without, smoothed)]
            rows.append(f"| {name} | {scheme} | {text} | {' | '.join(cells)} | {smoothed[0] / without[0]:.2f} |\n")
    return HEADER.format(machine=describe(), **facts) + "".join(rows)


if __name__ == "__main__":
    main()
