"""The plugin against the plain reading of the format: layer by layer, then whole models through vLLM's engine.

The unmarked tests build vLLM's own layers in this process. Where the fast kernels of this CPU are exact they are what
is tested; elsewhere weights stay within what oneDNN adds up right, so that its code runs everywhere (kernels.py).
"""

import ast
import functools
import gc
import logging
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear

import vllm_smoothquant
from tests.helpers import engine, handmade_checkpoint, tiny_architectures
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.kernels import base, build, cpu, exact, ops, select, timing

vllm = pytest.importorskip("vllm", reason="the plugin needs vLLM; `make venv` installs it")

IN = 64
# Fused layers as Llama has them: vLLM's name, its shards with their [out], and what vLLM calls each shard.
FUSED: dict[str, tuple[list[str], list[int], list[Any]]] = {
    "qkv_proj": (["q_proj", "k_proj", "v_proj"], [64, 32, 32], ["q", "k", "v"]),
    "gate_up_proj": (["gate_proj", "up_proj"], [48, 48], [0, 1]),
    "o_proj": (["o_proj"], [80], [None]),
}
PACKED = {name: shards for name, (shards, _, _) in FUSED.items()}
PREFIX = "model.layers.0"


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers ask for their place among the ranks: the only one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    store = tmp_path_factory.mktemp("ranks") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()


def build_layer(name: str, config: CheckpointConfig, dtype: torch.dtype) -> Any:
    """vLLM's layer `name` under our method, its weights not loaded yet."""
    quant_config = SmoothQuantVllmConfig(config)
    quant_config.packed_modules_mapping = PACKED
    kwargs = {"bias": True, "params_dtype": dtype, "quant_config": quant_config, "prefix": f"{PREFIX}.{name}"}
    if name == "qkv_proj":
        return vllm_linear.QKVParallelLinear(IN, 32, 2, 1, **kwargs)
    if name == "gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(IN, [48, 48], **kwargs)
    return vllm_linear.RowParallelLinear(IN, 80, **kwargs)


def tensors(name: str, config: CheckpointConfig, limit: int = 127) -> list[dict[str, torch.Tensor]]:
    """What a checkpoint holds for each shard of `name`, integers within +-limit. The input is shared, so its scales."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(IN, generator=generator) * 3 + 0.3
    found = []
    for shard, rows in zip(*FUSED[name][:2], strict=True):
        scheme = config.scheme(f"{PREFIX}.{shard}")
        assert scheme is not None
        shape = (rows, 1) if scheme.weights.strategy == "channel" else (1,)
        found.append(
            {
                "weight": torch.randint(-limit, limit + 1, (rows, IN), generator=generator, dtype=torch.int8),
                "weight_scale": torch.rand(shape, generator=generator) * 0.01 + 0.001,
                "bias": torch.randn(rows, generator=generator),
            }
        )
        if not scheme.input_activations.dynamic:
            found[-1]["input_scale"] = torch.tensor([0.043])
        if f"{PREFIX}.{shard}" in config.smoothed:
            found[-1]["smoothing_factor"] = factor
    return found


def load(layer: Any, name: str, found: list[dict[str, torch.Tensor]]) -> None:
    """As vLLM's models do it: one call a tensor, with the shard where the layer is fused."""
    for shard, loaded in zip(FUSED[name][2], found, strict=True):
        for tensor, value in loaded.items():
            param = getattr(layer, tensor)
            param.weight_loader(param, value, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)


