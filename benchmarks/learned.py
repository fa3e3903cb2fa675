"""docs/learned.md: do factors that are learned beat those that alpha and its search give?

`python -m benchmarks.learned [MODEL ...]`. OmniQuant (arXiv 2308.13137) and OSTQuant (arXiv 2501.13987) learn the
factors by gradient descent through simulated rounding. Here every factor of a plan, one for each channel of a group,
is learned so (learning.py): Adam on log s, loss KL(floating point || simulated) on calibration windows. The learning
rate is the one of a few with the smallest KL on windows of the calibration text that nothing was learned on.
All rows are scored on other articles by simulate.py, whose integers are those that vLLM serves, with factors rounded
as calibrate folds them. MARGIN and ERRORS were set before anything was scored. The last line printed is JSON.
"""

import argparse
import copy
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
from benchmarks.learning import folded, learn
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.evaluation.windows import load_tokenizer, token_windows
from calibration.options import Options
from calibration.pipeline import observe_model
from calibration.smoothing import simulate
from calibration.smoothing.plan import make_plan
from calibration.smoothing.simulate import LayerScheme
from demo import assets

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "learned.json"
OUTPUT = ROOT / "docs" / "learned.md"
# Learned factors must lower the KL of the best row that was not learned by this share, and by this many standard errors
# of the difference: an option that costs hours on a real model must be worth more than another choice of alpha.
MARGIN, ERRORS = 0.1, 2.0
OTHER = "Python source"
HEADER = """# Learned factors

Written by `python -m benchmarks.learned`; not by hand. {machine}

Do factors that are learned by gradient descent through simulated rounding (OmniQuant, arXiv 2308.13137; OSTQuant, arXiv
2501.13987) beat those that an alpha gives? Each group's factors, one for each channel, start from a plan of calibrate
and are learned by Adam on log s; the loss is the KL from floating point on calibration windows. The learning rate is
the best on held-out windows of the calibration text. Weights are rounded to nearest, 8 bits per channel or 4 in groups
of 128 or the next size that divides a layer; --rounding gptq, calibrate's default for 4 bits, was not measured.
Activations (A8): 8 bits per token. Scored on other articles, simulated, with the integers that vLLM serves and factors
as calibrate folds them.

Margin, set before: the learned row (of several, the best on held-out windows) must have a KL lower by {margin:.0%} and
by {errors:.0f} standard errors of the paired difference than the best of the rows that were not learned.

**It does in {passed} of {of}: {which}.**

| model | scheme | learned | best not learned | difference | |
|---|---|---|---|---|---|
"""
SECTION = """
## {name}

Calibrated on {samples} x {length} tokens; learned on {learned} windows of as many, {steps} steps of {batch}, at the
best of the rates {rated} on {held_out} others, one seed; scored on {windows} windows. KL: nats per token, ± its error
over them. *Change*: to the row that learning started from, paired over the windows; the same on {windows} windows of
Python's standard library, unlike all that calibration saw; and on the held-out windows. *Time*: of one rate.

| scheme | row | KL | change | Python source | held out | rate | time |
|---|---|---|---|---|---|---|---|
"""
SCHEMES: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W4A8": {"bits": 4, "activations": "token", "rounding": "nearest"},
    "W4A16": {"bits": 4, "rounding": "nearest"},
}
SEARCHED: dict[str, dict[str, Any]] = {
    "no smoothing": {"rotation": "none", "no_smoothing": True},
    "alpha 0.5": {"rotation": "none", "alpha": 0.5},
    "alpha auto": {"rotation": "none", "alpha": "auto"},
    "rotated, alpha auto": {"rotation": "always", "alpha": "auto"},
}


@dataclass(frozen=True)
class Case:
    """samples: windows observed and searched. learned, held_out: windows to learn on, and to choose the rate by. batch:
    windows of a step. windows: scored of each text. All of length tokens. starts: row -> schemes in which learning
    starts from it.
    """

    folder: Callable[[], Path]
    length: int
    samples: int
    learned: int
    held_out: int
    batch: int
    steps: int
    windows: int
    rates: tuple[float, ...]
    starts: Mapping[str, tuple[str, ...]]
    schemes: tuple[str, ...] = tuple(SCHEMES)


