"""Layers of every scheme on a GPU against the plain reference: eager, compiled and in CUDA graphs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import InputActivations, Scheme, Weights

ACTIVATIONS = {
    "token": InputActivations("token", dynamic=True),
    "tensor": InputActivations("tensor", dynamic=True),
    "static": InputActivations("tensor", dynamic=False),
}

# [out, in]: two sizes that CUTLASS supports, and two that it does not.
SHAPES = {"cutlass": (4096, 4096), "small": (48, 64), "odd out": (40, 64), "odd in": (48, 1000)}


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Initialise one rank, because vLLM's layers need the distributed groups."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with set_current_vllm_config(VllmConfig()), torch.no_grad():
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('ranks') / 'store'}", 0, backend="nccl")
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()


def tokens(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 30  # an outlier channel
    x[rows // 2 : rows // 2 + rows // 16] = 0
    return x.to(dtype)


def in_context(function, x: torch.Tensor, slots: torch.Tensor | None = None) -> torch.Tensor:
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    mapping = None if slots is None else {"attention": slots}
    with set_forward_context(None, VllmConfig(), num_tokens=len(x), slot_mapping=mapping):
        return function(x)


def check(scheme: Scheme, tensors: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> None:
    from tests.helpers.vllm_layers import tolerance

    reference = int8.linear_reference(
        x,
        tensors["weight"],
        tensors["weight_scale"],
        strategy=scheme.input_activations.strategy,
        input_scale_static=tensors.get("input_scale"),
        smoothing_factor=tensors.get("smoothing_factor"),
        bias=tensors["bias"],
    )
    per_channel = tensors | {"weight_scale": tensors["weight_scale"].reshape(-1, 1).expand(len(tensors["weight"]), 1)}
    bound = tolerance(x, per_channel, scheme.input_activations.strategy, reference)
    # vLLM 0.26's Triton GEMM adds the bias after rounding to 16 bits.
    bound = bound + torch.finfo(x.dtype).eps * tensors["bias"].float().abs()
    error = (y.cpu().float() - reference.float()).abs()
    assert (error <= bound).all(), f"the error exceeds that of rounding by {(error - bound).max():.3g}"


# Compiling takes some seconds per case, so cases that test nothing new are not compiled.
CASES = [
    (weights, activations, shape, smoothed, dtype, compiled)
    for weights in ("channel", "tensor")
    for activations in ACTIVATIONS
    for shape in SHAPES
    for smoothed in (False, True)
    for dtype in (torch.bfloat16, torch.float16)
    for compiled in (False, True)
    if not compiled or (dtype == torch.bfloat16 and (weights, shape) in (("channel", "odd out"), ("tensor", "cutlass")))
]


@pytest.mark.parametrize(("weights", "activations", "shape", "smoothed", "dtype", "compiled"), CASES)
def test_a_layer_is_the_reference(
    weights: str, activations: str, shape: str, smoothed: bool, dtype: torch.dtype, compiled: bool
) -> None:
    from tests.helpers.cuda_stubs import layer_of

    scheme = Scheme(Weights(weights), ACTIVATIONS[activations])
    layer, tensors = layer_of(scheme, smoothed, SHAPES[shape], dtype, "cuda")
    kernel = layer.quant_method.kernel.name
    if shape.startswith("odd") or torch.cuda.get_device_capability() >= (10, 0):
        assert kernel == "triton"
    else:
        assert kernel == ("cutlass-tensor" if activations == "tensor" else "vllm")
    torch.compiler.reset()
    function = torch.compile(layer, fullgraph=True, dynamic=True) if compiled else layer
    for rows in (1, 16, 33, 300):
        x = tokens(rows, SHAPES[shape][1], dtype)
        check(scheme, tensors, x, in_context(function, x.cuda()))


@pytest.mark.parametrize("smoothed", [False, True], ids=["folded", "smoothed"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("shape", ["small", "odd out"])
def test_a_cuda_graph_replays_a_layer_and_ignores_padding(shape: str, activations: str, smoothed: bool) -> None:
    """Capture with padding in every row, as vLLM does; replay with fewer tokens than rows and NaN in the other rows."""
    from tests.helpers.cuda_stubs import layer_of

    scheme = Scheme(Weights("channel"), ACTIVATIONS[activations])
    layer, tensors = layer_of(scheme, smoothed, SHAPES[shape], device="cuda")
    rows, columns = 16, SHAPES[shape][1]
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device="cuda")
    slots = torch.full((rows,), -1, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        in_context(layer, x, slots)  # Triton compiles outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = in_context(layer, x, slots)
    for real in (9, 16, 1):
        batch = tokens(real, columns, torch.bfloat16)
        batch[0, 0] = real  # another absmax each time
        x.fill_(float("nan"))
        x[:real] = batch.cuda()
        slots.fill_(-1)
        slots[:real] = torch.arange(real, device="cuda")
        graph.replay()
        check(scheme, tensors, batch, y[:real])


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_nothing_waits_for_the_device(activations: str) -> None:
    from tests.helpers.cuda_stubs import layer_of

    layer, _ = layer_of(Scheme(Weights("channel"), ACTIVATIONS[activations]), True, SHAPES["small"], device="cuda")
    x = tokens(16, SHAPES["small"][1], torch.bfloat16).cuda()
    slots = torch.arange(16, device="cuda")
    in_context(layer, x, slots)
    torch.cuda.set_sync_debug_mode("error")
    try:
        in_context(layer, x, slots)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("activations", ["token", "static"])
def test_inductor_fuses_the_quantisation_with_the_norm(activations: str) -> None:
    from torch._inductor.utils import run_and_get_code

    from tests.test_cuda import norm
    from vllm_smoothquant.kernels.cuda import quantize_on_cuda

    layer = torch.nn.Module()
    layer.input_scale = torch.tensor(0.03, device="cuda")
    layer.inverse_smoothing_factor = torch.rand(4096, device="cuda") + 0.5
    gain = torch.rand(4096, device="cuda", dtype=torch.bfloat16) + 0.5
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    torch.compiler.reset()
    function = torch.compile(lambda x: quantize_on_cuda(layer, norm(x, gain), ACTIVATIONS[activations]), fullgraph=True)
    _, sources = run_and_get_code(function, x)
    assert "".join(sources).count("async_compile.triton(") == 1


def test_the_triton_kernel_equals_the_reference_bit_for_bit() -> None:
    from vllm_smoothquant.kernels import ops

    for rows, columns, dtype in ((3, 64, torch.bfloat16), (33, 1000, torch.float16), (5, 14336, torch.bfloat16)):
        x = tokens(rows, columns, dtype).cuda()
        inverse = torch.rand(columns, device="cuda") + 0.1
        integers, scale = ops.quantize_per_token(x, inverse)
        # The reference runs on the CPU, because its float32 division is that of IEEE 754.
        expected_scale = int8.input_scale(x.cpu().float() * inverse.cpu(), "token")
        assert torch.equal(scale.cpu(), expected_scale)
        assert torch.equal(integers.cpu(), int8.quantize(x.cpu().float() * inverse.cpu(), expected_scale))


def test_operators_pass_opcheck() -> None:
    from vllm_smoothquant.kernels import ops

    x = tokens(5, 48, torch.bfloat16).cuda()
    inverse = torch.rand(48, device="cuda") + 0.5
    integers, scale = ops.quantize_per_token(x, inverse)
    weight = torch.randint(-127, 128, (40, 48), dtype=torch.int8, device="cuda").t()
    weight_scale = torch.rand(40, 1, device="cuda")
    bias = torch.randn(40, dtype=torch.bfloat16, device="cuda")
    for operator, arguments in (
        (ops.quantize_per_token, (x, inverse)),
        (ops.triton_int8_mm, (integers, weight, scale, weight_scale, torch.bfloat16, None)),
        (ops.triton_int8_mm, (integers, weight, scale, weight_scale, torch.bfloat16, bias)),
        (ops.real_rows, (scale, 5)),
    ):
        results = torch.library.opcheck(operator, arguments)
        assert set(results.values()) == {"SUCCESS"}, (operator, results)


def test_the_installed_vllm_has_what_we_use() -> None:
    from tests.test_cuda import run

    done = run(str(Path("packaging", "check_vllm.py")), "--installed")
    assert done.returncode == 0, done.stdout
