"""benchmarks/simulated.py and benchmarks/field.py against plain references, without an engine."""

import json
import re

import pytest
import torch
from torch import nn

from benchmarks import accuracy, field, four_bits, simulated
from calibration.observation.observation import Observation
from calibration.options import ACTIVATIONS, Options
from calibration.pipeline import check_gate, observe_model
from calibration.smoothing.simulate import LayerScheme
from tests.helpers import tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import Scheme, Weights

SCHEME = Scheme(Weights("channel"), ACTIVATIONS["token"])


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outliers() -> torch.Tensor:
    """[1, 5, 8], input channel 3 a hundred times as loud as the others."""
    x = tensor(1, 5, 8)
    x[..., 3] *= 100
    return x


def layer(seed: int = 1) -> nn.Linear:
    module = nn.Linear(8, 4)
    module.load_state_dict({"weight": tensor(4, 8, seed=seed), "bias": tensor(4, seed=seed + 1)})
    return module


def round_by_hand(value: float, absmax: float) -> float:
    scale = absmax / 127
    return max(-128, min(127, round(value / scale))) * scale


@pytest.mark.parametrize("exponent", [0.0, 0.15, 1.0])
def test_crossquant_rounds_every_element_under_its_row_and_column(exponent: float) -> None:
    x = outliers()[0]
    got = simulated.cross_rounded(x, exponent)
    for i, row in enumerate(x):
        for j, value in enumerate(row):
            limit = float(row.abs().max()) ** exponent * float(x[:, j].abs().max()) ** (1 - exponent)
            # A value near a tie may be rounded the other way in double precision; none of these is.
            assert float(got[i, j]) == pytest.approx(round_by_hand(float(value), limit), rel=1e-5)


def test_crossquant_with_exponent_1_is_a_scale_per_token_and_keeps_zeros() -> None:
    x = outliers()[0]
    x[:, 5] = 0
    x[2] = 0
    per_token = torch.stack(
        [torch.tensor([round_by_hand(float(v), float(r.abs().max()) or 127) for v in r]) for r in x]
    )
    torch.testing.assert_close(simulated.cross_rounded(x, 1.0), per_token)
    small = simulated.cross_rounded(x, 0.15)
    assert torch.isfinite(small).all()
    assert not small[2].any()
    assert not small[:, 5].any()
    # What it is for: beside a channel of outliers, the others keep their values.
    quiet = x.abs() > 0
    quiet[:, 3] = False
    assert (small - x)[quiet].abs().max() < (per_token - x)[quiet].abs().max() / 4


def test_clipping_limits_the_largest_integer() -> None:
    got = simulated.clipped(torch.tensor([0.0, 0.5, 1.0, 9.0, -9.0]), 1.0)
    torch.testing.assert_close(got, torch.tensor([0, 64 / 127, 1, 1, -128 / 127]))


def test_rounded_layers_multiply_what_was_rounded() -> None:
    model, x = nn.Sequential(layer()), outliers()
    weight = torch.stack(
        [torch.tensor([round_by_hand(float(v), float(r.abs().max())) for v in r]) for r in model[0].weight.detach()]
    )
    with torch.no_grad(), simulated.rounded(model, {"0": lambda x: x / 2}):
        got = model(x)
    torch.testing.assert_close(got, x / 2 @ weight.t() + model[0].bias.detach())
    assert torch.equal(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))