def whole(found: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The shards as one layer, for linear_reference: scales per channel."""
    rows = [len(t["weight"]) for t in found]
    scales = [t["weight_scale"].reshape(-1, 1).expand(n, 1) for t, n in zip(found, rows, strict=True)]
    shared = {key: found[0][key] for key in ("input_scale", "smoothing_factor") if key in found[0]}
    return {
        "weight": torch.cat([t["weight"] for t in found]),
        "weight_scale": torch.cat(scales),
        "bias": torch.cat([t["bias"] for t in found]).to(dtype),
        **shared,
    }


def allowed(x: torch.Tensor, one: dict[str, torch.Tensor], strategy: str, reference: torch.Tensor) -> torch.Tensor:
    """How far a right kernel may be from the reference, [tokens, out].

    Kernels multiply by a reciprocal where the reference divides: both round, so x / s differs by some 2**-22 of itself,
    and a value that close to a half may round the other way. In 16 bits x / f is rounded to the model's dtype first,
    where the reference keeps float32: 2**-8 of itself. Each such value moves an output by one step of the input times
    its weight, at most 127 steps. The sums are exact; the result is rounded once to the output's dtype, and the bias
    addition before that in float32.
    """
    values = x.float() / one["smoothing_factor"] if "smoothing_factor" in one else x.float()
    scale = one["input_scale"] if "input_scale" in one else int8.input_scale(values, strategy)
    steps = values / scale
    coarse = "smoothing_factor" in one and x.dtype != torch.float32
    # A dynamic scale is measured on the rounded values, too.
    near = steps.abs() * (2.0**-7 if coarse else 2.0**-21)
    ties = ((steps - steps.floor() - 0.5).abs() <= near).sum(dim=1, keepdim=True)
    # A scale off by 2**-8 scales the whole output; one in float32 by 2**-23.
    relative = torch.finfo(x.dtype).eps * (2 if coarse else 1) + 2.0**-21
    magnitude = (steps.abs().clamp(max=128) @ one["weight"].float().abs().t()) * scale * one["weight_scale"].t()
    rounding = reference.float().abs() * relative + magnitude * (2.0**-8 if coarse else 2.0**-22)
    return ties * scale * 127 * one["weight_scale"].t() + rounding


# How to ask for a kernel of a CPU -> what it may be called.
CPU_KERNELS = {
    "onednn": ("vllm", "onednn-tensor"),
    "vnni": ("vnni",),
    "avx2": ("avx2",),
    "float32": ("float32-integers",),
}


def compile_for(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product in `target`'s instructions, whatever this CPU would choose; a CPU without them skips the test."""
    best = build.target()
    if best is None or list(build.TARGETS).index(target) < list(build.TARGETS).index(best):
        pytest.skip(f"this CPU has no {target}")  # every x86 CPU of the last ten years has AVX2
    monkeypatch.setattr(build, "target", lambda: target)
    monkeypatch.setattr(build, "int8_linear", functools.cache(build.int8_linear.__wrapped__))
    assert callable(build.int8_linear()), build.int8_linear()


def ask_for(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """kernel: a key of CPU_KERNELS, whatever this CPU would choose."""
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: kernel == "onednn")
    if kernel in build.TARGETS:
        compile_for(kernel, monkeypatch)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(timing, "slower_than", lambda *_: None)
    else:
        monkeypatch.setattr(build, "target", lambda: None)


CASES = [(w, a) for w in ("channel", "tensor") for a in handmade_checkpoint.ACTIVATIONS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("smoothed", [False, True], ids=["folded", "smoothed"])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize(("weights", "activations"), CASES, ids=lambda v: v)
@pytest.mark.parametrize("kernel", ["chosen", *CPU_KERNELS])
def test_a_layer_is_the_reference(
    one_rank: None,
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    weights: str,
    activations: str,
    name: str,
    smoothed: bool,
    dtype: torch.dtype,
) -> None:
    if kernel != "chosen":
        ask_for(kernel, monkeypatch)
    config = CheckpointConfig(
        weights=Weights(weights),
        input_activations=handmade_checkpoint.ACTIVATIONS[activations],
        smoothed=frozenset(f"{PREFIX}.{shard}" for shard in FUSED[name][0]) if smoothed else frozenset(),
    )
    # oneDNN's pairs of products must fit 16 bits on a CPU without VNNI: 2 * 255 * 63 < 2**15.
    found = tensors(name, config, limit=63 if kernel == "onednn" else 127)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as vLLM does while it builds and loads a model
    try:
        layer = build_layer(name, config, dtype)
        load(layer, name, found)
    finally:
        torch.set_default_dtype(previous)
    assert kernel == "chosen" or layer.quant_method.kernel.name in CPU_KERNELS[kernel]

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, IN, generator=generator)
    x[:, 5] *= 30  # an outlier channel
    x[3] = 0  # a row of zeros: padding, or everything below a ReLU
    x = x.to(dtype)
    one = whole(found, dtype)
    strategy = handmade_checkpoint.ACTIVATIONS[activations].strategy
    reference = int8.linear_reference(
        x,
        one["weight"],
        one["weight_scale"],
        strategy=strategy,
        input_scale_static=one.get("input_scale"),
        smoothing_factor=one.get("smoothing_factor"),
        bias=one["bias"],
    )
    output, _ = layer(x)
    assert output.dtype == dtype
    error = (output.float() - reference.float()).abs()
    assert (error <= allowed(x, one, strategy, reference)).all()
    # Ties are rare, so the bound above is a tight one for most tokens; a scheme gone wrong shows here by orders.
    if not (smoothed and dtype == torch.bfloat16):
        assert error.median() <= torch.finfo(dtype).eps * reference.abs().float().median()
    # One token alone, which some kernels treat apart.
    if activations != "tensor":
        single, _ = layer(x[:1])
        assert torch.allclose(single, output[:1], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("activations", handmade_checkpoint.ACTIVATIONS)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_layer_is_traced_whole(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, kernel: str, activations: str
) -> None:
    """torch.compile without a graph break, for any number of tokens; code generation is left to the engine test."""
    ask_for(kernel, monkeypatch)
    config = CheckpointConfig(
        input_activations=handmade_checkpoint.ACTIVATIONS[activations], smoothed=frozenset([f"{PREFIX}.o_proj"])
    )
    layer = build_layer("o_proj", config, torch.float32)
    load(layer, "o_proj", tensors("o_proj", config, limit=63))
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x = torch.randn(tokens, IN)
        assert torch.allclose(compiled(x), layer(x)[0], atol=1e-4)


@pytest.mark.parametrize("activations", handmade_checkpoint.ACTIVATIONS)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_weights_are_kept_once(one_rank: None, monkeypatch: pytest.MonkeyPatch, kernel: str, activations: str) -> None:
    """What oneDNN has packed, the layer lets go of; otherwise the layer's is the only one, a byte a weight."""
    ask_for(kernel, monkeypatch)
    config = CheckpointConfig(input_activations=handmade_checkpoint.ACTIVATIONS[activations])
    layer = build_layer("o_proj", config, torch.float32)
    load(layer, "o_proj", tensors("o_proj", config, limit=63))
    matrices = [p for p in layer.parameters() if p.numel() == 80 * IN]
    # vLLM's AMX kernel packs in place.
    in_place = kernel != "onednn" or (layer.quant_method.kernel.name == "vllm" and torch.cpu._is_amx_tile_supported())
    assert [p.dtype for p in matrices] == ([torch.int8] if in_place else [])
    # Nothing else in reach holds one either.
    held = [v for v in vars(layer.quant_method.kernel).values() if isinstance(v, torch.Tensor)]
    assert all(v.numel() < 80 * IN for v in held)


def test_ignored_layers_and_embeddings_stay_vllms(one_rank: None) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    config = CheckpointConfig(ignore=frozenset([f"{PREFIX}.o_proj", "lm_head"]))
    assert type(build_layer("o_proj", config, torch.float32).quant_method) is vllm_linear.UnquantizedLinearMethod
    quant_config = SmoothQuantVllmConfig(config)
    for cls in (VocabParallelEmbedding, ParallelLMHead):
        layer = cls(100, IN, quant_config=quant_config, prefix="lm_head")
        assert "Embedding" in type(layer.quant_method).__name__


@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_an_output_head_may_be_quantised(one_rank: None, weights: str) -> None:
    """100 rows, which vLLM pads to 128; padded rows must stay finite."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    config = CheckpointConfig(weights=Weights(weights))
    head = ParallelLMHead(
        100, IN, params_dtype=torch.float32, quant_config=SmoothQuantVllmConfig(config), prefix="lm_head"
    )
    generator = torch.Generator().manual_seed(0)
    weight, scale = int8.quantize_weight(torch.randn(100, IN, generator=generator), weights)
    head.weight.weight_loader(head.weight, weight)
    head.weight_scale.weight_loader(head.weight_scale, scale)
    head.quant_method.process_weights_after_loading(head)
    x = torch.randn(5, IN, generator=generator)
    y = head.quant_method.apply(head, x)
    assert y.shape == (5, 128)
    assert torch.allclose(y[:, :100], int8.linear_reference(x, weight, scale, strategy="token"), atol=1e-4)
    assert torch.isfinite(y).all()
    with pytest.raises(SmoothQuantError, match="one tied to the embeddings"):
        head.quant_method.tie_weights(head, head)


# --- operators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_operators_keep_their_word(dtype: torch.dtype, static: bool, bias: bool) -> None:
    from vllm import _custom_ops as vllm_ops

    gc.collect()  # other tests' handlers read a tensor as they go, which opcheck's fake mode would not let them
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-63, 64, (48, IN), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 1, generator=generator)
    handler = vllm_ops.create_onednn_scaled_mm(weight.t(), scale, dtype, False, False, 4)
    arguments = (
        torch.randn(5, IN, generator=generator).to(dtype),
        handler.handler_tensor,
        48,
        torch.tensor([0.02]) if static else None,
        torch.randn(48, generator=generator).to(dtype) if bias else None,
    )
    results = torch.library.opcheck(ops.onednn_tensor_int8, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    assert ops.onednn_tensor_int8(arguments[0][:0], *arguments[1:]).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 4, 16), (67, 13, 100), (131, 33, 2048)], ids=str)
@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_is_the_references(
    monkeypatch: pytest.MonkeyPatch, target: str, shape: tuple[int, int, int], scheme: str, dtype: torch.dtype
) -> None:
    """Every remainder of a tile, the extremes of int8, a bias; no more than the float32 of the scaling apart."""
    compile_for(target, monkeypatch)
    gc.collect()  # as in test_operators_keep_their_word
    tokens, out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    weight[0] = -128
    x[0] = -x[0].abs().max()
    weight_scale = torch.rand(out_features, generator=generator)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    static = torch.tensor([0.011]) if scheme == "static" else None
    arguments = (x, weight, weight_scale, weight.sum(1, dtype=torch.int32), static, bias, scheme == "token")
    y = ops.int8_linear(*arguments)
    assert y.dtype == dtype
    strategy = "token" if scheme == "token" else "tensor"
    reference = int8.linear_reference(
        x.double(), weight, weight_scale, strategy=strategy, input_scale_static=static, bias=bias.double()
    )
    # The sum becomes float32, is scaled twice and added to: four roundings, each 2**-24 of what it rounds. Then comes
    # that to the output's dtype, half a unit of its last place.
    size = (reference - bias).abs() + bias.abs()
    bound = 4 * 2**-24 * size + (torch.finfo(dtype).eps / 2 * y.double().abs() if dtype != torch.float32 else 0)
    assert ((y.double() - reference).abs() <= bound).all()
    results = torch.library.opcheck(ops.int8_linear, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_holds_the_longest_sums(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """2**16 times the extremes: 2**30 with a sign, nearly 2**31 inside the product."""
    compile_for(target, monkeypatch)
    x = torch.tensor([127.0, -128.0, 1.0]).reshape(3, 1).expand(3, build.MAX_IN_FEATURES).contiguous()
    weight = (
        torch.tensor([-128, 127, 1, -1, 0]).reshape(5, 1).expand(5, build.MAX_IN_FEATURES).to(torch.int8).contiguous()
    )
    one = torch.ones(5)
    y = ops.int8_linear(x, weight, one, weight.sum(1, dtype=torch.int32), one[:1], None, False)
    # float32 has 24 bits: the products are so round that none is lost but 127 * 127's last.
    assert torch.allclose(y.double(), x.double() @ weight.double().t(), rtol=2**-24, atol=0)


def test_our_product_takes_other_dtypes_through_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for("avx2", monkeypatch)
    weight = torch.randint(-128, 128, (5, 20), dtype=torch.int8)
    x, bias, sums = torch.randn(3, 20), torch.randn(5), weight.sum(1, dtype=torch.int32)
    for narrow in (x.half(), x.bfloat16()):  # a bfloat16 model with a bias in float32
        y = ops.int8_linear(narrow, weight, torch.ones(5), sums, None, bias, True)
        wide = ops.int8_linear(narrow.float(), weight, torch.ones(5), sums, None, bias, True)
        assert torch.equal(y, wide.to(narrow.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_keeps_nan_and_takes_no_tokens(
    monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype
) -> None:
    """A scale hides NaN from whoever reads integers: its row must show it, and no other row."""
    compile_for(target, monkeypatch)
    weight, weight_scale = torch.ones(3, 20, dtype=torch.int8), torch.ones(3)
    sums = weight.sum(1, dtype=torch.int32)
    x = torch.randn(4, 20).to(dtype)
    x[2, 7] = float("nan")
    for static, per_token, bad in ((None, True, [2]), (torch.ones(1), False, [2]), (None, False, [0, 1, 2, 3])):
        y = ops.int8_linear(x, weight, weight_scale, sums, static, None, per_token)
        assert y.isnan().all(dim=1).nonzero().flatten().tolist() == bad
        assert y.isnan().any(dim=1).sum() == len(bad)
    assert ops.int8_linear(x[:0], weight, weight_scale, sums, None, None, False).shape == (0, 3)


def test_the_product_compiles_for_cpus_that_are_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm import envs

    if build.target() is None:
        pytest.skip("the product is for x86")
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path))
    assert len({build.build(target) for target in build.TARGETS}) == len(build.TARGETS)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, one that fails, a CPU without AVX2: the next kernel, with the reason."""
    from vllm import envs

    compile_for("avx2", monkeypatch)
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path))
    fresh = build.int8_linear.__wrapped__
    request = base.Request("layer", TOKEN, True, torch.bfloat16, "cpu")
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: False)
    monkeypatch.setattr(build, "int8_linear", fresh)
    for compiler, said in ((str(tmp_path / "none"), "No such file"), ("false", "could not compile")):
        monkeypatch.setenv("CXX", compiler)
        reasons = dict(select.explain_kernels(request))
        assert said in (reasons["avx2"] or "")
        assert reasons["float32-integers"] is None
    assert list((tmp_path / "smoothquant").iterdir()) == []
    monkeypatch.delenv("CXX")
    assert callable(fresh())
    monkeypatch.setattr(build, "target", lambda: None)
    assert fresh() == "needs an x86 CPU with AVX2"


