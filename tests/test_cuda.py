"""The CUDA code on a machine without a GPU. Tests that need a GPU are in tests/gpu."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_experts import experts_reference
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import InputActivations, Scheme
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.kernels import base, cuda, ops, select

pytest.importorskip("vllm", reason="the plugin needs vLLM; `make venv` installs it")

ROOT = Path(__file__).parent.parent

TENSOR = InputActivations("tensor", dynamic=True)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


# --- vLLM ------------------------------------------------------------------------------------------------------------


def test_the_installed_vllm_has_what_we_use() -> None:
    done = run("packaging/check_vllm.py", "--installed")
    assert done.returncode == 0, done.stdout
    assert "from vllm.model_executor.kernels.linear import init_int8_linear_kernel" in done.stdout


def test_the_check_finds_what_is_missing(tmp_path: Path) -> None:
    """A vLLM with nothing in it: nearly no fact holds, and none is skipped."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "_custom_ops.py").write_text("def scaled_int8_quant(input): ...\n")
    done = run("packaging/check_vllm.py", "--installed", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1, done.stdout
    assert "from vllm.platforms import current_platform: no such name" in done.stdout
    assert "vllm_ops.scaled_int8_quant(2): 2 positional arguments, takes 1" in done.stdout
    assert "CUTLASS is CUDA's first INT8 kernel" in done.stdout
    # Distinct facts, not lines, because several files import vLLM's operators.
    facts = {line.partition(": ")[2] for line in done.stdout.splitlines() if line.startswith("ok")}
    assert len(facts) < 5, facts


@pytest.mark.slow
def test_every_scheme_on_vllms_python_code_for_cuda() -> None:
    """tests/helpers/cuda_stubs.py replaces only the compiled operators."""
    done = run("tests/helpers/cuda_stubs.py", "--quick")
    assert done.returncode == 0, done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("ok")]
    # 3 activations, smoothed or not, 7 layers, of which 2 are compiled too; and 3 more facts.
    assert len(lines) == 3 * 2 * (7 + 2) + 3, done.stdout


# --- padding of CUDA graphs ------------------------------------------------------------------------------------------


def slots(real: int, rows: int) -> torch.Tensor:
    return torch.cat([torch.arange(real) + 16, torch.full((rows - real,), -1)])


def with_slots(mapping: object, rows: int) -> torch.Tensor:
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    with set_forward_context(None, VllmConfig(), num_tokens=rows, slot_mapping=mapping):
        return ops.real_rows(torch.ones(1), rows)


def test_padding_has_no_slot_in_any_layer_group() -> None:
    attention, mamba = slots(5, 8), torch.full((8,), -1)
    assert with_slots({"a": attention, "b": attention, "c": mamba}, 8).tolist() == [True] * 5 + [False] * 3


def test_without_slots_every_row_is_a_token() -> None:
    """Profiling runs, the output head outside vLLM's forward context, inputs that are not a batch of tokens."""
    assert ops.real_rows(torch.ones(1), 3).all()
    for mapping in (None, {"a": slots(5, 8)}, [{"a": slots(3, 3)}]):
        assert with_slots(mapping, 3).all()


def test_a_graph_without_slots_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_capturing", lambda like: True)
    assert with_slots({"a": slots(2, 3)}, 3).tolist() == [True, True, False]
    with pytest.raises(SmoothQuantError, match=r"slot mapping of all 3 rows.*got none; serve with --enforce-eager"):
        with_slots(None, 3)


def test_stale_rows_do_not_reach_the_scale() -> None:
    """One compiled function, two batches: it reads the mapping when it runs, not when it is compiled."""
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    layer = torch.nn.Module()
    layer.weight_scale = torch.ones(1)
    x = torch.randn(8, 32)
    x[5:] = torch.tensor([float("nan"), float("inf"), 1e30])[:, None]
    mapping = slots(5, 8)
    torch.compiler.reset()
    function = torch.compile(lambda x: cuda.quantize_on_cuda(layer, x, TENSOR), fullgraph=True, backend="aot_eager")
    for real in (5, 3):
        mapping.copy_(slots(real, 8))
        with set_forward_context(None, VllmConfig(), num_tokens=8, slot_mapping={"a": mapping}):
            integers, scale = function(x)
        assert torch.equal(scale, int8.input_scale(x[:real], "tensor"))
        assert torch.equal(integers[:real], int8.quantize(x[:real], scale))


