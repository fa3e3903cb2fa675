"""docs/learned.md: what does --alpha learned gain over the alphas that are searched?

`python -m benchmarks.learned [MODEL ...]` measures the rows that benchmarks/results/learned.json lacks. All are plans
of calibrate, scored by simulate.py, whose integers are those that vLLM serves, on articles that neither calibration nor
the search saw. MARGIN and ERRORS were set before anything was scored. The last line printed is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import domains, mixture, small_opt
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.evaluation.windows import load_tokenizer, token_windows
from calibration.options import Options
from calibration.pipeline import observe_model
from calibration.smoothing import simulate
from calibration.smoothing.learn import HELD_OUT, RATE, STEPS, learn
from calibration.smoothing.plan import Plan, make_plan
from demo import assets

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "learned.json"
OUTPUT = ROOT / "docs" / "learned.md"
# Learned factors must lower the KL of the best row that was not learned by this share, and by this many standard errors
# of the difference: an option that takes minutes on a small model must be worth more than another choice of alpha.
MARGIN, ERRORS = 0.1, 2.0
OTHER = "Python source"
HEADER = """# Learned factors

Written by `python -m benchmarks.learned`; not by hand. {machine}

`--alpha learned` starts from the factors of `--alpha auto` and moves the factor of every channel by gradient descent
through simulated rounding, as OmniQuant (arXiv 2308.13137) and OSTQuant (arXiv 2501.13987) learn theirs: {steps} steps
of Adam on log s at the rate {rate}, on the KL from floating point. It sees the calibration samples alone; one batch of
{held_out} is held out, and the searched factors stay if the learned ones are not better there. Through vLLM:
[field.md](field.md).

Margin, set before: of the learned rows, the best on held-out samples must have a KL lower by {margin:.0%} and by
{errors:.0f} standard errors of the paired difference than the best of the rows that were not learned.

**It does in {passed} of {of}: {which}.**

| model | scheme | learned | best not learned | difference | |
|---|---|---|---|---|---|
"""
SECTION = """
## {name}

Calibrated on {samples} x {length} tokens, scored on {windows} windows. KL: nats per token, ± its standard error over
them. *Change*: from the searched factors that learning started from, paired over the windows; the same on {windows}
windows of Python's standard library, unlike all that calibration saw; and on the held-out samples. *Time*: of learning,
beside other jobs on the same cores at times.

| scheme | row | KL | change | Python source | held out | time |
|---|---|---|---|---|---|---|
"""
RATES = """
KL on the held-out samples, lower is better, at other rates:

| scheme | searched | {rates} |
|---|---|{columns}
"""
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W8A8 static": {"activations": "static"},
    "W8A8 O1": {"level": "O1"},
    "W8A8 O3": {"level": "O3"},
}
SEARCHED: dict[str, dict[str, Any]] = {
    "no smoothing": {"rotation": "none", "no_smoothing": True},
    "alpha 0.5": {"rotation": "none", "alpha": 0.5},
    "alpha auto": {"rotation": "none", "alpha": "auto"},
    "rotated, alpha auto": {"rotation": "always", "alpha": "auto"},
}
# The row that learning starts from -> its own.
LEARNED = {"alpha auto": "alpha learned", "rotated, alpha auto": "rotated, alpha learned"}


@dataclass(frozen=True)
class Case:
    """samples: to calibrate on. windows: scored of each text. All of length tokens. schemes: scheme -> the rows that
    learning starts from. rates: others to compare with, where learning starts from the first of these rows.
    """

    folder: Callable[[], Path]
    length: int
    samples: int
    windows: int
    schemes: Mapping[str, tuple[str, ...]]
    rates: tuple[float, ...] = ()


MODELS = {
    "a Qwen3 trained here": Case(
        lambda: mixture.model_dir("dense"), small_opt.LENGTH, 64, 32,
        dict.fromkeys(SCHEMES, ("alpha auto",)) | {"W8A8": tuple(LEARNED)}, (0.01, 0.1),
    ),
    "SmolLM2-135M-Instruct": Case(assets.model_dir, 512, 64, 16, {"W8A8": tuple(LEARNED)}),
}  # fmt: skip


def windows_of(case: Case, text: Path, count: int, seed: int) -> torch.Tensor:
    rows, _ = token_windows(
        [str(case.folder())], str(text), text_column="text", samples=count, seq_len=case.length, seed=seed
    )
    return torch.tensor(rows)


def other_text(case: Case) -> torch.Tensor:
    """As many windows of text of another kind, because factors could fit the text that they were learned on."""
    ids = load_tokenizer(str(case.folder()))(domains.texts()[OTHER], verbose=False)["input_ids"]
    return torch.tensor(ids[: case.windows * case.length]).view(case.windows, case.length)


def measure(name: str, figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Add scheme -> row -> the KL of each window to `figures`; for learned rows also how they were learned."""
    case = MODELS[name]
    options = Options(
        model=str(case.folder()), dataset=str(assets.calibration_text()), samples=case.samples, seq_len=case.length,
        quiet=True, rotation="none",
    )  # fmt: skip
    texts = {"kl": windows_of(case, assets.evaluation_text(), case.windows, 0), OTHER: other_text(case)}
    observation, way = observe_model(options), "none"
    exact = {key: simulate.log_probabilities(observation.model, windows, {}) for key, windows in texts.items()}

    def scores(plan: Plan) -> dict[str, Any]:
        layers, model = plan.layers(), observation.model
        return {
            key: simulate.divergences(exact[key], simulate.log_probabilities(model, windows, layers))
            for key, windows in texts.items()
        }

    for start, changes in SEARCHED.items():
        if changes["rotation"] != way:
            way = changes["rotation"]
            observation = observe_model(replace(options, rotation=way))
        for scheme, starts in case.schemes.items():
            rows = figures.setdefault(scheme, {})
            learns = start in starts and LEARNED[start] not in rows
            if start in rows and not learns:
                continue
            plan = make_plan(observation, replace(options, **SCHEMES[scheme], **changes))
            rows[start] = scores(plan)
            print(name, scheme, start, statistics.fmean(rows[start]["kl"]), file=sys.stderr, flush=True)
            if learns:
                began = time.perf_counter()
                learned = learn(observation, plan)
                figure = {"seconds": time.perf_counter() - began, "start": start, **learned.learned}
                rates = case.rates if start == starts[0] else ()
                figure["rates"] = {rate: learn(observation, plan, rate=rate).learned["learned_kl"] for rate in rates}
                rows[LEARNED[start]] = scores(learned) | figure
                print(name, scheme, LEARNED[start], figure, file=sys.stderr, flush=True)
            save()