MODELS = {
    "a Qwen3 trained here": Case(
        lambda: mixture.model_dir("dense"), small_opt.LENGTH, 64, 96, 32, 4, 60, 32, (1e-2, 3e-2, 1e-1),
        {"no smoothing": tuple(SCHEMES), "alpha auto": tuple(SCHEMES), "rotated, alpha auto": ("W8A8",)},
    ),
    "SmolLM2-135M-Instruct": Case(
        assets.model_dir, 256, 16, 16, 4, 1, 20, 6, (1e-2, 3e-2), {"alpha auto": ("W8A8",)}, ("W8A8",)
    ),
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
        quiet=True,
    )  # fmt: skip
    texts = {"kl": windows_of(case, assets.evaluation_text(), case.windows, 0), OTHER: other_text(case)}
    calibration = windows_of(case, assets.calibration_text(), case.learned + case.held_out, 1)
    observation, way = observe_model(replace(options, rotation="none")), "none"
    exact = {key: simulate.log_probabilities(observation.model, windows, {}) for key, windows in texts.items()}
    plain = simulate.log_probabilities(observation.model, calibration, {})
    ids, held_out, goal = calibration[: case.learned], calibration[case.learned :], torch.stack(plain[: case.learned])
    model = copy.deepcopy(observation.model).float().requires_grad_(False)

    def kl(layers: Mapping[str, LayerScheme], windows: torch.Tensor, expected: list[torch.Tensor]) -> list[float]:
        return simulate.divergences(expected, simulate.log_probabilities(observation.model, windows, layers))

    def scores(layers: Mapping[str, LayerScheme]) -> dict[str, Any]:
        return {key: kl(layers, windows, exact[key]) for key, windows in texts.items()}

    for start, changes in SEARCHED.items():
        if changes["rotation"] != way:
            way = changes["rotation"]
            observation = observe_model(replace(options, rotation=way))
            model = copy.deepcopy(observation.model).float().requires_grad_(False)
        for scheme in case.schemes:
            rows = figures.setdefault(scheme, {})
            plan = make_plan(observation, replace(options, **SCHEMES[scheme], **changes))
            rows[start] = scores(plan.layers())
            print(name, scheme, start, statistics.fmean(rows[start]["kl"]), file=sys.stderr, flush=True)
            save()
            if scheme not in case.starts.get(start, ()):
                continue
            before, found, began = kl(plan.layers(), held_out, plain[case.learned :]), {}, time.perf_counter()
            for rate in case.rates:
                size = {"steps": case.steps, "batch": case.batch}
                layers = folded(observation, plan, learn(model, observation.graph, plan, ids, goal, rate=rate, **size))
                found[rate] = statistics.fmean(kl(layers, held_out, plain[case.learned :])), layers
                print(name, scheme, start, rate, statistics.fmean(before), found[rate][0], file=sys.stderr, flush=True)
            seconds, best = time.perf_counter() - began, min(found, key=lambda rate: found[rate][0])
            rows[f"{start}, then learned"] = {
                **scores(found[best][1]), "start": start, "rate": best, "seconds": seconds,
                "before": statistics.fmean(before), "held_out": {str(rate): x for rate, (x, _) in found.items()},
            }  # fmt: skip
            save()


def difference(row: list[float], other: list[float]) -> tuple[float, float]:
    """(mean, its standard error) of row - other over the same windows, as shares of the mean of `other`."""
    paired, size = [a - b for a, b in zip(row, other, strict=True)], statistics.fmean(other)
    return statistics.fmean(paired) / size, standard_error(paired) / size


def chosen(rows: dict[str, Any]) -> tuple[str, str]:
    """(the learned row with the least KL on held-out calibration text, the other row with the least KL as scored).

    The second choice sees the scored text, which can only favour the row that learning has to beat.
    """
    learned = {row: min(found["held_out"].values()) for row, found in rows.items() if "start" in found}
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
        machine=figures["machine"], margin=MARGIN, errors=ERRORS, passed=len(passed), of=len(found),
        which="; ".join(passed) or "none",
    )  # fmt: skip
    for name, scheme, learned, searched, change, error in found:
        word = "passes" if passes(change, error) else "fails"
        text += f"| {name} | {scheme} | {learned} | {searched} | {change:+.1%} ± {error:.1%} | {word} |\n"
    for name, schemes in figures["models"].items():
        text += SECTION.format(name=name, **vars(MODELS[name]), rated=", ".join(map(str, MODELS[name].rates)))
        for scheme, rows in schemes.items():
            for row, found_row in rows.items():
                kl, cells = found_row["kl"], " | | | | | |"
                if "start" in found_row:
                    pairs = (difference(found_row[text], rows[found_row["start"]][text]) for text in ("kl", OTHER))
                    changes = " | ".join(f"{change:+.1%} ± {error:.1%}" for change, error in pairs)
                    own = min(found_row["held_out"].values()) / found_row["before"] - 1
                    seconds = found_row["seconds"] / len(found_row["held_out"])
                    cells = f" | {changes} | {own:+.1%} | {found_row['rate']} | {seconds:.0f} s |"
                text += f"| {scheme} | {row} | {statistics.fmean(kl):.3g} ± {standard_error(kl):.2g}{cells}\n"
            text += "".join(f"| {scheme} | {row} | not measured | | | | | |\n" for row in SEARCHED if row not in rows)
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
