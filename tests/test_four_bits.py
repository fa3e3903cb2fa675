"""4-bit weights: rounding, packing, our product, checkpoints, conversion, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import calibration.from_pretrained  # noqa: F401
from calibration.checkpoint.convert import convert
from calibration.checkpoint.verify import verify
from calibration.observation.observation import Observation
from calibration.options import Options
from calibration.pipeline import calibrate, observe_model
from calibration.rounding import gptq, nearest
from calibration.rounding.groups import schemes_of
from calibration.rounding.hessians import Hessians
from calibration.running.products import ExpertStack, Product
from tests.helpers import engine, tiny_checkpoints
from tests.helpers.reference import load_reference
from tests.helpers.vllm_layers import FUSED, IN, PREFIX, build_layer, compile_for, load
from vllm_smoothquant.format import int4
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import header_faults, read_headers, read_json, read_tensors
from vllm_smoothquant.kernels import base, build, four_bits, select
from vllm_smoothquant.linear import SmoothQuantLinearMethod
from vllm_smoothquant.loading import CheckedLoading

ACTIVATIONS = {"none": InputActivations(num_bits=16), "token": InputActivations()}


def scheme(group_size: int, activations: str) -> Scheme:
    return Scheme(Weights("group", group_size, num_bits=4), ACTIVATIONS[activations])


# --- rounding --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_packed_integers_are_unpacked(rows: int, words: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-8, 8, (rows, 8 * words), dtype=torch.int8, generator=generator)
    packed = int4.pack(integers)
    assert packed.dtype == torch.int32
    assert torch.equal(int4.unpack(packed), integers)
    word = int(packed[0, 0]) & 0xFFFFFFFF  # by the definition: the first input in the lowest bits, plus 8
    assert [(word >> 4 * k & 15) - 8 for k in range(8)] == integers[0, :8].tolist()


def test_a_weight_is_rounded_to_the_nearest_integer_of_its_group() -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    weight[1] = 0
    scale = int4.group_scale(weight, 32)
    q = int4.quantize(weight, scale)
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(scale[1], torch.ones(2))
    assert q.unflatten(1, (2, 32)).amin(-1)[[0, 2]].eq(-8).all()
    largest = weight.unflatten(1, (2, 32)).gather(2, weight.unflatten(1, (2, 32)).abs().argmax(-1, keepdim=True))
    assert torch.equal(scale[[0, 2]] > 0, largest[[0, 2], :, 0] < 0)
    assert (scale < 0).any()
    for row, column in ((0, 0), (2, 63)):
        assert int(q[row, column]) == round(float(weight[row, column] / scale[row, column // 32]))
    step = scale.abs().repeat_interleave(32, dim=1)
    unclipped = weight / scale.repeat_interleave(32, dim=1) <= 7  # 8 is none of the integers
    error = (int4.dequantize(q, scale) - weight).abs() / step
    assert (error[unclipped] <= 0.5 * (1 + 2**-6)).all()  # absmax / 8 in bfloat16
    assert (error <= 1 + 2**-6).all()


def test_the_best_scale_is_no_worse_than_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 128, generator=generator) ** 3  # long tails, which clipping helps
    importance = torch.rand(128, generator=generator) * 10

    def loss(scale: torch.Tensor) -> torch.Tensor:
        error = (int4.dequantize(int4.quantize(weight, scale), scale) - weight).square() * importance
        return error.unflatten(1, (2, 64)).sum(-1)

    scales = int4.group_scale(weight, 64), nearest.best_scale(weight, 64, importance)
    plain, best = map(loss, scales)
    same = scales[0].sign() == scales[1].sign()  # others were made positive, because they are larger than any that is
    assert same.float().mean() > 0.9
    assert (best <= plain)[same].all()
    assert best.sum() < 0.95 * plain.sum()
    assert best.sum() < 0.8 * loss(int4.group_scale(weight, 64, 8 / 7)).sum()  # the largest magnitude at 7


def test_the_sign_of_a_scale_gives_the_integer_more_to_the_larger_end() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(6)) * 0.02
    weight[:, 0], weight[:, 64] = 0.1, -0.1  # the largest weight of the first group is positive, of the second negative
    weight[5] = 0
    scale = nearest.best_scale(weight, 64)
    rows = [row for row in range(32) if row != 5]
    assert (scale[rows, 0] < 0).all()
    assert (scale[rows, 1] > 0).all()
    assert scale[5].tolist() == [1, 1]
    positive = nearest.best_scale(weight, 64, signed=False)
    errors = [(int4.dequantize(int4.quantize(weight, s), s) - weight).square().sum() for s in (scale, positive)]
    assert errors[0] < errors[1]


def test_no_negative_scale_is_the_largest() -> None:
    """Of one row whose largest weight is positive: it alone would have a negative scale."""
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(6)) * 0.02
    weight[2, 3] = 5.0
    scale = nearest.best_scale(weight, 32)
    assert scale.min() < 0
    assert -scale.min() <= scale.max()
    assert scale[2, 0] == nearest.best_scale(weight, 32, signed=False)[2, 0]
    assert (nearest.best_scale(weight.abs()[2:3], 32) > 0).all()


def test_scales_fit_into_the_16_bits_of_marlin() -> None:
    q = torch.randint(-8, 8, (4, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    q[1, 32:] = 0
    scale = torch.tensor([[0.01, -0.02], [0.01, 1.0], [-0.03, 0.02], [0.01, 0.01]])
    four_bits.bound_scales(int4.pack(q), scale)
    assert scale[1].tolist() == [pytest.approx(0.01), 0]  # a group of zeros: its 1 would leave 0.01 only 41 of 4096
    assert scale.count_nonzero() == 7
    four_bits.bound_scales(int4.pack(torch.zeros_like(q)), scale)
    assert not scale.any()
    with pytest.raises(SmoothQuantError, match="weight_scale: expected no negative scale above 7 times"):
        four_bits.bound_scales(int4.pack(q), torch.tensor([[0.01, -0.08], [0.01, 1.0], [0.01, 0.01], [0.01, 0.01]]))
    with pytest.raises(SmoothQuantError, match="weight_scale"):
        four_bits.bound_scales(int4.pack(q), -torch.ones(4, 2))


def test_gptq_lowers_the_error_of_the_output() -> None:
    generator = torch.Generator().manual_seed(2)
    mixing = torch.randn(128, 128, generator=generator)
    x = torch.randn(512, 128, generator=generator) @ mixing  # inputs that depend on each other
    weight = torch.randn(32, 128, generator=generator)
    scale = nearest.best_scale(weight, 32, x.square().mean(0))
    errors = {
        name: float(((int4.dequantize(q, scale) - weight) @ x.t()).norm())
        for name, q in (
            ("nearest", int4.quantize(weight, scale)),
            ("gptq", gptq.round_gptq(weight, x.t() @ x, scale)),
        )
    }
    assert errors["gptq"] < 0.75 * errors["nearest"]


def test_gptq_without_dependence_rounds_to_the_nearest() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    scale = int4.group_scale(weight, 32)
    assert torch.equal(gptq.round_gptq(weight, torch.diag(torch.rand(64) + 0.1), scale), int4.quantize(weight, scale))


def test_gptq_takes_inputs_that_are_always_zero() -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(4))
    x[:, 10:30] = 0
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    scale = int4.group_scale(weight, 32, 8 / 7)  # clips nothing
    q = gptq.round_gptq(weight, x.t() @ x, scale)
    assert ((int4.dequantize(q, scale) - weight)[:, 10:30].abs() <= scale.abs().amax() * 0.51).all()
    gptq.round_gptq(weight, torch.zeros(64, 64), scale)


def test_zero_points_cover_the_range_of_a_group() -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(8, 64, generator=generator) + torch.tensor([-3.0, -0.5, 0.0, 0.2, 1.0, 3.0, 9.0, 0.0])[:, None]
    weight[7] = 0
    scale, zero_point = nearest.best_zero_points(weight, 32)
    q = nearest.quantize(weight, scale, zero_point)
    unsigned = q.unflatten(1, (2, 32)) + zero_point[..., None]
    assert unsigned.min() == 0  # all of 4 unsigned bits, and nothing else
    assert unsigned.max() == 15
    assert torch.equal(scale, scale.bfloat16().float())
    assert torch.equal(zero_point, zero_point.round())
    assert not int4.dequantize(q, scale)[7].any()
    error = (int4.dequantize(q, scale) - weight).square().sum(1)
    plain = nearest.best_scale(weight, 32)
    symmetric = (int4.dequantize(int4.quantize(weight, plain), plain) - weight).square().sum(1)
    # All of one sign: 16 integers instead of 8 are half the step, a quarter of the squared error; 0.4 for the clipping.
    assert (error[[0, 5]] < 0.4 * symmetric[[0, 5]]).all()
    assert error.sum() < symmetric.sum()


def test_gptq_keeps_the_range_of_zero_points() -> None:
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(512, 128, generator=generator) @ torch.randn(128, 128, generator=generator)
    weight = torch.randn(32, 128, generator=generator) + 0.7
    hessian = x.t() @ x
    scale, zero_point = nearest.best_zero_points(weight, 32, hessian.diagonal())
    q = gptq.round_gptq(weight, hessian, scale, zero_point)
    unsigned = q.unflatten(1, (4, 32)) + zero_point[..., None]
    assert ((unsigned >= 0) & (unsigned <= 15)).all()

    def loss(integers: torch.Tensor) -> float:
        return float(((int4.dequantize(integers, scale) - weight) @ x.t()).norm())

    assert loss(q) < 0.75 * loss(nearest.quantize(weight, scale, zero_point))
    plain = nearest.best_scale(weight, 32, hessian.diagonal())
    middle = torch.full_like(plain, 8)
    assert torch.equal(gptq.round_gptq(weight, hessian, plain, middle), gptq.round_gptq(weight, hessian, plain))
    assert torch.equal(nearest.quantize(weight, plain, middle), int4.quantize(weight, plain))


def test_hessians_are_those_of_the_blocks_that_were_rounded_before(source: tuple[Path, Path]) -> None:
    """Block by block, and in passes of the whole model where blocks cannot run isolated."""
    model, text = source
    options = Options(
        model=str(model), output="o", dataset=str(text), samples=8, seq_len=32, quiet=True, rotation="none"
    )
    observation = observe_model(options)
    found = Hessians(observation, observation.layers)
    assert found.blocks is not None
    original: dict[str, torch.Tensor] = {}
    for number in range(2):
        inside = [name for name in observation.layers if f".layers.{number}." in name]
        expected = plain_hessians(observation, inside)
        for name, weight in original.items():  # what was rounded is what `found` was told, not the model's weights
            observation.model.get_submodule(name).get_parameter("weight").data.copy_(weight)
        for name in inside:
            assert torch.allclose(found.of(name), expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].max()))
        if number == 0:
            whole = Hessians(observation, observation.layers, max_bytes=1)
            whole.blocks = None
            assert all(torch.allclose(whole.of(name), expected[name], rtol=1e-4, atol=1e-3) for name in inside)
        for name in inside:
            weight = observation.model.get_submodule(name).get_parameter("weight")
            rounded = weight.detach() + torch.randn(weight.shape, generator=torch.Generator().manual_seed(6)) * 0.02
            found.round(name, rounded)
            original[name] = weight.detach().clone()
            weight.data.copy_(rounded)  # for the expected sums of the next block


def plain_hessians(observation: Observation, names: list[str]) -> dict[str, torch.Tensor]:
    """x^T x of the inputs of layers `names` in one pass over all samples."""
    sums: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2)
            sums[name] = x.t() @ x

        return hook

    handles = [observation.model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    with torch.no_grad():
        observation.model(input_ids=observation.samples.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return sums


# --- our product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", build.TARGETS)
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group_size", "in_features"), [(128, 384), (64, 192), (32, 96), (32, 32), (64, 64)])
def test_our_product_is_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    activations: str,
    dtype: torch.dtype,
    group_size: int,
    in_features: int,
) -> None:
    compile_for(target, monkeypatch)
    generator = torch.Generator().manual_seed(in_features)
    for out_features, tokens in ((1, 1), (7, 2), (21, 5), (64, 70), (5, 0)):
        weight = torch.randn(out_features, in_features, generator=generator)
        scale = int4.group_scale(weight, group_size)
        q = torch.randint(-8, 8, weight.shape, dtype=torch.int8, generator=generator)
        x = (torch.randn(tokens, in_features, generator=generator) * 3).to(dtype)
        bias = None if out_features == 7 else torch.randn(out_features, generator=generator).to(dtype)
        layer = torch.nn.Module()
        layer.weight_packed, layer.weight_scale = base.frozen(int4.pack(q)), base.frozen(scale)
        kernel = four_bits.Int4(base.Request("layer", scheme(group_size, activations), True, dtype, "cpu"))
        kernel.prepare(layer)
        y = kernel.apply(layer, x, bias)
        expected = int4.linear_reference(x, q, scale, per_token=activations == "token", bias=bias)
        assert y.dtype == dtype
        # Float32 sums of the products' sizes, then one rounding to x's dtype.
        size = x.float().abs() @ int4.dequantize(q, scale).abs().t()
        allowed = size * 2.0**-20 + expected.float().abs() * torch.finfo(dtype).eps + 2.0**-20
        assert ((y.float() - expected.float()).abs() <= allowed).all()


@pytest.mark.parametrize("target", build.TARGETS)
def test_sums_of_extreme_values_are_exact(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """All weights -8 or 7, all activations at the ends of their range: 16 bits hold the pairs of a group."""
    compile_for(target, monkeypatch)
    q = torch.full((2, 256), -8, dtype=torch.int8)
    q[1] = 7
    x = torch.ones(3, 256)
    x[1] = -1
    x[2, ::2] = -1
    layer = torch.nn.Module()
    layer.weight_packed, layer.weight_scale = base.frozen(int4.pack(q)), base.frozen(torch.ones(2, 2))
    kernel = four_bits.Int4(base.Request("layer", scheme(128, "token"), True, torch.float32, "cpu"))
    kernel.prepare(layer)
    step = torch.tensor(1 / 127)
    sums = torch.tensor([[-8.0 * 127 * 256, 7.0 * 127 * 256], [8.0 * 127 * 256, -7.0 * 127 * 256], [0.0, 0.0]])
    assert torch.equal(kernel.apply(layer, x, None), sums * step)


# --- vLLM's layers ---------------------------------------------------------------------------------------------------


def shard_tensors(name: str, group_size: int, smoothed: bool) -> list[dict[str, torch.Tensor]]:
    """As vllm_layers.tensors, with 4-bit weights."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(IN, generator=generator) * 3 + 0.3
    shards = []
    for rows in FUSED[name][1]:
        weight = torch.randn(rows, IN, generator=generator) * 0.1
        scale = int4.group_scale(weight, group_size)
        tensors = {"weight_packed": int4.pack(int4.quantize(weight, scale)), "weight_scale": scale}
        tensors["bias"] = torch.randn(rows, generator=generator)
        shards.append(tensors | ({"smoothing_factor": factor} if smoothed else {}))
    return shards