def test_context_parallel_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    monkeypatch.setattr(config.parallel_config, "decode_context_parallel_size", 2)
    request = base.Request("l", Scheme(input_activations=TENSOR), True, torch.bfloat16, "cuda", 90)
    with (
        set_current_vllm_config(config),
        pytest.raises(SmoothQuantError, match=r"1 rank of context .*got 2"),
    ):
        select.select_kernel(request)


# --- fusion ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activations", "smoothed"),
    [(InputActivations(), True), (InputActivations("tensor", False), False)],
    ids=["token-smoothed", "static"],
)
def test_inductor_fuses_the_quantisation_with_the_norm(activations: InputActivations, smoothed: bool) -> None:
    """One kernel for norm and quantisation, and the same integers except at rounding ties.

    This counts kernels for the CPU, because the same scheduler fuses for GPUs; tests/gpu counts kernels for the GPU.
    """
    from torch._inductor.utils import run_and_get_code

    layer = torch.nn.Module()
    layer.input_scale = torch.tensor(0.03)
    if smoothed:
        layer.inverse_smoothing_factor = torch.rand(64) + 0.5
    gain = torch.rand(64) + 0.5

    def norm_and_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cuda.quantize_on_cuda(layer, norm(x, gain), activations)

    torch.compiler.reset()
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    (integers, scale), sources = run_and_get_code(torch.compile(norm_and_quantize, fullgraph=True), x)
    assert "".join(sources).count("async_compile.cpp_pybinding(") == 1
    expected = norm(x, gain) * (layer.inverse_smoothing_factor if smoothed else 1)
    expected_scale = int8.input_scale(expected, "token") if activations.dynamic else layer.input_scale
    assert torch.allclose(scale, expected_scale, rtol=1e-6)
    different = integers != int8.quantize(expected, expected_scale)
    assert different.float().mean() < 0.01
    assert (integers.int() - int8.quantize(expected, expected_scale).int()).abs().max() <= 1


def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * gain


# --- Triton ----------------------------------------------------------------------------------------------------------


def interpreted(operator: str, cases: list[tuple[Any, ...]], folder: Path) -> list[Any]:
    """The results of an operator in Triton's interpreter, which a process of its own needs."""
    torch.save({operator: cases}, folder / "in.pt")
    done = run("-m", "tests.helpers.triton_interpreter", str(folder / "in.pt"), str(folder / "out.pt"))
    assert done.returncode == 0, done.stdout
    answer = torch.load(folder / "out.pt")[operator]
    assert answer.get("opcheck", {"SUCCESS"}) == {"SUCCESS"}, answer["opcheck"]  # experts are no operator of ours
    return list(answer["results"])


def test_the_triton_kernel_equals_the_reference_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    cases = []
    # One step; not a power of two; a single element; one step and one element.
    for tokens, n, dtype in (
        (3, 64, torch.bfloat16),
        (2, 100, torch.float16),
        (4, 1, torch.float32),
        (2, 4097, torch.bfloat16),
    ):
        cases.append((random(tokens, n).to(dtype), torch.rand(n, generator=generator) + 0.1))
    odd = random(6, 33)
    odd[1] = 0  # padding
    odd[2] *= 1e-41  # too small for a scale
    odd[3, 7] = float("nan")
    odd[4, 7] = float("inf")
    ties = torch.arange(-127, 128).float()[None] / 2  # halves: absmax 63.5, so every other value is a tie
    strided = random(4, 80).bfloat16()[:, :40]
    cases += [(odd, torch.ones(33)), (ties, torch.ones(255)), (strided, torch.rand(40, generator=generator))]
    results = interpreted("quantize_per_token", cases, tmp_path)
    for (x, inverse), (integers, scale) in zip(cases, results, strict=True):
        expected_scale = int8.input_scale(x.float() * inverse, "token")
        assert torch.equal(scale.view(torch.int32) & 0x7FFFFFFF, expected_scale.view(torch.int32) & 0x7FFFFFFF)
        finite = expected_scale.isfinite().flatten()  # an infinite scale shows in the output, whatever the integers are
        assert torch.equal(integers[finite], int8.quantize(x.float() * inverse, expected_scale)[finite])


