"""Run the plugin's CUDA code on a CPU, with vLLM's Python code for CUDA and stand-ins for its compiled operators.

    python tests/helpers/cuda_stubs.py            the installed vLLM; PYTHONPATH=FOLDER selects another
    python tests/helpers/cuda_stubs.py --quick    weights per channel only

vLLM runs as on a GPU of compute capability 9.0. Its compiled modules are empty. The three compiled operators that our
code calls are written again in numpy, from vLLM's documentation and its CUDA source, whose checks they repeat. Triton
kernels, ours and vLLM's GEMM, run in Triton's interpreter. This checks that all imports exist, that vLLM's layers,
parameters, loaders and kernel classes take our calls and use the layouts that we expect, and that every scheme gives
the reference's result, compiled and eager. It checks nothing that a GPU does.

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

import numpy as np
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
    compiled = torch.library.Library("_C", "FRAGMENT")
    compiled.define("static_scaled_int8_quant(Tensor! result, Tensor input, Tensor scale, Tensor? azp) -> ()")
    compiled.define("dynamic_scaled_int8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor!? azp) -> ()")
    compiled.define("cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor sa, Tensor sb, Tensor? bias) -> ()")
    for function in (static_scaled_int8_quant, dynamic_scaled_int8_quant, cutlass_scaled_mm):
        compiled.impl(function.__name__, function, "CPU")
        compiled.impl(function.__name__, lambda *_: None, "Meta")
    for name in ("fp8", "block_fp8", "fp4"):
        # vLLM calls these when it is imported.
        compiled.define(f"cutlass_scaled_mm_supports_{name}(int capability) -> bool")
        compiled.impl(f"cutlass_scaled_mm_supports_{name}", lambda _: False, "CompositeExplicitAutograd")
    return [compiled]


# --- csrc/quantization/w8a8/int8/scaled_quant.cu ---------------------------------------------------------------------


def static_scaled_int8_quant(
    result: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None
) -> None:
    """result = x / scale, rounded half to even and saturated."""
    values = checked_input(result, x, azp)
    assert scale.shape.numel() == 1, scale.shape
    result.copy_(saturated(values / as_float32(scale).reshape(())))


def dynamic_scaled_int8_quant(
    result: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, azp: torch.Tensor | None
) -> None:
    """scale = absmax / 127 of each row, result = x * (127 / absmax). The maximum passes over NaN."""
    values = checked_input(result, x, azp)
    assert scale.is_contiguous(), scale.stride()
    assert scale.shape == (len(x), 1), scale.shape
    absmax = np.fmax.reduce(np.abs(values), axis=1, keepdims=True, initial=np.float32(0))
    as_float32(scale)[:] = absmax / np.float32(127)
    inverse = np.divide(np.float32(127), absmax, out=np.zeros_like(absmax), where=absmax != 0)
    result.copy_(saturated(values * inverse))


def checked_input(result: torch.Tensor, x: torch.Tensor, azp: torch.Tensor | None) -> np.ndarray:
    assert x.is_contiguous(), x.stride()
    assert result.is_contiguous(), result.stride()
    assert x.is_floating_point(), x.dtype
    assert (result.dtype, result.shape) == (torch.int8, x.shape), (result.dtype, result.shape)
    assert azp is None, "a zero point"
    assert len(x) > 0, "CUDA starts no grid without blocks, and a block quantises a row"
    return as_float32(x.float())


def as_float32(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.float32, tensor.dtype
    return tensor.detach().numpy()


def saturated(steps: np.ndarray) -> torch.Tensor:
    """As cvt.rni.sat.s8.f32, which makes NaN 0."""
    return torch.from_numpy(np.clip(np.rint(np.nan_to_num(steps)), -128, 127).astype(np.int8))


# --- csrc/quantization/w8a8/cutlass/{scaled_mm_entry.cu,Epilogues.md} ------------------------------------------------


def cutlass_scaled_mm(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, sa: torch.Tensor, sb: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """out = sa * (sb * (a @ b)) + bias, the product in integers and the rest in float32."""
    (rows, inner), columns = a.shape, b.shape[1]
    assert (a.dtype, b.dtype) == (torch.int8, torch.int8), (a.dtype, b.dtype)
    assert out.dtype in (torch.bfloat16, torch.float16), out.dtype
    assert (b.shape[0], out.shape) == (inner, (rows, columns)), (a.shape, b.shape, out.shape)
    assert rows > 0, "no rows"
    assert (a.stride(1), out.stride(1), b.stride(0)) == (1, 1, 1), (a.stride(), out.stride(), b.stride())
    assert out.stride(0) % 16 == 0, out.stride()
    assert b.stride(1) % 16 == 0, b.stride()
    assert sa.numel() in (1, rows), sa.shape
    assert sb.numel() in (1, columns), sb.shape
    assert sa.is_contiguous(), sa.stride()
    assert sb.is_contiguous(), sb.stride()
    sums = (a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)).astype(np.float32)
    y = as_float32(sa).reshape(-1, 1) * (as_float32(sb).reshape(1, -1) * sums)
    if bias is not None:
        assert (bias.dtype, bias.shape, bias.is_contiguous()) == (out.dtype, (columns,), True), bias
        y = y + as_float32(bias.detach().float())
    out.copy_(torch.from_numpy(y))


# --- vLLM ------------------------------------------------------------------------------------------------------------


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
    scheme: Any,
    smoothed: bool,
    shape: tuple[int, int],
    dtype: torch.dtype = DTYPE,
    device: str = "cpu",
    bias: bool = True,
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
    tensors = {"weight": weight, "weight_scale": scale}
    if bias:
        tensors["bias"] = torch.randn(out_features, generator=generator).to(dtype)
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
                bias=bias,
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
    from vllm_smoothquant.format.config import InputActivations, Scheme, Weights

    activations = {
        "per_token": InputActivations("token", True),
        "per_tensor": InputActivations("tensor", True),
        "static": InputActivations("tensor", False),
    }
    for (label, activation), weights, smoothed in itertools.product(activations.items(), strategies, (False, True)):
        scheme = Scheme(Weights(weights), activation)
        cutlass = "cutlass-tensor" if label == "per_tensor" else "vllm"
        # [out, in], dtype, compute capability, bias, whether to compile it too; the kernel.
        for shape, dtype, capability, bias, compiles, kernel in (
            ((48, 64), DTYPE, (9, 0), True, True, cutlass),
            ((48, 64), torch.float16, (7, 5), False, False, cutlass),
            ((40, 64), DTYPE, (9, 0), True, True, "triton"),
            ((48, 1000), DTYPE, (8, 0), False, False, "triton"),
            ((39, 33), torch.float16, (8, 9), True, False, "triton"),
            ((48, 64), torch.float32, (9, 0), True, False, "triton"),
            ((48, 64), DTYPE, (10, 0), True, False, "triton"),
        ):
            pretend_cuda(capability)
            layer, tensors = layer_of(scheme, smoothed, shape, dtype, bias=bias)
            torch.compiler.reset()
            functions = {"eager": layer}
            if compiles:
                functions["compiled"] = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
            for mode, function in functions.items():
                fault = fault_of(function, scheme, tensors, dtype)
                used = layer.quant_method.kernel.name
                what = f"{label}, weights per {weights}, {'smoothed' if smoothed else 'folded'}, {list(shape)}, {mode}"
                where = f"{str(dtype).removeprefix('torch.')}, capability {'.'.join(map(str, capability))}"
                detail = f"{used}, {fault or 'the reference'}"
                check(failures, f"{what}, {where}", fault is None and used == kernel, detail)
    pretend_cuda()


def fault_of(function: Any, scheme: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> str | None:
    """How the layer differs from the reference by more than rounding: tokens with padding, in another dtype, none."""
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    from tests.helpers.vllm_layers import tolerance
    from vllm_smoothquant.format import int8

    strategy, (out_features, in_features) = scheme.input_activations.strategy, tensors["weight"].shape
    x = torch.randn(TOKENS, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[2] = 0
    # The last two rows are padding of a CUDA graph, which holds arbitrary old values.
    padding = torch.tensor([float("nan"), 3e4], dtype=dtype).reshape(2, 1).expand(2, in_features)
    slots = torch.cat([torch.arange(TOKENS), torch.full((2,), -1)])
    reference = int8.linear_reference(
        x.float(),
        tensors["weight"],
        tensors["weight_scale"],
        strategy=strategy,
        input_scale_static=tensors.get("input_scale"),
        smoothing_factor=tensors.get("smoothing_factor"),
        bias=tensors.get("bias"),
    )
    channels = tensors | {"weight_scale": tensors["weight_scale"].reshape(-1, 1).expand(out_features, 1)}
    # The output is rounded once; vLLM 0.26's Triton GEMM rounds before it adds the bias, too.
    size = reference.abs() + tensors.get("bias", torch.zeros(1)).float().abs()
    bound = tolerance(x.float(), channels, strategy, reference) + torch.finfo(dtype).eps * size

    def run(rows: torch.Tensor) -> torch.Tensor:
        slot_mapping = {"attention": slots[: len(rows)]}
        with torch.no_grad(), set_forward_context(None, VllmConfig(), num_tokens=len(rows), slot_mapping=slot_mapping):
            return function(rows)

    for rows in (torch.cat([x, padding]), x.float() if dtype == DTYPE else x, x[:0]):
        try:
            y = run(rows)
        except Exception as error:  # whatever vLLM raises is the fault
            return f"{type(error).__name__} of {rows.dtype} {list(rows.shape)}: {str(error)[:200]}"
        excess = (y[:TOKENS].float() - reference[: len(y)]).abs() - bound[: len(y)]
        if y.dtype != rows.dtype or y.shape != (len(rows), out_features) or not (excess <= 0).all():
            worst = excess.max().item() if excess.numel() else 0
            return f"{y.dtype} {list(y.shape)} of {rows.dtype} {list(rows.shape)}, {worst:.1e} above the bound"
    return None


def main() -> int:
    from tests.helpers.triton_interpreter import import_gemm, interpret

    interpret()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    sys.meta_path.append(CompiledModules())
    libraries = register_stubs()
    import vllm

    pretend_cuda()
    import_gemm()
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