def layer_config(name: str, group_size: int, activations: str, smoothed: bool) -> CheckpointConfig:
    names = frozenset(f"{PREFIX}.{shard}" for shard in FUSED[name][0])
    found = scheme(group_size, activations)
    return CheckpointConfig(found.weights, found.input_activations, smoothed=names if smoothed else frozenset())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("smoothed", [False, True], ids=["folded", "smoothed"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("group_size", [64, 32])
@pytest.mark.parametrize("name", ["qkv_proj", "o_proj"])
def test_a_layer_is_the_reference(
    one_rank: None, name: str, group_size: int, activations: str, smoothed: bool, dtype: torch.dtype
) -> None:
    """By whatever kernel is chosen here: vLLM's own multiplies in bfloat16, in which the real weights are rounded."""
    shards = shard_tensors(name, group_size, smoothed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as vLLM does while it builds and loads a model
    try:
        layer = build_layer(name, layer_config(name, group_size, activations, smoothed), dtype)
        load(layer, name, shards)
    finally:
        torch.set_default_dtype(previous)
    x = torch.randn(37, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    joined = {key: torch.cat([shard[key] for shard in shards]) for key in ("weight_packed", "weight_scale", "bias")}
    q, scale = int4.unpack(joined["weight_packed"]), joined["weight_scale"]
    factor = shards[0].get("smoothing_factor")
    expected = int4.linear_reference(
        x, q, scale, per_token=activations == "token", smoothing_factor=factor, bias=joined["bias"].to(dtype)
    )
    output, _ = layer(x)
    assert output.dtype == dtype
    divided = x.float() if factor is None else x.float() / factor
    size = divided.abs() @ int4.dequantize(q, scale).abs().t()
    # A value on a tie is rounded to either side: one step of the input times a weight.
    ties = 2 * (divided.abs().amax(1, keepdim=True) / 127 * 8 * scale.abs().amax()) if activations == "token" else 0.0
    allowed = size * torch.finfo(dtype).eps * 2 + expected.float().abs() * torch.finfo(dtype).eps + ties + 1e-6
    error = (output.float() - expected.float()).abs()
    assert (error <= allowed).all()
    assert error.median() <= 0.5 * torch.finfo(dtype).eps * size.median()
    assert layer(x[:0])[0].shape == (0, len(q))


def test_a_layer_compiles_and_stores_its_weights_once(one_rank: None) -> None:
    layer = build_layer("o_proj", layer_config("o_proj", 32, "token", False), torch.float32)
    load(layer, "o_proj", shard_tensors("o_proj", 32, False))
    assert sum(p.nbytes for p in layer.parameters()) == 80 * IN // 2 + 80 * IN // 32 * 4 + 80 * 4
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(tokens, IN)
        assert torch.allclose(compiled(x), layer(x)[0], atol=1e-4)


def test_a_group_that_two_ranks_would_share_is_refused() -> None:
    config = scheme(64, "none")
    loading = CheckedLoading("model.down_proj", ["model.down_proj"], None, None, config.weights)
    method = SmoothQuantLinearMethod(loading, config, False, lambda: None)
    with pytest.raises(
        SmoothQuantError, match=r"down_proj: expected inputs of each rank in groups of 64.*got 96 inputs"
    ):
        method.create_weights(torch.nn.Module(), 96, [64], 192, 64, torch.float32, weight_loader=print)


def test_a_damaged_layer_is_refused(one_rank: None) -> None:
    config = layer_config("qkv_proj", 32, "none", False)

    def refused(change: dict[str, torch.Tensor | None], expected: str) -> None:
        shards = shard_tensors("qkv_proj", 32, False)
        for key, value in change.items():
            shards[1].pop(key)
            if value is not None:
                shards[1][key] = value
        with pytest.raises(SmoothQuantError, match=expected):
            load(build_layer("qkv_proj", config, torch.float32), "qkv_proj", shards)

    packed = shard_tensors("qkv_proj", 32, False)[1]["weight_packed"]
    refused({"weight_packed": None}, r"k_proj\.weight_packed: expected a tensor in the checkpoint")
    refused({"weight_packed": packed.long()}, r"k_proj\.weight_packed: expected torch.int32 \[32, 8\]")
    refused({"weight_packed": packed[:, :4]}, r"\[32, 8\], got torch.int32 \[32, 4\]")
    refused({"weight_scale": torch.zeros(32, 2)}, r"k_proj\.weight_scale: expected finite values other than zero")
    refused({"weight_scale": torch.ones(32, 1)}, r"k_proj\.weight_scale: expected torch.float32 \[32, 2\]")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("four-bits")


@pytest.fixture(scope="module")
def source(folder: Path) -> tuple[Path, Path]:
    return tiny_checkpoints.save("llama", folder / "llama"), tiny_checkpoints.save_text(folder / "text.txt")


@pytest.fixture(scope="module")
def experts(folder: Path, source: tuple[Path, Path]) -> Path:
    """A tiny mixture whose activations are rounded."""
    model = tiny_checkpoints.save("qwen3-moe", folder / "qwen3-moe")
    options = {"dataset": str(source[1]), "samples": 8, "seq_len": 32, "quiet": True, "rotation": "none"}
    calibrate(str(model), folder / "experts", bits=4, activations="token", group_size=32, **options)
    verdict = verify(folder / "experts", str(model))
    assert not verdict.faults, verdict.faults[0]
    return folder / "experts"


@pytest.fixture(scope="module")
def four_bit_experts(folder: Path, source: tuple[Path, Path]) -> tuple[Path, Path]:
    """(A tiny mixture whose experts have 4 bits, its source)."""
    model = tiny_checkpoints.save("qwen3-moe", folder / "qwen3-moe-4")
    options = {"dataset": str(source[1]), "samples": 8, "seq_len": 32, "quiet": True, "rotation": "none"}
    calibrate(str(model), folder / "experts-4", bits=4, group_size=32, **options)
    return folder / "experts-4", model


@pytest.fixture(scope="module")
def checkpoints(folder: Path, source: tuple[Path, Path]) -> dict[str, Path]:
    """Name -> a checkpoint of a tiny Llama."""
    options: dict[str, dict[str, object]] = {
        "W4A16": {},
        "W4A8": {"activations": "token", "group_size": 32},
        "nearest": {"rounding": "nearest", "group_size": 64, "alpha": "auto"},
        "mixed": {"max_fallback": 0.3, "quantize_lm_head": True, "alpha": 0.5},
        "narrow": {"rounding": "nearest", "group_size": 32},
    }
    model, text = source
    for name, changes in options.items():
        calibrate(
            str(model), folder / name, bits=4, dataset=str(text), samples=8, seq_len=32, quiet=True, rotation="none",
            **changes,
        )  # fmt: skip
    return {name: folder / name for name in options}


NAMES = ("W4A16", "W4A8", "nearest", "mixed")


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_sound_and_is_its_source(
    checkpoints: dict[str, Path], source: tuple[Path, Path], name: str
) -> None:
    verdict = verify(checkpoints[name], str(source[0]))
    assert not verdict.faults, verdict.faults[0]
    assert all(layer["error"] < 0.5 for layer in verdict.layers.values())


def test_gptq_under_strong_smoothing_is_not_taken_for_another_model(tmp_path: Path) -> None:
    """Divided by the smoothing factors, its corrections are longer than some rows of the source."""
    source = tiny_checkpoints.save("biogpt", tmp_path / "source")
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    options = {"dataset": str(text), "samples": 8, "seq_len": 32, "quiet": True}
    calibrate(str(source), tmp_path / "int4", bits=4, alpha=0.85, **options)
    verdict = verify(tmp_path / "int4", str(source))
    assert not verdict.faults, verdict.faults[0]


def test_rows_that_changed_places_are_noticed(
    checkpoints: dict[str, Path], source: tuple[Path, Path], tmp_path: Path
) -> None:
    """The file is sound; only the source shows that two rows of a layer belong to each other's outputs."""
    shutil.copytree(checkpoints["W4A16"], tmp_path / "swapped")
    tensors = dict(read_tensors(tmp_path / "swapped"))
    name = "model.layers.1.mlp.gate_proj"
    for key in (f"{name}.weight_packed", f"{name}.weight_scale"):
        tensors[key] = tensors[key].clone()
        tensors[key][[3, 7]] = tensors[key][[7, 3]]
    save_file(tensors, tmp_path / "swapped" / "model.safetensors", metadata={"format": "pt"})
    tiny_checkpoints.rehash(tmp_path / "swapped")
    assert not verify(tmp_path / "swapped").faults
    faults = [str(each) for each in verify(tmp_path / "swapped", str(source[0])).faults]
    assert [each for each in faults if name in each and "2 of 192 rows that are others" in each], faults


def test_experts_have_four_bits_and_are_their_source(
    four_bit_experts: tuple[Path, Path], experts: Path, tmp_path: Path
) -> None:
    folder, model = four_bit_experts
    verdict = verify(folder, str(model))
    assert not verdict.faults, verdict.faults[0]
    quantization = read_json(folder / "config.json")["quantization_config"]
    assert quantization["expert_weights"] == {"num_bits": 4, "strategy": "group", "group_size": 32}
    assert quantization["experts"]["num_bits"] == 16
    packed = [name for name in read_headers(folder) if ".experts." in name and name.endswith("weight_packed")]
    assert len(packed) == 2 * 4 * 3
    assert "eight_bits" not in read_json(folder / "smoothquant.json")
    rounded = read_json(experts / "config.json")["quantization_config"]
    assert (rounded["experts"]["num_bits"], rounded["expert_weights"]["num_bits"]) == (8, 4)
    convert(folder, tmp_path / "theirs", "compressed-tensors")
    convert(tmp_path / "theirs", tmp_path / "ours", "smoothquant")
    back = read_json(tmp_path / "ours/config.json")["quantization_config"]
    assert {key: back[key] for key in ("experts", "expert_weights")} == {
        key: quantization[key] for key in ("experts", "expert_weights")
    }
    tensors = dict(read_tensors(tmp_path / "ours"))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in read_tensors(folder))


def test_transformers_loads_experts_with_four_bits(four_bit_experts: tuple[Path, Path]) -> None:
    ids = torch.tensor([list(range(3, 40))])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(four_bit_experts[0], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, load_reference(four_bit_experts[0])(ids).logits)


def test_experts_share_one_group_size_or_keep_eight_bits() -> None:
    def groups(hidden: int, inner: int) -> set[tuple[int | None, str | None]]:
        model = torch.nn.Module()
        for name, shape in (("gate_up", (2 * inner, hidden)), ("down", (hidden, inner))):
            products = [Product({f"experts.{i}.{name}": torch.zeros(shape)}) for i in range(2)]
            model.add_module(name, ExpertStack(products))
        names = [f"{stack}.{i}.{stack}" for stack in ("gate_up", "down") for i in range(2)]
        found = schemes_of(model, names, scheme(128, "none"))
        return {(each.weights.group_size, reason) for each, reason in found.values()}

    assert groups(256, 192) == {(64, None)}
    assert groups(256, 48) == {(None, "48 or 256 inputs are not groups of 32")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": None}, "expert_weights: expected 4-bit weights, beside `experts`"),
        ({"expert_weights": {"num_bits": 8, "strategy": "channel"}}, "expert_weights: expected 4-bit weights"),
        (
            {"experts": {"num_bits": 8, "strategy": "tensor", "dynamic": True}},
            "experts: expected dynamic per_token",
        ),
        ({"expert_weights": None}, "experts: expected dynamic per_token activations"),
    ],
)
def test_a_configuration_of_experts_is_checked(
    four_bit_experts: tuple[Path, Path], change: dict[str, Any], message: str
) -> None:
    quantization = read_json(four_bit_experts[0] / "config.json")["quantization_config"] | change
    with pytest.raises(SmoothQuantError, match=message):
        CheckpointConfig.from_dict({key: value for key, value in quantization.items() if value is not None})


def test_experts_that_are_smoothed_at_run_time_are_a_fault(four_bit_experts: tuple[Path, Path]) -> None:
    """vLLM computes the experts of a block from one input: it has no parameter for such a factor."""
    quantization = read_json(four_bit_experts[0] / "config.json")["quantization_config"]
    name = "model.layers.0.mlp.experts.0.gate_proj"
    config = CheckpointConfig.from_dict(quantization | {"smoothed": [name]})
    faults = [str(fault) for fault in header_faults(config, read_headers(four_bit_experts[0]))]
    assert any(f"{name}.smoothing_factor: expected none" in fault for fault in faults), faults


def test_layers_get_the_groups_that_their_inputs_allow(checkpoints: dict[str, Path]) -> None:
    config = CheckpointConfig.from_dict(read_json(checkpoints["W4A16"] / "config.json")["quantization_config"])
    assert config.weights == Weights("group", 128, num_bits=4)
    assert not config.input_activations.rounded
    for name, (_, shape) in read_headers(checkpoints["W4A16"]).items():
        if name.endswith("weight_packed"):
            layer = name.removesuffix(".weight_packed")
            found = config.scheme(layer)
            assert found is not None
            assert 8 * shape[1] % (found.weights.group_size or 1) == 0
    mixed = CheckpointConfig.from_dict(read_json(checkpoints["mixed"] / "config.json")["quantization_config"])
    head = mixed.scheme("lm_head")
    assert head == Scheme()
    manifest = read_json(checkpoints["mixed"] / "smoothquant.json")
    assert manifest["eight_bits"] == {"lm_head": "it is the output head"}
    assert manifest["fallen_back"]


@pytest.mark.slow
def test_an_engine_serves_the_reference(
    checkpoints: dict[str, Path], experts: Path, four_bit_experts: tuple[Path, Path]
) -> None:
    prompts = [list(range(3, 60)), [5, 9, 200, 17]]
    folders = {name: checkpoints[name] for name in NAMES} | {"experts": experts, "W4A16 experts": four_bit_experts[0]}
    answers = engine.logprobs_of(list(folders.values()), prompts, vocabulary=True)
    for (name, folder), answer in zip(folders.items(), answers, strict=True):
        model = load_reference(folder)
        with torch.no_grad():
            expected = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in prompts]
        # Ties of W4A8's activations fall to either side, as in tests/test_end_to_end.py; others have no ties.
        limit = 1e-4 if name in ("W4A16", "nearest", "W4A16 experts") else 1e-2
        assert max(float((a - b).abs().max()) for a, b in zip(answer, expected, strict=True)) < limit, name


@pytest.mark.slow
def test_two_ranks_serve_the_reference(
    checkpoints: dict[str, Path], source: tuple[Path, Path], four_bit_experts: tuple[Path, Path]
) -> None:
    """Words and scales are split with the inputs of a row-parallel layer; each rank has half of the experts."""
    prompts, ranks = [list(range(3, 60)), [5, 9, 200, 17]], {"tensor_parallel_size": 2, "vocabulary": True}
    ranks["environment"] = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    for folder, arguments in ((checkpoints["narrow"], {}), (four_bit_experts[0], {"enable_expert_parallel": True})):
        answer = engine.logprobs(folder, prompts, **ranks, **arguments)
        model = load_reference(folder)
        with torch.no_grad():
            expected = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in prompts]
        assert max(float((a - b).abs().max()) for a, b in zip(answer, expected, strict=True)) < 1e-4


