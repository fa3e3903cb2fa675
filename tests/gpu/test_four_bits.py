"""Layers with 4-bit weights on a GPU against the plain reference, through vLLM's own kernels."""

import pytest
import torch

from tests.gpu.test_layers import _one_rank, in_context, tokens  # noqa: F401 (_one_rank is a fixture of the module)
from vllm_smoothquant.format import int4
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Weights

SHAPE = (4096, 4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activations", [InputActivations(num_bits=16), InputActivations()], ids=["W4A16", "W4A8"])
@pytest.mark.parametrize("group_size", [128, 64, 32])
def test_a_layer_is_the_reference(group_size: int, activations: InputActivations, dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_smoothquant.config import SmoothQuantVllmConfig

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SHAPE, generator=generator) * 0.02
    scale = int4.group_scale(weight, group_size)
    q = int4.quantize(weight, scale)
    config = SmoothQuantVllmConfig(CheckpointConfig(Weights("group", group_size, num_bits=4), activations))
    torch.set_default_dtype(dtype)  # as vLLM does while it builds and loads a model
    try:
        with torch.device("cuda"):
            layer = ReplicatedLinear(
                SHAPE[1], SHAPE[0], bias=False, params_dtype=dtype, quant_config=config, prefix="l", return_bias=False
            )
        for name, value in (("weight_packed", int4.pack(q)), ("weight_scale", scale)):
            getattr(layer, name).weight_loader(getattr(layer, name), value)
        layer.quant_method.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.quant_method.kernel.name == "vllm-mixed-precision"
    for rows in (1, 16, 300):
        x = tokens(rows, SHAPE[1], dtype)
        y = in_context(layer, x.cuda()).cpu().float()
        expected = int4.linear_reference(x, q, scale, per_token=activations.rounded).float()
        # Real weights and products are rounded to 16 bits, and Marlin's INT8 scales to 8 bits within a group.
        size = x.float().abs() @ int4.dequantize(q, scale).abs().t()
        assert ((y - expected).abs() <= size * 2 * torch.finfo(dtype).eps + 1e-3).all()
        assert float((y - expected).norm() / expected.norm().clamp(min=1e-6)) < 0.02
