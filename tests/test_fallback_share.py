"""--max-fallback is counted exactly: 29 % of 100 layers are 29 layers, though 0.29 * 100 is below 29."""

from fractions import Fraction
from types import SimpleNamespace

import pytest

from calibration.options import _share
from calibration.smoothing import plan
from tests.test_plan import options


@pytest.fixture
def allowed(monkeypatch):
    """allowed(share, layers) -> how many layers may fall back."""
    counts = []
    stub = plan.Plan(None, {}, None, {}, {})
    monkeypatch.setattr(plan, "_plan", lambda *_: stub)
    monkeypatch.setattr(plan.Plan, "layers", lambda self: {})
    monkeypatch.setattr(plan.fallback, "rank_fallbacks", lambda observation, layers, most: counts.append(most) or ())

    def count(share: str, layers: int) -> int:
        plan.make_plan(
            SimpleNamespace(layers=range(layers), rotation=None),
            options("channel", "token", max_fallback=_share(share)),
        )
        return counts.pop()

    return count


@pytest.mark.parametrize("layers", [1, 7, 14, 100, 210, 1000, 1024])
def test_every_percentage_is_counted_exactly(layers, allowed):
    for tenths in range(1, 1001):
        exact = Fraction(tenths, 1000) * layers
        assert allowed(f"{tenths / 10}%", layers) == exact // 1, (tenths, layers)
        assert allowed(str(tenths / 1000), layers) == exact // 1, (tenths, layers)
