"""The quantised layer inside vLLM against the plain reference, layer by layer.

These tests build vLLM's layers in this process. Weights for oneDNN are so small that its sums are exact on every CPU
(kernels/exact.py), because its code then runs on every CPU.
"""

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear

from tests.helpers import handmade_checkpoint
from tests.helpers.vllm_layers import (
    CASES,
    CPU_KERNELS,
    FUSED,
    IN,
    PREFIX,
    build_layer,
    force_kernel,
    join,
    load,
    tensors,
    tolerance,
)
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig, Weights
from vllm_smoothquant.format.errors import SmoothQuantError


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
        force_kernel(kernel, monkeypatch)
    config = CheckpointConfig(
        weights=Weights(weights),
        input_activations=handmade_checkpoint.ACTIVATIONS[activations],
        smoothed=frozenset(f"{PREFIX}.{shard}" for shard in FUSED[name][0]) if smoothed else frozenset(),
    )
    # oneDNN's pairs of products must fit 16 bits on a CPU without VNNI: 2 * 255 * 63 < 2**15.
    shards = tensors(name, config, limit=63 if kernel == "onednn" else 127)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as vLLM does while it builds and loads a model
    try:
        layer = build_layer(name, config, dtype)
        load(layer, name, shards)
    finally:
        torch.set_default_dtype(previous)
    assert kernel == "chosen" or layer.quant_method.kernel.name in CPU_KERNELS[kernel]

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(37, IN, generator=generator)
    x[:, 5] *= 30  # an outlier channel
    x[3] = 0  # a row of zeros: padding, or the output of a ReLU
    x = x.to(dtype)
    joined = join(shards, dtype)
    strategy = handmade_checkpoint.ACTIVATIONS[activations].strategy
    reference = int8.linear_reference(
        x,
        joined["weight"],
        joined["weight_scale"],
        strategy=strategy,
        input_scale_static=joined.get("input_scale"),
        smoothing_factor=joined.get("smoothing_factor"),
        bias=joined["bias"],
    )
    output, _ = layer(x)
    assert output.dtype == dtype
    error = (output.float() - reference.float()).abs()
    assert (error <= tolerance(x, joined, strategy, reference)).all()
    # Ties are rare, so most errors are much smaller; a wrong scheme exceeds this bound by orders of magnitude.
    if not (smoothed and dtype == torch.bfloat16):
        assert error.median() <= torch.finfo(dtype).eps * reference.abs().float().median()
    # A single token, for which some kernels have different code.
    if activations != "tensor":
        single, _ = layer(x[:1])
        assert torch.allclose(single, output[:1], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("activations", handmade_checkpoint.ACTIVATIONS)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_layer_compiles_without_a_graph_break(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, kernel: str, activations: str
) -> None:
    """torch.compile for any number of tokens; test_served_models.py tests the generated code."""
    force_kernel(kernel, monkeypatch)
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
def test_weights_are_stored_once(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, kernel: str, activations: str
) -> None:
    """The layer releases weights that oneDNN has packed; otherwise it has the only copy, one byte per weight."""
    force_kernel(kernel, monkeypatch)
    config = CheckpointConfig(input_activations=handmade_checkpoint.ACTIVATIONS[activations])
    layer = build_layer("o_proj", config, torch.float32)
    load(layer, "o_proj", tensors("o_proj", config, limit=63))
    matrices = [p for p in layer.parameters() if p.numel() == 80 * IN]
    # vLLM's AMX kernel packs in place.
    in_place = kernel != "onednn" or (layer.quant_method.kernel.name == "vllm" and torch.cpu._is_amx_tile_supported())
    assert [p.dtype for p in matrices] == ([torch.int8] if in_place else [])
    # The kernel has no copy either.
    copies = [v for v in vars(layer.quant_method.kernel).values() if isinstance(v, torch.Tensor)]
    assert all(v.numel() < 80 * IN for v in copies)


@pytest.mark.parametrize("smoothed", [False, True], ids=["folded", "smoothed"])
@pytest.mark.parametrize("activations", handmade_checkpoint.ACTIVATIONS)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_a_layer_takes_no_tokens(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, kernel: str, activations: str, smoothed: bool
) -> None:
    """An idle rank, or an output head without a token to sample: eager, compiled for it, compiled for some tokens."""
    layer = one_layer(kernel, activations, torch.bfloat16, monkeypatch, smoothed)
    nothing = torch.empty(0, IN, dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, dynamic=True, backend="aot_eager")
    for y in (
        layer(nothing)[0],
        layer(nothing[None])[0][0],
        compiled(nothing),
        compiled(torch.ones(3, IN, dtype=torch.bfloat16))[:0],
    ):
        assert y.shape == (0, 80)
    assert layer(nothing)[0].dtype == compiled(nothing).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activations", handmade_checkpoint.ACTIVATIONS)
@pytest.mark.parametrize("kernel", CPU_KERNELS)
def test_vllm_reads_the_device_and_the_weights_of_a_layer(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, kernel: str, activations: str, dtype: torch.dtype
) -> None:
    """LoRA asks for the device of a layer's weight. MLA multiplies an identity, which may have another dtype."""
    from vllm.lora.layers.utils import _get_lora_device
    from vllm.model_executor.layers.quantization.utils.quant_utils import get_and_maybe_dequant_weights

    layer = one_layer(kernel, activations, dtype, monkeypatch)
    assert _get_lora_device(layer) == torch.device("cpu")
    assert layer.weight.dtype == torch.int8
    if activations == "static":
        layer.input_scale.fill_(1 / 127)  # at which 1 is an integer
    (shard,) = tensors("o_proj", layer_config(activations), limit=63)
    expected = shard["weight"] * shard["weight_scale"]
    for asked in (torch.float32, torch.bfloat16):
        weights = get_and_maybe_dequant_weights(layer, out_dtype=asked)
        assert weights.dtype == asked
        # 127 * (1 / 127) rounds, and the output has the coarser of both dtypes.
        coarser = max(torch.finfo(asked).eps, torch.finfo(dtype).eps)
        torch.testing.assert_close(weights.float(), expected, rtol=2 * coarser, atol=0)


@pytest.mark.parametrize("activations", handmade_checkpoint.ACTIVATIONS)
def test_a_layer_wider_than_our_sums_is_the_reference(
    one_rank: None, monkeypatch: pytest.MonkeyPatch, activations: str
) -> None:
    """As wide as Nemotron-4-340B's down_proj. Inputs and weights have a sign in common, so the sums are long."""
    force_kernel("avx2", monkeypatch)
    config = CheckpointConfig(input_activations=handmade_checkpoint.ACTIVATIONS[activations])
    layer = vllm_linear.RowParallelLinear(
        73728, 16, False, params_dtype=torch.float32, quant_config=SmoothQuantVllmConfig(config), prefix="down_proj"
    )
    generator = torch.Generator().manual_seed(0)
    loaded = {
        "weight": torch.randint(-127, 128, (16, 73728), generator=generator, dtype=torch.int8),
        "weight_scale": torch.rand(16, 1, generator=generator),
    }
    loaded["weight"][0] = 127
    if activations == "static":
        loaded["input_scale"] = torch.tensor([0.01])
    for name, value in loaded.items():
        getattr(layer, name).weight_loader(getattr(layer, name), value)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.kernel.name == "float32-integers"
    x = torch.rand(3, 73728, generator=generator)
    x[0] = x.max()
    strategy = handmade_checkpoint.ACTIVATIONS[activations].strategy
    reference = int8.linear_reference(
        x.double(), *(loaded[n] for n in ("weight", "weight_scale")),
        strategy=strategy, input_scale_static=loaded.get("input_scale"),
    )  # fmt: skip
    # The exact sum becomes float32 and is scaled twice: three roundings.
    torch.testing.assert_close(layer(x)[0].double(), reference, rtol=3 * 2**-24, atol=0)


def layer_config(activations: str, smoothed: bool = False) -> CheckpointConfig:
    names = frozenset([f"{PREFIX}.o_proj"]) if smoothed else frozenset()
    return CheckpointConfig(input_activations=handmade_checkpoint.ACTIVATIONS[activations], smoothed=names)


def one_layer(
    kernel: str, activations: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, smoothed: bool = False
) -> torch.nn.Module:
    """o_proj [80, IN], loaded, served by `kernel`."""
    force_kernel(kernel, monkeypatch)
    config = layer_config(activations, smoothed)
    layer = build_layer("o_proj", config, dtype)
    load(layer, "o_proj", tensors("o_proj", config, limit=63))
    return layer


def test_ignored_layers_and_embeddings_keep_vllms_methods(one_rank: None) -> None:
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