def test_a_product_that_adds_up_wrong_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As oneDNN's would be if it were ours: pairs of products clipped to 16 bits."""
    compile_for("avx2", monkeypatch)
    monkeypatch.setattr(exact, "compiled_is_exact", fresh := exact.compiled_is_exact.__wrapped__)
    request = base.Request("layer", TOKEN, True, torch.float32, "cpu")
    assert cpu.Avx2.rejects(request) is None

    def clips(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        products = x[:, None] * weight[None]
        return products.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1).sum(2)

    monkeypatch.setattr(exact, "int8_linear", clips)
    assert not fresh()
    assert "wrong sums" in (cpu.Avx2.rejects(request) or "")


def test_widened_products_are_integer_products() -> None:
    generator = torch.Generator().manual_seed(0)
    # Larger, then smaller: the second shares the first one's room. in = 1024 keeps every sum below 2**24.
    for out_features, in_features in ((64, 1024), (48, 32)):
        x = torch.randint(-128, 128, (5, in_features), generator=generator, dtype=torch.int8)
        weight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
        y = ops.widened_linear(x.float(), weight)
        assert torch.equal(y.double(), int8.int8_matmul(x, weight))
        results = torch.library.opcheck(ops.widened_linear, (x.float(), weight))
        assert set(results.values()) == {"SUCCESS"}, results


