"""The 4-bit kernel that vLLM chooses on an x86 CPU with AVX2 only."""

import torch

torch.cpu._is_avx512_supported = lambda: False  # vLLM then loads its library for AVX2, vllm/_C_AVX2.abi3.so
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel  # noqa: E402
from vllm.scalar_type import scalar_types  # noqa: E402

config = MPLinearLayerConfig(
    full_weight_shape=(128, 64), partition_weight_shape=(128, 64), weight_type=scalar_types.uint4b8,
    act_type=torch.bfloat16, group_size=128, zero_points=False,
)  # fmt: skip
chosen = choose_mp_linear_kernel(config)
print(f"{chosen.__name__}.can_implement: {chosen.can_implement(config)}")
print(f"its operator is there: {hasattr(torch.ops._C, 'cpu_gemm_wna16')}")

# The tensors of compressed-tensors' pack-quantized format.
layer = torch.nn.Module()
layer.weight = torch.nn.Parameter(torch.zeros(64, 16, dtype=torch.int32), requires_grad=False)
layer.weight.input_dim = layer.weight.packed_dim = 1
layer.scale = torch.nn.Parameter(torch.ones(64, 1, dtype=torch.bfloat16), requires_grad=False)
layer.scale.output_dim = 0
kernel = chosen(config, w_q_param_name="weight", w_s_param_name="scale")
kernel.process_weights_after_loading(layer)
try:
    kernel.apply_weights(layer, torch.ones(1, 128, dtype=torch.bfloat16))
except AttributeError as error:
    print(f"AttributeError: {error}")