@pytest.mark.slow
def test_stock_vllm_serves_a_converted_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By the kernel that the plugin chooses, too. Where stock vLLM has none (AVX2), only the plugin serves 4 bits."""
    from vllm import _custom_ops  # noqa: F401  it loads the operators

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("this vLLM is built without its operator for 4 bits, cpu_gemm_wna16 (vLLM issue 55613)")
    convert(checkpoints["W4A16"], tmp_path / "theirs", "compressed-tensors")
    prompts, arguments = [list(range(3, 60))], {"vocabulary": True, "dtype": "bfloat16"}
    stock = engine.logprobs(tmp_path / "theirs", prompts, environment={"VLLM_PLUGINS": ""}, **arguments)
    ours = engine.logprobs(checkpoints["W4A16"], prompts, **arguments)
    assert torch.equal(stock[0], ours[0])


def test_weights_take_a_quarter_of_16_bits(checkpoints: dict[str, Path]) -> None:
    headers = read_headers(checkpoints["W4A16"])
    names = [n.removesuffix(".weight_packed") for n in headers if n.endswith("weight_packed")]
    elements = {n: headers[f"{n}.weight_packed"][1][0] * headers[f"{n}.weight_packed"][1][1] * 8 for n in names}
    groups = {n: headers[f"{n}.weight_scale"][1][0] * headers[f"{n}.weight_scale"][1][1] for n in names}
    assert sum(elements[n] / 2 + 4 * groups[n] for n in names) <= 0.29 * 2 * sum(elements.values())


@pytest.mark.parametrize("name", NAMES)
def test_transformers_computes_the_reference(checkpoints: dict[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        got = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32)(ids).logits
        expected = load_reference(checkpoints[name])(ids).logits
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["W4A16", "nearest", "mixed"])
def test_there_and_back_is_the_same_checkpoint(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    convert(checkpoints[name], tmp_path / "theirs", "compressed-tensors")
    theirs = read_json(tmp_path / "theirs" / "config.json")["quantization_config"]
    assert theirs["format"] == ("mixed-precision" if name == "mixed" else "pack-quantized")
    convert(tmp_path / "theirs", tmp_path / "ours", "smoothquant")
    before, after = (dict(read_tensors(path)) for path in (checkpoints[name], tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    schemes = [
        {layer: config.scheme(layer) for layer in read_json(path / "smoothquant.json")["quantized"]}
        for path in (checkpoints[name], tmp_path / "ours")
        if (config := CheckpointConfig.from_dict(read_json(path / "config.json")["quantization_config"]))
    ]
    assert schemes[0] == schemes[1]


def test_8_bit_activations_are_not_converted(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SmoothQuantError, match="which stock vLLM serves on Arm only"):
        convert(checkpoints["W4A8"], tmp_path / "theirs", "compressed-tensors")
    assert not (tmp_path / "theirs").exists()


def test_packed_weights_need_their_keys(checkpoints: dict[str, Path]) -> None:
    given = read_json(checkpoints["W4A16"] / "config.json")["quantization_config"]
    for key, value, expected in (
        ("weights", {"num_bits": 4, "strategy": "group"}, "and a group_size"),
        ("weights", {"num_bits": 8, "strategy": "group", "group_size": 128}, "8 bits with strategy channel"),
        ("weights", {"num_bits": 4, "strategy": "group", "group_size": 48}, "128 or 64 or 32"),
        ("weights", {"num_bits": 8, "strategy": "channel"}, "or of 16 bits with 4-bit weights"),
        ("input_activations", {"num_bits": 8, "strategy": "tensor", "dynamic": False}, "a dynamic scale per token"),
        ("input_activations", {"num_bits": 16, "strategy": "tensor", "dynamic": True}, "with activations of 16 bits"),
    ):
        with pytest.raises(SmoothQuantError, match=expected):
            CheckpointConfig.from_dict(given | {"overrides": {}, key: value})


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "--bits: expected 8 or 4"),
        ({"group_size": 128}, "--group-size: expected 4-bit weights, got 8 bits"),
        ({"rounding": "gptq"}, "--rounding: expected 4-bit weights"),
        ({"activations": "none"}, "--activations none: expected 4-bit weights"),
        ({"bits": 4, "group_size": 100}, "--group-size: expected 128 or 64 or 32"),
        ({"bits": 4, "level": "O1"}, "--level: expected 8-bit weights"),
        ({"bits": 4, "weights": "channel"}, "--weights: expected 8-bit weights"),
        ({"bits": 4, "activations": "static"}, "--activations: expected none or token with --bits 4"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, object], message: str) -> None:
    with pytest.raises(SmoothQuantError) as caught:
        Options(model="m", output="o", **options)
    assert message in str(caught.value)


def test_a_kernel_for_every_scheme_of_this_cpu() -> None:
    for activations in ACTIVATIONS:
        request = base.Request("layer", scheme(128, activations), True, torch.float32, "cpu")
        assert select.select_kernel(request).name == "int4"
    assert json.dumps(scheme(32, "none").weights.to_dict()) == '{"num_bits": 4, "strategy": "group", "group_size": 32}'


def test_a_model_without_a_layer_for_4_bits_is_refused_before_the_text_is_read(tmp_path: Path) -> None:
    model = tiny_checkpoints.save("gpt2", tmp_path / "gpt2")
    with pytest.raises(
        SmoothQuantError, match=r"--bits 4: expected a layer that can have 4 bits, got none: .*transpos"
    ):
        calibrate(str(model), tmp_path / "out", bits=4, dataset="no/such/text", quiet=True)


def test_layers_with_8_bits_are_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, text = tiny_checkpoints.save("bloom-tied", tmp_path / "m"), tiny_checkpoints.save_text(tmp_path / "t.txt")
    calibrate(str(model), tmp_path / "out", bits=4, dataset=str(text), samples=2, seq_len=32, rotation="none")
    assert "in 8 bits:\n    transformer.h.0.self_attention.query_key_value and 1 more: vLLM" in capfd.readouterr().err