def test_the_dynamic_scale_is_the_references() -> None:
    x = torch.randn(7, 33)
    for value in (x, -x, x.bfloat16(), torch.zeros(2, 3)):
        assert torch.equal(ops.dynamic_tensor_scale(value), int8.input_scale(value, "tensor"))


# --- which kernel, and why -------------------------------------------------------------------------------------------

TOKEN, TENSOR, STATIC = (
    Scheme(input_activations=handmade_checkpoint.ACTIVATIONS[a]) for a in ("token", "tensor", "static")
)


@pytest.mark.parametrize(
    ("platform", "capability", "exact", "scheme", "served_by"),
    [
        ("cpu", None, True, TOKEN, "vllm"),
        ("cpu", None, True, TENSOR, "onednn-tensor"),
        ("cpu", None, True, STATIC, "onednn-tensor"),
        ("cpu", None, False, TOKEN, "avx2"),
        ("cpu", None, False, TENSOR, "avx2"),
        ("cpu", None, False, STATIC, "avx2"),
        ("cuda", 75, True, TOKEN, "vllm"),
        ("cuda", 90, True, STATIC, "vllm"),
        ("cuda", 90, True, TENSOR, "cutlass-tensor"),
        ("cuda", 100, True, TOKEN, "triton"),
        ("cuda", 120, True, STATIC, "triton"),
        ("cuda", 120, True, TENSOR, "triton"),
    ],
)
def test_the_first_kernel_that_serves(
    monkeypatch: pytest.MonkeyPatch, platform: str, capability: int | None, exact: bool, scheme: Scheme, served_by: str
) -> None:
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: exact)
    monkeypatch.setattr(build, "target", lambda: None if exact else "avx2")
    request = base.Request("layer", scheme, True, torch.bfloat16, platform, capability)
    reasons = select.explain_kernels(request)
    assert next(name for name, reason in reasons if reason is None) == served_by
    assert all(reason for name, reason in reasons[: [name for name, _ in reasons].index(served_by)])


