"""Run the plugin's CUDA code on a CPU, with vLLM's Python code for CUDA and stubs for the compiled operators.

    python tests/helpers/cuda_stubs.py            the installed vLLM; PYTHONPATH=FOLDER selects another
    python tests/helpers/cuda_stubs.py --quick    weights per channel only

vLLM runs as on a GPU of compute capability 9.0. Its compiled modules are empty, and the five operators that our code
calls are plain torch with the rounding of int8.py. This checks that all imports exist, that vLLM's layers, parameters,
loaders and kernel classes take our calls and use the layouts that we expect, and that every scheme gives the
reference's result, compiled and eager. It checks nothing that a GPU does.

Prints one line per fact. The exit status is 1 if a fact does not hold. tests/test_cuda.py runs it against the installed
vLLM, packaging/check_vllm.py against CUDA wheels.
"""

import importlib.abc
import importlib.machinery
import itertools
import os
import re
import sys
import tempfile
import types
from typing import Any

import torch

DTYPE = torch.bfloat16

TOKENS = 9


class CompiledModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """vLLM's compiled extensions, empty: vllm._C, vllm._moe_C, vllm.vllm_flash_attn._vllm_fa2_C, ..."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if re.fullmatch(r"vllm\.(.*\.)?_\w*C(_\w+)?", name) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def register_stubs() -> list[torch.library.Library]:
    """Register the operators, before vLLM is imported. They exist as long as the returned libraries."""
    from vllm_smoothquant.format import int8
    from vllm_smoothquant.kernels import ops

    def static(result: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None) -> None:
        result.copy_(int8.quantize(x, scale))

    def dynamic(result: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None) -> None:
        scale.copy_(int8.input_scale(x, "token"))
        result.copy_(int8.quantize(x, scale))

    def multiply(
        out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor, bias: Any
    ) -> None:
        # The assertions of the CUDA source.
        assert a.stride(1) == 1, a.stride()
        assert b.stride(0) == 1, b.stride()
        assert b.shape[0] % 16 == 0, b.shape
        assert b.shape[1] % 16 == 0, b.shape
        assert sa.numel() in (1, a.shape[0]), sa.shape
        assert sb.numel() in (1, b.shape[1]), sb.shape
        assert sa.is_contiguous(), sa.stride()
        assert sb.is_contiguous(), sb.stride()
        out.copy_(triton(a, b, sa, sb, out.dtype, bias))

    def triton(a: torch.Tensor, b: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor, dtype: Any, bias: Any) -> Any:
        y = int8.int8_matmul(a, b.t()) * sa.reshape(-1, 1).double() * sb.reshape(1, -1).double()
        return (y if bias is None else y + bias.double()).to(dtype)

    def per_token(x: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = int8.input_scale(x.float() * inverse, "token")
        return int8.quantize(x.float() * inverse, scale), scale

    compiled = torch.library.Library("_C", "FRAGMENT")
    compiled.define("static_scaled_int8_quant(Tensor! result, Tensor input, Tensor scale, Tensor? azp) -> ()")
    compiled.define("dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()")
    compiled.define("cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor sa, Tensor sb, Tensor? bias) -> ()")
    for name, function in (
        ("static_scaled_int8_quant", static), ("dynamic_scaled_int8_quant", dynamic), ("cutlass_scaled_mm", multiply)
    ):  # fmt: skip
        compiled.impl(name, function, "CPU")
        compiled.impl(name, lambda *_: None, "Meta")
    for name in ("fp8", "block_fp8", "fp4"):
        # vLLM calls these when it is imported.
        compiled.define(f"cutlass_scaled_mm_supports_{name}(int capability) -> bool")
        compiled.impl(f"cutlass_scaled_mm_supports_{name}", lambda _: False, "CompositeExplicitAutograd")
    ours = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
    ours.impl("triton_int8_mm", triton, "CPU")
    ours.impl("quantize_per_token", per_token, "CPU")
    return [compiled, ours]


def pretend_cuda(capability: tuple[int, int] = (9, 0)) -> None:
    """Make vLLM's `current_platform` a CUDA one."""
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class Platform(NonNvmlCudaPlatform):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

        @classmethod
        def import_kernels(cls) -> None:
            pass

    vllm.platforms._current_platform = Platform()


