"""Tensors that do not belong to a layer are refused when they are loaded."""

import gc
import weakref
from typing import Any

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear
from vllm.model_executor.model_loader import reload

from tests.helpers import handmade_checkpoint
from tests.helpers.vllm_layers import IN, PREFIX, STATIC_SMOOTHED, build_layer, call_loaders, load, tensors
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Override, Weights
from vllm_smoothquant.format.errors import SmoothQuantError

NAN, INF = float("nan"), float("inf")

ONLY_Q = frozenset([f"{PREFIX}.q_proj"])


@pytest.mark.parametrize(
    "changes",
    [
        {"ignore": ONLY_Q},
        {"smoothed": ONLY_Q},
        {"overrides": {f"{PREFIX}.q_proj": Override(InputActivations("tensor", False))}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_shards_of_one_layer_must_agree(one_rank: None, changes: dict[str, Any]) -> None:
    with pytest.raises(SmoothQuantError) as caught:
        build_layer("qkv_proj", CheckpointConfig(**changes), torch.float32)
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
    shards = tensors("qkv_proj", STATIC_SMOOTHED)
    if value is None:
        del shards[1][tensor]
    else:
        shards[1][tensor] = value
    with pytest.raises(SmoothQuantError) as caught:
        load(layer, "qkv_proj", shards)
    assert str(caught.value).startswith(f"{PREFIX}.{message}")
    assert "\n" not in str(caught.value)


def test_a_layer_fused_in_the_checkpoint_takes_one_scale_for_all(one_rank: None) -> None:
    """Phi-3: the checkpoint has one scale, and vLLM's layer has three."""
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


@pytest.mark.parametrize(("layer_has_bias", "message"), [(True, "a tensor in"), (False, "none, because vLLM's layer")])
def test_a_bias_that_only_vllm_or_only_the_checkpoint_has(one_rank: None, layer_has_bias: bool, message: str) -> None:
    config = CheckpointConfig()
    layer = build_layer("o_proj", config, torch.float32)
    if not layer_has_bias:
        layer.bias = None
    names = {f"{PREFIX}.o_proj.{t}" for t in ("weight", "weight_scale", *([] if layer_has_bias else ["bias"]))}
    layer.quant_method.loading.tensors = frozenset(names)
    shards = tensors("o_proj", config)
    del shards[0]["bias"]
    with pytest.raises(SmoothQuantError, match=rf"o_proj\.bias: expected {message}"):
        load(layer, "o_proj", shards)


def test_a_name_that_no_layer_has(one_rank: None) -> None:
    config = CheckpointConfig(overrides={f"{PREFIX}.oproj": Override(InputActivations("tensor", True))})
    layer = build_layer("o_proj", config, torch.float32)
    with pytest.raises(SmoothQuantError, match=r"oproj: expected the name of a linear layer"):
        load(layer, "o_proj", tensors("o_proj", config))


def test_vllm_can_reload_the_weights_of_a_layer(one_rank: None) -> None:
    """reload_weights calls the same loaders again, here with weight scales that double the output."""
    layer = build_layer("qkv_proj", STATIC_SMOOTHED, torch.float32)
    reload.record_metadata_for_reloading(layer)
    shards = tensors("qkv_proj", STATIC_SMOOTHED)
    load(layer, "qkv_proj", shards)
    x = torch.randn(3, IN)
    product = layer(x)[0] - layer.bias
    for shard in shards:
        shard["weight_scale"] = shard["weight_scale"] * 2
    reload.initialize_layerwise_reload(layer)
    call_loaders(layer, "qkv_proj", shards)
    reload.finalize_layerwise_reload(layer, None)
    assert torch.allclose(layer(x)[0] - layer.bias, 2 * product, atol=1e-5)


def test_a_layer_is_freed_although_vllm_keeps_its_loaders(one_rank: None) -> None:
    layer = build_layer("qkv_proj", STATIC_SMOOTHED, torch.float32)
    reload.record_metadata_for_reloading(layer)
    load(layer, "qkv_proj", tensors("qkv_proj", STATIC_SMOOTHED))
    layer_ref = weakref.ref(layer)
    del layer
    gc.collect()
    assert layer_ref() is None