@pytest.mark.parametrize(("scheme", "rival"), [(TOKEN, "vllm"), (TENSOR, "onednn-tensor"), (STATIC, "onednn-tensor")])
def test_vnni_serves_where_it_is_faster(monkeypatch: pytest.MonkeyPatch, scheme: Scheme, rival: str) -> None:
    """Nothing is run here: what a CPU with VNNI would find is said for it."""
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: True)
    monkeypatch.setattr(exact, "compiled_is_exact", lambda: True)
    monkeypatch.setattr(build, "target", lambda: "vnni")
    monkeypatch.setattr(build, "int8_linear", lambda: print)
    ratios = {1: 0.8, 16: 0.9, 256: 0.7}
    monkeypatch.setattr(timing, "_ratios", lambda kernel, other, request: ratios if other.name == rival else {})
    amx = False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    request = base.Request("layer", scheme, True, torch.bfloat16, "cpu")
    assert cpu.Vnni.rejects(request) is None
    ratios[16] = 1.1
    assert cpu.Vnni.rejects(request) == f"measured here: 1.10 of the time of {rival!r} at 16 tokens"
    assert next(name for name, reason in select.explain_kernels(request) if reason is None) == rival
    amx = True
    assert "AMX" in (cpu.Vnni.rejects(request) or "")


def test_a_race_finds_where_a_kernel_is_slower() -> None:
    """Two that sleep: one a little longer, but for 16 tokens much longer."""

    class Sleeps(cpu.Float32Integers):
        def prepare(self, layer: Any) -> None:
            layer.weight = None

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            time.sleep(0.002 if len(x) == 16 else 0.0005)
            return x

    class Longer(Sleeps):
        name = "longer"

        def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            time.sleep(0.001)
            return x

    request = base.Request("layer", TOKEN, True, torch.float32, "cpu")
    said = timing.slower_than(Sleeps, Longer, request)
    assert said is not None
    assert said.endswith("of the time of 'longer' at 16 tokens")
    assert timing.slower_than(Longer, Sleeps, request) != said


def test_no_kernel_is_an_error_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmoothQuantError, match="no kernels for platform 'other'"):
        select.select_kernel(base.Request("layer", TOKEN, True, torch.bfloat16, "other"))
    monkeypatch.setitem(select.CANDIDATES, "cuda", select.CANDIDATES["cuda"][:2])
    with pytest.raises(SmoothQuantError, match=r"vllm: .*; cutlass-tensor: writes float16 or bfloat16"):
        select.select_kernel(base.Request("layer", TENSOR, True, torch.float32, "cuda", 90))


