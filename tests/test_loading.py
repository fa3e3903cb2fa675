"""Tensors that do not belong to a layer are refused when they are loaded."""

from typing import Any

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear

from tests.helpers import handmade_checkpoint
from tests.helpers.vllm_layers import IN, PREFIX, STATIC_SMOOTHED, build_layer, load, tensors
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Weights
from vllm_smoothquant.format.errors import SmoothQuantError

# --- refusals --------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


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


@pytest.mark.parametrize(("has", "message"), [(True, "a tensor in the"), (False, "none, because vLLM's layer")])
def test_a_bias_vllm_would_lose_or_make_up(one_rank: None, has: bool, message: str) -> None:
    config = CheckpointConfig()
    layer = build_layer("o_proj", config, torch.float32)
    if not has:
        layer.bias = None
    names = {f"{PREFIX}.o_proj.{t}" for t in ("weight", "weight_scale", *([] if has else ["bias"]))}
    layer.quant_method.loading.tensors = frozenset(names)
    found = tensors("o_proj", config)
    del found[0]["bias"]
    with pytest.raises(SmoothQuantError, match=rf"o_proj\.bias: expected {message}"):
        load(layer, "o_proj", found)


def test_a_name_no_layer_has(one_rank: None) -> None:
    config = CheckpointConfig(overrides={f"{PREFIX}.oproj": InputActivations("tensor", True)})
    layer = build_layer("o_proj", config, torch.float32)
    with pytest.raises(SmoothQuantError, match=r"oproj: expected the name of a linear layer"):
        load(layer, "o_proj", tensors("o_proj", config))
