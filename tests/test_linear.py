"""The quantised layer inside vLLM against the plain reference, layer by layer.

These tests build vLLM's own layers in this process. Where the fast kernels of this CPU are exact, they are tested;
elsewhere weights stay within what oneDNN adds up correctly, so that its code runs everywhere (kernels/exact.py).
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
    allowed,
    ask_for,
    build_layer,
    load,
    tensors,
    whole,
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
