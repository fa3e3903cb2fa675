"""Where the oneDNN INT8 product reads the scales of the weights, and what it reads after a reload."""

import tempfile

import torch
from vllm import _custom_ops as ops
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.model_loader import reload

# 1. The operator: 64 products of 1 x 1, times the scale.
x, weight, scale = torch.ones(1, 64, dtype=torch.int8), torch.ones(64, 1, dtype=torch.int8), torch.ones(1)
handler = ops.create_onednn_scaled_mm(weight, scale, torch.float32, False, False)
for value in (1, 2):
    scale.fill_(value)
    out = ops.onednn_scaled_mm(handler, x, torch.empty(1, 1), torch.ones(1), None, None, None)
    print(f"the tensor contains {value}: {out.item():.0f}")

# 2. The layer, loaded and reloaded with the same tensors as by `reload_weights`: 64 products of 1 x 1, times 0.5.
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
GROUP = {
    "targets": ["Linear"],
    "weights": {**INT8, "strategy": "channel", "dynamic": False},
    "input_activations": {**INT8, "strategy": "token", "dynamic": True},
}
CONFIG = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"all": GROUP}}


def load(layer: torch.nn.Module) -> None:
    layer.weight.weight_loader(layer.weight, torch.ones(64, 64, dtype=torch.int8))
    layer.weight_scale.weight_loader(layer.weight_scale, torch.full((64, 1), 0.5))


with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
    init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
    ensure_model_parallel_initialized(1, 1)
    quantisation = CompressedTensorsConfig.from_config(CONFIG)
    layer = ReplicatedLinear(64, 64, bias=False, params_dtype=torch.float32, quant_config=quantisation, prefix="layer")
    reload.record_metadata_for_reloading(layer)
    load(layer)
    layer.quant_method.process_weights_after_loading(layer)
    print("loaded:  ", layer(torch.ones(1, 64))[0][0, :4].tolist())
    reload.initialize_layerwise_reload(layer)
    load(layer)
    reload.finalize_layerwise_reload(layer, None)
    print("scales:  ", layer.weight_scale[:4, 0].tolist())
    print("reloaded:", layer(torch.ones(1, 64))[0][0, :4].tolist())
