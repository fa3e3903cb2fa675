"""--budget-size: the bytes of the files, what falls back first, what is refused, and who shows it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from calibration.checkpoint.convert import convert
from calibration.checkpoint.verify import verify
from calibration.observation.observation import Observation
from calibration.options import Options
from calibration.pipeline import calibrate
from calibration.report.page import report
from calibration.smoothing import fallback, size
from calibration.smoothing.plan import Plan, make_plan
from tests.helpers import tiny_checkpoints
from tests.test_plan import observe
from vllm_smoothquant.format.config import CheckpointConfig, Scheme
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

BAD = "model.layers.1.mlp.down_proj"
SHARES = (0.35, 0.4, 0.47, 1.0)


def planned(observation: Observation, **options: object) -> Plan:
    return make_plan(observation, Options(bits=4, group_size=32, no_smoothing=True, quiet=True, **options))


def with_a_bad_layer(times: float) -> Observation:
    """A toy in which one input of a layer is small and its column large: the rest of its group has no steps left."""
    observation = observe("llama")
    mlp = observation.model.model.layers[1].mlp
    mlp.up_proj.weight.data[3::32] /= times
    mlp.down_proj.weight.data[:, 3::32] *= times
    return observation


def bytes_of(plan: Plan, observation: Observation) -> int:
    modules = {name: observation.model.get_submodule(name) for name in observation.layers}
    return sum(size.weight_bytes(module, plan.schemes.get(name)) for name, module in modules.items())


def test_a_layer_has_the_bytes_of_its_tensors() -> None:
    linear = torch.nn.Linear(128, 24, dtype=torch.bfloat16)
    four = Options(bits=4, group_size=32).scheme
    assert size.weight_bytes(linear, None) == 2 * 128 * 24
    assert size.weight_bytes(linear, Scheme()) == 128 * 24 + 4 * 24
    assert size.weight_bytes(linear, four) == 128 * 24 // 2 + 4 * 24 * 128 // 32
    static = Options(activations="static").scheme  # its input_scale is no weight
    assert size.weight_bytes(linear, static) == 128 * 24 + 4 * 24


# --- the choice ------------------------------------------------------------------------------------------------------


def test_the_bad_layer_gets_8_bits_first() -> None:
    observation = with_a_bad_layer(8.0)
    whole = size.in_16_bits(observation.model, observation.layers)
    down = observation.model.get_submodule(BAD)
    least = bytes_of(planned(observation), observation)
    more = size.weight_bytes(down, Scheme()) - size.weight_bytes(down, Options(bits=4, group_size=32).scheme)
    assert dict(planned(observation, budget_size=(least + more) / whole).fallbacks) == {BAD: fallback.EIGHT}
    assert BAD not in planned(observation, budget_size=(least + more - 1) / whole).fallbacks  # a byte less
    sound = observe("llama")
    assert BAD not in planned(sound, budget_size=(least + more) / whole).fallbacks


def test_the_order_is_the_gain_for_each_byte() -> None:
    """Against the definition: nothing that is left out, and would fit in its place, gains more for each byte."""
    observation = with_a_bad_layer(8.0)
    first = planned(observation)
    errors = fallback.block_errors(
        observation.model, observation.graph, first.layers(), observation.samples.input_ids[: fallback.SAMPLES]
    )
    cost = {
        names: sum(
            size.weight_bytes(observation.model.get_submodule(name), to) * sign
            for name in names
            for to, sign in ((Scheme(), 1), (first.schemes[name], -1))
        )
        for names in errors
    }
    gain = {names: (error - finer) / cost[names] for names, (error, finer) in errors.items()}
    assert all(finer < error / 2 for error, finer in errors.values())  # otherwise 8 bits are not what they get
    whole, least = size.in_16_bits(observation.model, observation.layers), bytes_of(first, observation)
    spent = 0
    for count, names in enumerate(sorted(errors, key=lambda names: -gain[names]), 1):
        spent += cost[names]
        plan = planned(observation, budget_size=(least + spent) / whole)
        chosen = {names for names in errors if set(names) <= plan.fallbacks.keys()}
        assert chosen == set(sorted(errors, key=lambda names: -gain[names])[:count])
        assert bytes_of(plan, observation) == least + spent
    assert len({round(value, 12) for value in gain.values()}) == len(gain)


def test_a_budget_of_everything_gives_8_bits_everywhere() -> None:
    observation = observe("llama")
    plan = planned(observation, budget_size=1.0)
    assert set(plan.fallbacks) == set(observation.layers)
    assert set(plan.schemes.values()) == {Scheme()}


def test_a_layer_that_8_bits_do_not_help_goes_to_floating_point() -> None:
    """One scale for each output channel is then worse than one for each group."""
    observation = with_a_bad_layer(1000.0)
    plan = planned(observation, budget_size=1.0)
    assert plan.fallbacks[BAD] == fallback.FLOAT
    assert BAD not in plan.schemes
    assert bytes_of(plan, observation) <= size.in_16_bits(observation.model, observation.layers)


@pytest.mark.parametrize("share", SHARES)
def test_layers_that_read_one_tensor_move_together_within_the_budget(share: float) -> None:
    observation = with_a_bad_layer(8.0)
    plan = planned(observation, budget_size=share)
    for layers in observation.graph.shared_input_groups:
        assert len({plan.fallbacks.get(name) for name in layers}) == 1
    assert bytes_of(plan, observation) <= share * size.in_16_bits(observation.model, observation.layers)


def test_a_budget_of_perplexity_may_need_less() -> None:
    observation = with_a_bad_layer(8.0)
    assert not planned(observation, budget_size=1.0, budget_ppl=10.0).fallbacks


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """Share -> a checkpoint of a tiny Llama in bfloat16."""
    root = tmp_path_factory.mktemp("size")
    get = tiny_checkpoints.checkpoints(root, torch.bfloat16, bits=4, group_size=32, alpha=0.5, rounding="nearest")
    return {share: get("llama", budget_size=share) for share in SHARES}


def stored(folder: Path) -> tuple[int, int]:
    """The bytes of all tensors of linear layers inside blocks that are weights or their scales; of 16 bits."""
    taken = whole = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                tensor = tensors.get_tensor(name)
                if "_proj.weight" in name:
                    taken += tensor.nbytes
                    elements = tensor.numel() * (8 if name.endswith("_packed") else 1)
                    whole += 0 if name.endswith("_scale") else 2 * elements
    return taken, whole


def test_the_files_keep_the_budget(made: dict[float, Path]) -> None:
    sizes = []
    for share, folder in made.items():
        taken, whole = stored(folder)
        record = json.loads((folder / MANIFEST).read_text())["size"]
        assert taken <= share * whole
        assert record == {"weights": taken, "in_16_bits": whole, "budget": int(round(share * whole, 6))}
        sizes.append(taken)
    assert sizes == sorted(set(sizes))  # a larger budget is used


@pytest.mark.parametrize("share", SHARES)
def test_verify_checks_the_size(made: dict[float, Path], share: float) -> None:
    verdict = verify(made[share], str(tiny_checkpoints.source(made[share])))
    assert not verdict.faults, verdict.faults[0]
    assert "the weights keep the size budget" in verdict.checked


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m["size"].update(weights=1), "size.weights: expected "),
        (lambda m: m["size"].update(in_16_bits=2.5), "size.in_16_bits: expected "),
        (lambda m: m["size"].update(budget=m["size"]["weights"] - 1), "size.budget: expected from "),
        (lambda m: m["size"].update(budget=True), "size: expected the bytes of weights, in_16_bits and budget"),
        (lambda m: m["size"].pop("budget"), "size: expected the bytes of"),
        (lambda m: m.update(size=[]), "size: expected the bytes of"),
        (lambda m: m.update(fallen_back=[]), "fallen_back: expected an object"),
        (lambda m: m["fallen_back"].update({"no.such.layer": "floating point"}), ""),
    ],
)
def test_a_wrong_size_is_a_fault(made: dict[float, Path], tmp_path: Path, change, expected: str) -> None:
    folder = Path(shutil.copytree(made[0.4], tmp_path / "copy"))
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    faults = list(map(str, verify(folder).faults))
    assert bool(faults) == bool(expected)
    assert expected in "".join(faults)


def test_the_report_and_the_card_show_the_size(made: dict[float, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    record = json.loads((made[0.4] / MANIFEST).read_text())["size"]
    share = f"{record['weights'] / record['in_16_bits']:.2%} of 16 bits"
    report(made[0.4], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"Size budget: the weights of the linear layers take {record['weights'] / 1e6:,.2f} MB of at most" in page
    assert share in page
    assert "changed the output of their block most for each byte" in page
    assert share in (made[0.4] / "README.md").read_text()


def test_the_files_say_which_layers_have_8_bits(made: dict[float, Path]) -> None:
    manifest = json.loads((made[0.4] / MANIFEST).read_text())
    config = CheckpointConfig.from_dict(json.loads((made[0.4] / "config.json").read_text())["quantization_config"])
    bits = {name: 0 if (s := config.scheme(name)) is None else s.weights.num_bits for name in manifest["quantized"]}
    assert {name for name, count in bits.items() if count == 8} == set(manifest["fallen_back"])
    assert set(bits.values()) == {4, 8}


def test_the_budget_survives_a_conversion_there_and_back(made: dict[float, Path], tmp_path: Path) -> None:
    """compressed-tensors keeps scales in another dtype; `verify`, which `convert` runs, counts ours again."""
    convert(made[0.4], tmp_path / "theirs", "compressed-tensors")
    convert(tmp_path / "theirs", tmp_path / "ours", "smoothquant")
    assert "the weights keep the size budget" in verify(tmp_path / "ours").checked


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 8, "budget_size": 0.6}, "--budget-size: expected 4-bit weights, got 8 bits"),
        ({"budget_size": 0.265}, "--budget-size: expected a share from 26.5625%, which 4 bits in groups of 128"),
        ({"budget_size": 0.3, "group_size": 32}, "a share from 31.2500%, which 4 bits in groups of 32 take, to 100 %"),
        ({"budget_size": 35.0}, "got 3500.0000%"),
        ({"budget_size": float("nan")}, "--budget-size: expected a share"),
        ({"budget_size": 0.35, "max_fallback": 0.1}, "--budget-size: expected no other limit, got --max-fallback"),
    ],
)
def test_a_budget_that_no_model_keeps_is_refused_at_once(options: dict[str, float], message: str) -> None:
    with pytest.raises(SmoothQuantError) as caught:
        Options(**({"model": "m", "output": "o", "bits": 4} | options))
    assert message in str(caught.value)


def test_a_budget_that_this_model_does_not_keep_is_refused_before_the_observation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head has 8 bits, so that the least is more than 4 bits; what the error says is enough."""
    model, text = tiny_checkpoints.save("llama", tmp_path / "m"), tiny_checkpoints.save_text(tmp_path / "t.jsonl")
    options = {"bits": 4, "dataset": str(text), "samples": 8, "seq_len": 32, "quiet": True, "rotation": "none"}
    options |= {"quantize_lm_head": True, "rounding": "nearest", "alpha": 0.5}
    with monkeypatch.context() as patch:
        patch.setattr("calibration.pipeline.observe", None)
        with pytest.raises(SmoothQuantError, match=r"--budget-size: expected at least [\d.]+%, which") as caught:
            calibrate(str(model), tmp_path / "out", budget_size=0.28, **options)
    assert not (tmp_path / "out").exists()
    least = float(str(caught.value).partition("at least ")[2].partition("%")[0]) / 100
    manifest = calibrate(str(model), tmp_path / "out", budget_size=least, **options)
    assert manifest["size"]["weights"] <= manifest["size"]["budget"]
    assert not manifest["fallen_back"]