@pytest.mark.parametrize("scheme", [TOKEN, TENSOR, STATIC])
def test_cutlass_gets_no_sizes_it_does_not_take(scheme: Scheme) -> None:
    request = base.Request("layer", scheme, True, torch.bfloat16, "cuda", 90, aligned=False)
    assert [name for name, reason in select.explain_kernels(request) if reason is None] == ["triton"]


# --- refusals --------------------------------------------------------------------------------------------------------

ONLY_Q = frozenset([f"{PREFIX}.q_proj"])


@pytest.mark.parametrize(
    "said",
    [
        {"ignore": ONLY_Q},
        {"smoothed": ONLY_Q},
        {"overrides": {f"{PREFIX}.q_proj": InputActivations("tensor", False)}},
    ],
    ids=lambda said: next(iter(said)),
)
def test_shards_of_one_layer_must_agree(one_rank: None, said: dict[str, Any]) -> None:
    with pytest.raises(SmoothQuantError) as caught:
        build_layer("qkv_proj", CheckpointConfig(**said), torch.float32)
    for name in ("qkv_proj", "q_proj", "k_proj", "v_proj"):
        assert name in str(caught.value)


STATIC_SMOOTHED = CheckpointConfig(
    input_activations=handmade_checkpoint.ACTIVATIONS["static"],
    smoothed=frozenset(f"{PREFIX}.{shard}" for shard in FUSED["qkv_proj"][0]),
)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("weight", None, "k_proj.weight: expected a tensor in the checkpoint, got none"),
        ("weight_scale", None, "k_proj.weight_scale: expected a tensor in the checkpoint, got none"),
        ("input_scale", None, "k_proj.input_scale: expected a tensor in the checkpoint, got none"),
        ("smoothing_factor", None, "k_proj.smoothing_factor: expected a tensor in the checkpoint, got none"),
        ("weight", torch.zeros(32, IN), "k_proj.weight: expected torch.int8 [32, 64], got torch.float32 [32, 64]"),
        (
            "weight",
            torch.zeros(64, IN, dtype=torch.int8),
            "k_proj.weight: expected torch.int8 [32, 64], got torch.int8",
        ),
        ("weight", torch.zeros(32, 1, dtype=torch.int8), "k_proj.weight: expected torch.int8 [32, 64], got torch.int8"),
        ("weight_scale", torch.ones(32), "k_proj.weight_scale: expected torch.float32 [32, 1], got torch.float32 [32]"),
        (
            "weight_scale",
            torch.ones(32, 1).half(),
            "k_proj.weight_scale: expected torch.float32 [32, 1], got torch.float16",
        ),
        ("weight_scale", torch.full((32, 1), NAN), "k_proj.weight_scale: expected finite values above zero, got nan"),
        ("weight_scale", torch.zeros(32, 1), "k_proj.weight_scale: expected finite values above zero, got 0.0"),
        ("weight_scale", torch.full((32, 1), -1.0), "k_proj.weight_scale: expected finite values above zero, got -1.0"),
        ("input_scale", torch.tensor([INF]), "k_proj.input_scale: expected finite values above zero, got inf"),
        (
            "input_scale",
            torch.tensor([0.044]),
            "k_proj.input_scale: expected the values of model.layers.0.q_proj.input",
        ),
        ("input_scale", torch.tensor(0.043), "k_proj.input_scale: expected torch.float32 [1], got torch.float32 []"),
        ("smoothing_factor", torch.zeros(IN), "k_proj.smoothing_factor: expected finite values above zero, got 0.0"),
        ("smoothing_factor", torch.ones(IN), "k_proj.smoothing_factor: expected the values of model.layers.0.q_proj"),
        ("smoothing_factor", torch.ones(1), "k_proj.smoothing_factor: expected torch.float32 [64], got torch.float32"),
    ],
)
def test_loading_refuses(one_rank: None, tensor: str, value: torch.Tensor | None, message: str) -> None:
    layer = build_layer("qkv_proj", STATIC_SMOOTHED, torch.float32)
    found = tensors("qkv_proj", STATIC_SMOOTHED)
    if value is None:
        del found[1][tensor]
    else:
        found[1][tensor] = value
    with pytest.raises(SmoothQuantError) as caught:
        load(layer, "qkv_proj", found)
    assert str(caught.value).startswith(f"{PREFIX}.{message}")
    assert "\n" not in str(caught.value)


def test_a_layer_fused_in_the_checkpoint_takes_one_scale_for_all(one_rank: None) -> None:
    """Phi-3 and its like: vLLM has three scales where the checkpoint has one."""
    config = CheckpointConfig(weights=Weights("tensor"), input_activations=handmade_checkpoint.ACTIVATIONS["static"])
    quant_config = SmoothQuantVllmConfig(config)
    quant_config.packed_modules_mapping = {"qkv_proj": ["qkv_proj"]}
    layer = vllm_linear.QKVParallelLinear(
        IN, 32, 2, 1, bias=False, params_dtype=torch.float32, quant_config=quant_config, prefix="a.qkv_proj"
    )
    weight, scale = int8.quantize_weight(torch.randn(128, IN), "tensor")
    static = torch.tensor([0.03])
    for name, value in (("weight", weight), ("weight_scale", scale), ("input_scale", static)):
        getattr(layer, name).weight_loader(getattr(layer, name), value)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, IN)
    expected = int8.linear_reference(x, weight, scale, strategy="tensor", input_scale_static=static)
    assert torch.allclose(layer(x)[0], expected, atol=1e-4)


