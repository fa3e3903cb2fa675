"""benchmarks/learned.py: what the page says of its figures."""

from typing import Any

import pytest

from benchmarks import learned


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [(-0.2, 0.05, True), (-0.2, 0.11, False), (-0.09, 0.001, False), (0.2, 0.01, False), (-0.1, 0.05, True)],
)
def test_the_margin_is_a_share_and_a_number_of_errors(change: float, error: float, expected: bool) -> None:
    assert learned.passes(change, error) is expected


def test_the_verdict_compares_with_the_best_row_that_was_not_learned():
    def row(kl: float, **more: Any) -> dict[str, Any]:
        return {"kl": [kl, 1.02 * kl], learned.OTHER: [kl, kl], **more}

    def rows(weak: float, strong: float) -> dict[str, Any]:
        more = {"rate": 0.03, "seconds": 1.0, "searched_kl": 1.0, "taken": True}
        return {
            "no smoothing": row(0.8), "alpha auto": row(1.0), "rotated, alpha auto": row(1.0),
            "alpha learned": row(weak, **more, start="alpha auto", learned_kl=0.9, rates={"0.1": 0.95, "0.01": 0.97}),
            "rotated, alpha learned": row(strong, **more, start="rotated, alpha auto", learned_kl=0.7, rates={}),
        }  # fmt: skip

    name = "a Qwen3 trained here"
    kept = {"taken": False, "start": "alpha auto", "rate": 0.03, "seconds": 1.0, "searched_kl": 1.0, "learned_kl": 1.2}
    schemes = {"W8A8": rows(0.1, 0.6), "W8A8 static": rows(0.1, 0.76)}
    schemes["W8A8 O3"] = {"alpha auto": row(1.0), "alpha learned": row(1.0, **kept)}
    text = learned.page({"machine": "here", "models": {name: schemes}})
    assert f"**It does in 1 of 3: {name} in W8A8.**" in text
    assert f"| {name} | W8A8 | rotated, alpha learned | no smoothing | -25.0% ± 0.2% | passes |" in text
    assert f"| {name} | W8A8 static | rotated, alpha learned | no smoothing | -5.0% ± 0.0% | fails |" in text
    assert "| W8A8 O3 | alpha learned | 1.01 ± 0.01 | as searched | | +20.0% | 1 s |" in text
    assert "| scheme | searched | 0.01 | 0.03 | 0.1 |" in text
    assert "| W8A8 | 1 | 0.97 | 0.9 | 0.95 |" in text