def test_vllms_triton_gemm_equals_the_reference(tmp_path: Path) -> None:
    """Extreme integers, `in` and `out` odd or multiples of a tile, all tiles, one scale or many, a bias or none."""
    generator = torch.Generator().manual_seed(0)

    def scale(count: int) -> torch.Tensor:
        return torch.rand(count, 1, generator=generator) * 1e-3 + 1e-4

    cases: list[tuple[Any, ...]] = []
    for tokens, out_features, in_features in ((1, 40, 33), (33, 48, 1000), (65, 39, 257), (130, 70, 256), (0, 5, 7)):
        x = torch.randint(-128, 128, (tokens, in_features), generator=generator, dtype=torch.int8)
        weight = torch.randint(-127, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
        x[:1], weight[0] = -128, -127
        for dtype, bias in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
            shift = torch.randn(out_features, generator=generator).to(dtype) if bias else None
            cases.append((x, weight.t(), scale(tokens), scale(out_features), dtype, shift))
        cases.append((x, weight.t(), scale(1)[0], scale(1)[0], torch.float32, None))  # as a static or per-tensor scale
    for case, y in zip(cases, interpreted("triton_int8_mm", cases, tmp_path), strict=True):
        x, weight, input_scale, weight_scale, dtype, bias = case
        product = int8.int8_matmul(x, weight.t()) * input_scale.double() * weight_scale.double().reshape(1, -1)
        reference = product if bias is None else product + bias.double()
        assert (y.dtype, y.shape) == (dtype, reference.shape)
        # The sum, two products and the addition of the bias are rounded to float32, the result to the dtype.
        bound = 4 * 2**-24 * (product.abs() + reference.abs()) + torch.finfo(dtype).eps / 2 * reference.abs()
        bound = bound + torch.finfo(dtype).smallest_normal  # numbers below it have fewer bits
        assert ((y.double() - reference).abs() <= bound).all()


def test_vllms_triton_experts_equal_the_reference(tmp_path: Path) -> None:
    """Both products in the layout and with the scales of experts.py: sizes that no tile divides, an idle expert, and a
    token whose integers are extreme.
    """
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[Any, ...]] = []
    for tokens, hidden, inner, count, choices in ((1, 40, 33, 4, 2), (7, 64, 48, 3, 1), (40, 33, 70, 8, 3)):
        chosen = torch.rand(tokens, count - 1, generator=generator).argsort(1)[:, :choices]  # the last one is idle
        w13, w2 = (
            torch.randint(-127, 128, (count, *shape), generator=generator, dtype=torch.int8)
            for shape in ((2 * inner, hidden), (hidden, inner))
        )
        s13, s2 = (torch.rand(count, rows, 1, generator=generator) * 1e-3 + 1e-4 for rows in (2 * inner, hidden))
        x = torch.randn(tokens, hidden, generator=generator)
        x[0] = x[0].sign()
        weights = torch.rand(tokens, choices, generator=generator)
        cases.append((x, w13, s13, w2, s2, chosen, weights))
    for case, y in zip(cases, interpreted("experts", cases, tmp_path), strict=True):
        x, w13, s13, w2, s2, chosen, weights = case
        expected = experts_reference(x, w13, s13[..., 0], w2, s2[..., 0], chosen, weights, torch.nn.functional.silu)
        # Float32 around exact sums; the integers of the inner activations are the same but for ties.
        assert float((y - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
def test_masked_loads_of_vllms_triton_gemm_yield_zero(tmp_path: Path) -> None:
    """Triton's language does not say so, its interpreter and its back end for NVIDIA do: `in` may have any size."""
    cache = {"TRITON_CACHE_DIR": str(tmp_path)}
    done = run("-m", "tests.helpers.triton_ptx", "75", "80", "100", **cache)
    for line in ("80 odd", "80 aligned", "100 odd", "100 aligned"):
        assert re.search(rf"^{line}: \d{{2,}} masked loads, 0 unset$", done.stdout, re.MULTILINE), done.stdout
    # kernels/cuda.py rejects 7.5: Triton has no product of integers for it.
    assert "75 odd: PassManager::run failed" in done.stdout


# --- tests/gpu -------------------------------------------------------------------------------------------------------


def test_gpu_tests_are_collected_and_skipped_with_a_reason() -> None:
    from tests.gpu.conftest import REASON

    done = run("-m", "pytest", "tests/gpu", "-rs", "--no-header", "-p", "no:cacheprovider", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d{2,} skipped in ", done.stdout, re.MULTILINE), done.stdout  # and nothing passed or failed
    assert REASON in done.stdout