class Model(nn.Module):
    """A layer, called with `input_ids`, which here are activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer()

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return self.layer(input_ids)


def test_the_range_chosen_has_the_smallest_error() -> None:
    model, batches = Model(), [tensor(1, 400, 8, seed=n) for n in (3, 4)]
    batches[0][0, 7] *= 30  # one token, whose range the others would pay for
    x = torch.cat([batch.flatten(0, 1) for batch in batches])

    def error(limit: float) -> float:
        return float(((simulated.clipped(x, limit) - x) @ model.layer.weight.detach().t()).square().sum())

    candidates = x.abs().amax(-1).quantile(torch.tensor(simulated.QUANTILES)).tolist()
    got = simulated.ranges(model, ["layer"], batches)["layer"]
    assert got == pytest.approx(min(candidates, key=error))
    assert error(got) <= error(candidates[0])
    del batches[0]
    assert simulated.ranges(model, ["layer"], batches)["layer"] > 0.5 * float(batches[0].abs().max())


def test_llm_int8_keeps_large_channels_exactly() -> None:
    """Channels above 6 in floating point; what is left is rounded per token and per output channel."""
    module, x = layer(), outliers()
    got = accuracy.llm_int8(LayerScheme(SCHEME), module, (x,), module(x))
    rest, weight = x[0].clone(), module.weight.detach()
    large = x[0].abs().amax(0) > 6
    assert large.tolist() == [False, False, False, True, False, False, False, False]
    rest[:, large] = 0
    kept = weight.clone()
    kept[:, large] = 0
    rounded = [
        torch.stack([torch.tensor([round_by_hand(float(v), float(r.abs().max())) for v in r]) for r in matrix])
        for matrix in (rest, kept)
    ]
    expected = rounded[0] @ rounded[1].t() + x[0][:, large] @ weight[:, large].t() + module.bias.detach()
    torch.testing.assert_close(got[0], expected, rtol=1e-4, atol=1e-4)


def test_the_share_of_channels_in_floating_point_is_counted() -> None:
    model, shares = Model(), list[float]()
    with simulated.counting(model, ["layer"], field.LARGE, shares):
        model(outliers(), False)
        model(torch.ones(1, 2, 8), False)
    assert shares == [1 / 8, 0]


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Observation, Options]:
    folder = tmp_path_factory.mktemp("field")
    tiny_checkpoints.save("llama", folder / "model")
    text = tiny_checkpoints.save_text(folder / "text.jsonl")
    options = Options(
        model=folder / "model", dataset=text, samples=8, seq_len=32, quiet=True, rotation="none", no_smoothing=True,
        output=folder / "int8",
    )  # fmt: skip
    return observe_model(options), options


def test_crossquants_factors_are_those_of_the_columns_and_change_no_function(observed) -> None:
    observation, options = observed
    plan = field.cross_plan(observation, options)
    assert set(plan.smoothing.runtime) == set(observation.layers)
    for name, factor in plan.smoothing.runtime.items():
        columns = observation.absmax[name]
        torch.testing.assert_close(factor, torch.where(columns > 0, columns, 1.0) ** (1 - field.CROSS))
        assert plan.input_ranges[name] == pytest.approx(float((columns / factor).max()))
    check_gate(observation, plan.smoothing)
    field.make(field.ROWS["CrossQuant, columns of the calibration"], options, None, None)
    # The reference computes what the files say: factors at run time, integers, a scale per token.
    ids = observation.samples.input_ids[:2]
    with torch.no_grad():
        exact = observation.model(ids, use_cache=False).logits
        got = load_reference(options.output)(ids, use_cache=False).logits
        with simulated.rounded(
            observation.model, {n: lambda x, n=n: divided(x, plan.smoothing.runtime[n]) for n in observation.layers}
        ):
            near = observation.model(ids, use_cache=False).logits
    # Weights are rounded in other places: the two are two roundings of one model.
    assert (got - exact).abs().mean() < 2 * (near - exact).abs().mean()


def divided(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    x = x / factor
    return simulated.cross_rounded(x, 1.0) * factor


def test_simulating_gives_every_kind_its_figures(observed) -> None:
    _, options = observed
    rows = {row: how.simulated for row, how in field.ROWS.items() if how.simulated}
    windows = [list(range(5, 37)), list(range(40, 72))]
    found = dict(field.simulate_rows(options, torch.float32, windows, rows))
    assert list(found) == list(rows)
    assert {row for row, figures in found.items() if "in_float" in figures} == {"LLM.int8()"}
    for figures in found.values():
        assert figures["kl_divergence"] > 0
        assert figures["kl_standard_error"] > 0
        assert abs(figures["perplexity_change"]) < 0.05


def test_the_page_has_what_was_measured_and_what_is_quoted() -> None:
    figures = json.loads(field.FIGURES.read_text())
    text = field.page(figures)
    for name in field.MODELS:
        rows = figures["models"].get(name, {})
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        titles = [
            t.partition(", ")[0] if t.startswith("LLM.int8()") else t
            for t in re.findall(r"^\| (.*?) \|", section, re.MULTILINE)[2:]
        ]
        assert set(titles) - {"floating point"} == set(rows) - {"floating point"} | set(field.quoted(name))


def test_every_quotation_names_a_row_of_its_page() -> None:
    for how in field.ROWS.values():
        assert how.accuracy in ("", *accuracy.ROWS)
        assert how.four_bits in ("", *four_bits.ROWS)
    assert field.quoted("no such model") == {}