def layer_of(
    scheme: Any, smoothed: bool, shape: tuple[int, int], dtype: torch.dtype = DTYPE, device: str = "cpu"
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """vLLM's linear layer "l" [out, in] on `device` with random weights, and its checkpoint tensors on the CPU."""
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vllm_smoothquant.config import SmoothQuantVllmConfig
    from vllm_smoothquant.format import int8
    from vllm_smoothquant.format.config import CheckpointConfig

    out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    names = frozenset(["l"]) if smoothed else frozenset()
    config = SmoothQuantVllmConfig(CheckpointConfig(scheme.weights, scheme.input_activations, smoothed=names))
    weight, scale = int8.quantize_weight(torch.randn(shape, generator=generator), scheme.weights.strategy)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    tensors = {"weight": weight, "weight_scale": scale, "bias": bias}
    if not scheme.input_activations.dynamic:
        tensors["input_scale"] = torch.tensor([0.03])
    if smoothed:
        tensors["smoothing_factor"] = torch.rand(in_features, generator=generator) * 3 + 0.3
    torch.set_default_dtype(dtype)  # as vLLM does while it builds and loads a model
    try:
        with torch.device(device):
            layer = ReplicatedLinear(
                in_features,
                out_features,
                bias=True,
                params_dtype=dtype,
                quant_config=config,
                prefix="l",
                return_bias=False,
            )
        for name, value in tensors.items():
            getattr(layer, name).weight_loader(getattr(layer, name), value)
        layer.quant_method.process_weights_after_loading(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    return layer, tensors


def check(failures: list[str], fact: str, holds: bool, detail: str = "") -> None:
    print(f"{'ok  ' if holds else 'FAIL'}  {fact}{': ' + detail if detail else ''}", flush=True)
    if not holds:
        failures.append(fact)


def run_schemes(failures: list[str], strategies: tuple[str, ...]) -> None:
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    from vllm_smoothquant.format import int8
    from vllm_smoothquant.format.config import InputActivations, Scheme, Weights

    activations = {
        "per_token": InputActivations("token", True),
        "per_tensor": InputActivations("tensor", True),
        "static": InputActivations("tensor", False),
    }
    x = torch.randn(TOKENS, 64, generator=torch.Generator().manual_seed(1)).to(DTYPE)
    x[2] = 0
    # The last two rows are padding of a CUDA graph, which holds arbitrary old values.
    padded = torch.cat([x, torch.full((1, 64), float("nan"), dtype=DTYPE), torch.full((1, 64), 3e38, dtype=DTYPE)])
    slots = torch.cat([torch.arange(TOKENS), torch.full((2,), -1)])
    for (label, activation), weights, smoothed, shape in itertools.product(
        activations.items(), strategies, (False, True), ((48, 64), (40, 64))
    ):
        scheme = Scheme(Weights(weights), activation)
        layer, tensors = layer_of(scheme, smoothed, shape)
        kernel = layer.quant_method.kernel
        expected = "triton" if shape[0] % 16 else "cutlass-tensor" if label == "per_tensor" else "vllm"
        reference = int8.linear_reference(
            x,
            tensors["weight"],
            tensors["weight_scale"],
            strategy=activation.strategy,
            input_scale_static=tensors.get("input_scale"),
            smoothing_factor=tensors.get("smoothing_factor"),
            bias=tensors["bias"],
        ).float()
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for mode, function in (("eager", layer), ("compiled", compiled)):
            with (
                torch.no_grad(),
                set_forward_context(None, VllmConfig(), num_tokens=len(padded), slot_mapping={"attention": slots}),
            ):
                y = function(padded)[:TOKENS].float()
            error = ((y - reference).abs().max() / reference.abs().max()).item()
            # bfloat16 rounds by 2**-9; x * (1 / f) is within 2**-23 of x / f, which may change an integer by one step.
            check(
                failures,
                f"{label}, weights per {weights}, {'smoothed' if smoothed else 'folded'}, {list(shape)}, {mode}",
                error < 2**-7 and kernel.name == expected,
                f"{kernel.name}, error {error:.1e}",
            )


def main() -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.meta_path.append(CompiledModules())
    libraries = register_stubs()
    import vllm

    pretend_cuda()
    import vllm_smoothquant

    vllm_smoothquant.register()
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    from vllm_smoothquant.format.config import Scheme
    from vllm_smoothquant.kernels import base, select

    failures: list[str] = []
    print(f"vLLM {vllm.__version__}, {vllm.__file__}")
    check(failures, "register() registers smoothquant", "smoothquant" in QUANTIZATION_METHODS)
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        run_schemes(failures, ("channel",) if "--quick" in sys.argv else ("channel", "tensor"))
        for capability in (75, 90):
            request = base.Request("l", Scheme(), True, DTYPE, "cuda", capability)
            chosen = type(select.select_kernel(request).kernel).__name__
            check(failures, f"capability {capability}: CUTLASS", chosen == "CutlassInt8ScaledMMLinearKernel", chosen)
    del libraries
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