@pytest.mark.parametrize(("has", "message"), [(True, "a tensor in the"), (False, "none: vLLM's layer")])
def test_a_bias_vllm_would_lose_or_make_up(one_rank: None, has: bool, message: str) -> None:
    config = CheckpointConfig()
    layer = build_layer("o_proj", config, torch.float32)
    if not has:
        layer.bias = None
    names = {f"{PREFIX}.o_proj.{t}" for t in ("weight", "weight_scale", *([] if has else ["bias"]))}
    layer.quant_method.config.tensors = frozenset(names)
    found = tensors("o_proj", config)
    del found[0]["bias"]
    with pytest.raises(SmoothQuantError, match=rf"o_proj\.bias: expected {message}"):
        load(layer, "o_proj", found)


def test_a_name_no_layer_has(one_rank: None) -> None:
    config = CheckpointConfig(overrides={f"{PREFIX}.oproj": InputActivations("tensor", True)})
    layer = build_layer("o_proj", config, torch.float32)
    with pytest.raises(SmoothQuantError, match=r"oproj: expected the name of a linear layer"):
        load(layer, "o_proj", tensors("o_proj", config))


# --- registration and configuration ----------------------------------------------------------------------------------


def test_registering_twice_is_once() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    vllm_smoothquant.register()
    vllm_smoothquant.register()
    assert QUANTIZATION_METHODS.count("smoothquant") == 1
    assert get_quantization_config("smoothquant") is SmoothQuantVllmConfig


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0"])
def test_another_vllm_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    monkeypatch.setattr("vllm.version.__version__", version)
    vllm_smoothquant.register()
    try:
        method = get_quantization_config("smoothquant")
        for use in (method, lambda: method.from_config({})):
            with pytest.raises(SmoothQuantError, match=rf"vllm: expected a version >=0.26,<0.34, got {version}"):
                use()
        # Everyone else's models: asked of every method, and answered.
        assert method.override_quantization_method({"quant_method": "gptq"}, None) is None
    finally:
        monkeypatch.undo()
        vllm_smoothquant.register()


def test_another_vllm_is_told_in_a_line_at_registration_even_if_nothing_in_it_is_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines: list[str] = []
    logger = logging.getLogger("vllm.smoothquant")
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr("vllm.version.__version__", "9.0")
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    vllm_smoothquant.register()
    assert lines[0] == "vllm-smoothquant is for vLLM >=0.26,<0.34, this is 9.0: SmoothQuant checkpoints are refused"
    assert len(lines) == 2


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1.dev12+gabcdef", "dev"])
def test_supported_versions_are_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    monkeypatch.setattr("vllm.version.__version__", version)
    vllm_smoothquant.register()
    assert get_quantization_config("smoothquant") is SmoothQuantVllmConfig


def test_names_follow_the_models_mapper() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = SmoothQuantVllmConfig(handmade_checkpoint.config("channel", "token"))
    config.tensors = frozenset(["model.layers.1.mlp.down_proj.weight"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model."}))
    assert config.config is not None
    assert set(config.config.overrides) == {"language_model.layers.1.mlp.down_proj"}
    assert "language_model.layers.0.mlp.down_proj" in config.config.smoothed
    assert config.config.ignore == {"lm_head", "language_model.layers.1.self_attn.o_proj"}
    assert config.tensors == {"language_model.layers.1.mlp.down_proj.weight"}


def test_the_config_reaches_workers_by_pickle() -> None:
    config = SmoothQuantVllmConfig.from_config(handmade_checkpoint.config("channel", "static").to_dict())
    assert pickle.loads(pickle.dumps(config)).config == config.config


def test_a_broken_file_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    quantization = handmade_checkpoint.config("channel", "token")
    found = handmade_checkpoint.tensors(quantization)
    del found["model.layers.0.self_attn.q_proj.weight_scale"]
    folder = handmade_checkpoint.write(tmp_path / "broken", quantization, found)
    config = SmoothQuantVllmConfig(quantization)
    with pytest.raises(SmoothQuantError, match=r"q_proj\.weight_scale: expected F32 \[256, 1\], got no such tensor"):
        config.maybe_update_config(str(folder))


# --- whole models ----------------------------------------------------------------------------------------------------


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, handmade_checkpoint.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def reference(folder: Path, ids: list[list[int]], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    from tests.helpers.reference import load_reference

    model = load_reference(folder, dtype)
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([p])).logits[0, :-1].float(), -1) for p in ids]


def distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "activations"), handmade_checkpoint.SCHEMES, ids=lambda v: v)
def test_an_engine_serves_the_reference(tmp_path: Path, weights: str, activations: str) -> None:
    """float32, all log-probabilities of every position.

    Attention and norms differ in the order of float32 sums: 1e-6 or so here, and that is what nearly every value shows.
    A value within 1e-6 of a rounding tie may go the other way and move the rest of its prompt a little, so the mean
    gets room for it: a third of what rounding the weights per tensor instead of per channel would do (0.14), a fiftieth
    of what another activation scheme does (2.6).
    """
    # One absmax couples the requests of a batch, and with them everything else vLLM batches: one prompt is one batch.
    ids = prompts((60,) if activations == "tensor" else (40, 7, 100))
    folder = handmade_checkpoint.checkpoint(tmp_path / "model", weights, activations)
    error = distance(engine.logprobs(folder, ids, vocabulary=True), reference(folder, ids))
    assert error.median() < 1e-4
    assert error.mean() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bloom", "gpt2", "phi3"])
def test_loaders_with_ways_of_their_own(tmp_path: Path, architecture: str) -> None:
    """BLOOM's reorders all of query_key_value (repack.py), GPT-2's transposes, Phi-3's layers come fused.

    Per tensor and static has the most scales to lose. Random models whose logits differ by 0.5; bounds as above.
    """
    ids = prompts((40, 7))
    ids = [[token % tiny_architectures.VOCAB for token in prompt] for prompt in ids]
    model = tiny_architectures.build_layer(architecture)
    if architecture == "bloom":
        # vLLM's loader knows no lm_head of its own.
        model.config.tie_word_embeddings = True
        model.tie_weights()
    folder = handmade_checkpoint.from_model(tmp_path / "model", model, "tensor", "static")
    expected = reference(folder, ids)
    served = [s[:, : e.shape[1]] for s, e in zip(engine.logprobs(folder, ids, vocabulary=True), expected, strict=True)]
    error = distance(served, expected)
    assert error.median() < 1e-4
    assert error.mean() < 0.01


@pytest.mark.slow
def test_an_engine_in_bfloat16_is_as_good_as_bfloat16(tmp_path: Path) -> None:
    """No further from the float32 reference than the reference's own bfloat16 is, but for a quarter of chance."""
    ids = prompts((40, 7, 100))
    folder = handmade_checkpoint.checkpoint(tmp_path / "model", "channel", "static")
    exact = reference(folder, ids)
    served = distance(engine.logprobs(folder, ids, vocabulary=True, dtype="bfloat16"), exact).mean()
    assert served < 1.25 * distance(reference(folder, ids, torch.bfloat16), exact).mean()


@pytest.mark.slow
def test_a_compiled_engine_serves_the_reference(tmp_path: Path) -> None:
    """torch.compile: both kinds of activations at once, since the overridden layer is dynamic. Bounds as above."""
    ids = prompts((40, 7, 100))
    folder = handmade_checkpoint.checkpoint(tmp_path / "model", "channel", "static")
    error = distance(engine.logprobs(folder, ids, vocabulary=True, enforce_eager=False), reference(folder, ids))
    assert error.median() < 1e-4
    assert error.mean() < 0.05


@pytest.mark.slow
def test_two_ranks_serve_the_reference(tmp_path: Path) -> None:
    """Tensor parallel: scales and smoothing factors cut along with their weights. Bounds as above.

    Static everywhere: two ranks measure two dynamic scales, each for its own half of a row, which is another rounding.
    """
    ids = prompts((40, 7, 100))
    folder = handmade_checkpoint.checkpoint(tmp_path / "model", "channel", "static", overrides={})
    served = engine.logprobs(
        folder,
        ids,
        vocabulary=True,
        tensor_parallel_size=2,
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
    )
    error = distance(served, reference(folder, ids))
    assert error.median() < 1e-4
    assert error.mean() < 0.05


@pytest.mark.slow
def test_an_engine_refuses_a_nan_in_one_line(tmp_path: Path) -> None:
    quantization = handmade_checkpoint.config("channel", "token")
    found = handmade_checkpoint.tensors(quantization)
    found["model.layers.1.mlp.up_proj.weight_scale"][3] = NAN
    folder = handmade_checkpoint.write(tmp_path / "model", quantization, found)
    with pytest.raises(engine.EngineFailedError) as caught:
        engine.logprobs(folder, [[1, 2]])
    line = (
        "model.layers.1.mlp.up_proj.weight_scale: expected finite values above zero, got nan; calibrate the model again"
    )
    assert any(written.endswith(line) for written in str(caught.value).splitlines())


@pytest.mark.slow
def test_an_engine_refuses_a_floating_point_model_in_one_line(tmp_path: Path) -> None:
    folder = handmade_checkpoint.write(tmp_path / "model", None, {"lm_head.weight": torch.zeros(2, 2)})
    with pytest.raises(engine.EngineFailedError) as caught:
        engine.logprobs(folder, [[1, 2]], quantization="smoothquant")
    assert f"run `smoothquant calibrate {folder} -o OUT` first, then serve OUT" in str(caught.value)