def difference(row: list[float], other: list[float]) -> tuple[float, float]:
    """(mean, its standard error) of row - other over the same windows, as shares of the mean of `other`."""
    paired, size = [a - b for a, b in zip(row, other, strict=True)], statistics.fmean(other)
    return statistics.fmean(paired) / size, standard_error(paired) / size


def chosen(rows: dict[str, Any]) -> tuple[str, str]:
    """(the learned row with the least KL on held-out calibration text, the other row with the least KL as scored).

    The second choice sees the scored text, which can only favour the row that learning has to beat.
    """
    learned = {row: found["learned_kl"] for row, found in rows.items() if "start" in found}
    searched = {row: statistics.fmean(found["kl"]) for row, found in rows.items() if "start" not in found}
    return min(learned, key=learned.__getitem__), min(searched, key=searched.__getitem__)


def passes(change: float, error: float) -> bool:
    return change <= -MARGIN and change <= -ERRORS * error


def verdicts(figures: dict[str, Any]) -> Iterator[tuple[str, str, str, str, float, float]]:
    """(model, scheme, learned row, the row it must beat, change, its standard error) where something was learned."""
    for name, schemes in figures.items():
        for scheme, rows in schemes.items():
            if any("start" in found for found in rows.values()):
                learned, searched = chosen(rows)
                yield name, scheme, learned, searched, *difference(rows[learned]["kl"], rows[searched]["kl"])


def page(figures: dict[str, Any]) -> str:
    found = list(verdicts(figures["models"]))
    passed = [f"{name} in {scheme}" for name, scheme, _, _, *change in found if passes(*change)]
    text = HEADER.format(
        machine=figures["machine"], steps=STEPS, rate=RATE, held_out=HELD_OUT, margin=MARGIN, errors=ERRORS,
        passed=len(passed), of=len(found), which="; ".join(passed) or "none",
    )  # fmt: skip
    for name, scheme, learned, searched, change, error in found:
        word = "passes" if passes(change, error) else "fails"
        text += f"| {name} | {scheme} | {learned} | {searched} | {change:+.1%} ± {error:.1%} | {word} |\n"
    for name, schemes in figures["models"].items():
        text += SECTION.format(name=name, **vars(MODELS[name]))
        for scheme, rows in schemes.items():
            for row, found_row in rows.items():
                text += f"| {scheme} | {row} | {_cells(found_row, rows)} |\n"
        text += _rates(schemes, MODELS[name].rates)
    return text


def _cells(row: dict[str, Any], rows: dict[str, Any]) -> str:
    kl = f"{statistics.fmean(row['kl']):.3g} ± {standard_error(row['kl']):.2g}"
    if "start" not in row:
        return f"{kl} | | | |"
    held_out, seconds = row["learned_kl"] / row["searched_kl"] - 1, row["seconds"]
    if not row["taken"]:
        return f"{kl} | as searched | | {held_out:+.1%} | {seconds:.0f} s"
    pairs = (difference(row[text], rows[row["start"]][text]) for text in ("kl", OTHER))
    changes = " | ".join(f"{change:+.1%} ± {error:.1%}" for change, error in pairs)
    return f"{kl} | {changes} | {held_out:+.1%} | {seconds:.0f} s"


def _rates(schemes: dict[str, Any], rates: tuple[float, ...]) -> str:
    """The table of the rates that were tried; "" if no others were."""
    if not rates:
        return ""
    every = sorted({*rates, RATE})
    text = RATES.format(rates=" | ".join(map(str, every)), columns="---|" * len(every))
    for scheme, rows in schemes.items():
        for row in rows.values():
            if row.get("rates"):
                kl = {**{float(rate): kl for rate, kl in row["rates"].items()}, row["rate"]: row["learned_kl"]}
                text += f"| {scheme} | {row['searched_kl']:.3g} | {' | '.join(f'{kl[rate]:.3g}' for rate in every)} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"models": {}}
    figures["machine"] = describe()

    def save() -> None:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")

    for name in parser.parse_args().models or MODELS:
        measure(name, figures["models"].setdefault(name, {}), save)
    OUTPUT.write_text(page(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
