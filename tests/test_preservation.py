"""benchmarks/preservation.py: how an outcome is named, what stands on the page, and that the measure sees a change."""

import json

import pytest
import torch

from benchmarks import preservation
from benchmarks.calibration import smoothing_only
from benchmarks.preservation import BOUND, FIGURES, OUTPUT, outcome
from tests.helpers import tiny_architectures

FOUND = json.loads(FIGURES.read_text())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"change": BOUND / 2, "smoothed": 0.5}, "exact"),
        ({"change": 0.0, "smoothed": 0.0}, "nothing smoothed"),
        ({"change": 2 * BOUND, "smoothed": 0.5}, "WRONG"),
        ({"change": 2 * BOUND, "smoothed": 0.0}, "WRONG"),
        ({"change": float("nan"), "smoothed": 0.5}, "WRONG"),
        ({"error": "ValueError: no such norm", "opened": 0.0}, "refused"),
        ({"unloadable": "KeyError: of a newer version"}, "not loaded"),
    ],
)
def test_outcomes(row: dict[str, float | str], expected: str) -> None:
    assert outcome(row) == expected
    assert expected in preservation.cell(row)


def test_the_page_is_of_the_figures() -> None:
    assert OUTPUT.read_text() == preservation.page(FOUND)


def test_the_bound_separates_rounding_from_wrong_models() -> None:
    rows = [row[tool] for row in FOUND["rows"].values() for tool in preservation.TOOLS]
    assert max(row.get("rounding", 0.0) for row in rows) < BOUND / 10
    assert min(row["change"] for row in rows if outcome(row) == "WRONG") > 10 * BOUND


def test_ours_is_exact_and_smooths_every_model() -> None:
    assert {outcome(row["ours"]) for row in FOUND["rows"].values()} == {"exact"}


def test_every_wrong_model_was_examined() -> None:
    """llm-compressor with the mappings that we wrote is exact: what is wrong is what the inferred ones overlook."""
    wrong = {name for name, row in FOUND["rows"].items() if outcome(row["theirs"]) == "WRONG"}
    assert wrong == preservation.OVERLOOKED.keys()
    assert {outcome(row) for row in FOUND["corrected"].values()} == {"exact"}


def test_a_forgotten_reader_is_seen() -> None:
    """A norm halved and one of its readers doubled, then all of them."""
    model, ids = tiny_architectures.build("llama"), {"input_ids": tiny_architectures.tokens(5)}
    before, weights = (
        smoothing_only.logits(model, ids),
        {k: v.clone() for k, v in smoothing_only.matrices(model).items()},
    )
    assert smoothing_only.share_of_changed(weights, smoothing_only.matrices(model)) == 0
    block = model.model.layers[0]
    with torch.no_grad():
        block.post_attention_layernorm.weight /= 2
        block.mlp.gate_proj.weight *= 2
    assert smoothing_only.change(before, smoothing_only.logits(model, ids)) > BOUND
    with torch.no_grad():
        block.mlp.up_proj.weight *= 2
    assert smoothing_only.change(before, smoothing_only.logits(model, ids)) == 0  # powers of two
    changed = block.mlp.gate_proj.weight.numel() + block.mlp.up_proj.weight.numel()
    share = smoothing_only.share_of_changed(weights, smoothing_only.matrices(model))
    assert share == changed / sum(weight.numel() for weight in weights.values())


@pytest.mark.parametrize(("name", "expected"), [("llama", "dense"), ("mixtral", "experts"), ("jamba", "hybrid")])
def test_kinds(name: str, expected: str) -> None:
    assert preservation.kind(tiny_architectures.build(name)) == expected


def test_a_crash_and_a_late_answer_are_rows(tmp_path) -> None:
    def late() -> dict[str, object]:
        import time

        time.sleep(60)
        return {}

    assert smoothing_only.in_a_process(lambda: {"change": 0.0}, 60, tmp_path) == {"change": 0.0}
    (tmp_path / "row.json").unlink()
    assert "ended with" in smoothing_only.in_a_process(lambda: {"change": 1 / 0}, 60, tmp_path)["error"]
    assert "no answer" in smoothing_only.in_a_process(late, 0.5, tmp_path)["error"]
