"""Custom operators and our compiled product against plain integer products."""

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.vllm_layers import IN, TOKEN, compile_for
from vllm_smoothquant.format import int8
from vllm_smoothquant.kernels import base, build, cpu, exact, ops, select


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_onednn_operator_passes_opcheck(dtype: torch.dtype, static: bool, bias: bool) -> None:
    from vllm import _custom_ops as vllm_ops

    gc.collect()  # handlers of other tests read a tensor when they are freed, which fails in opcheck's fake mode
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-63, 64, (48, IN), generator=generator, dtype=torch.int8)
    scale = torch.rand(48, 1, generator=generator)
    handler = vllm_ops.create_onednn_scaled_mm(weight.t(), scale, dtype, False, False, 4)
    arguments = (
        torch.randn(5, IN, generator=generator).to(dtype),
        handler.handler_tensor,
        48,
        torch.tensor([0.02]) if static else None,
        torch.randn(48, generator=generator).to(dtype) if bias else None,
    )
    results = torch.library.opcheck(ops.onednn_tensor_int8, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    assert ops.onednn_tensor_int8(arguments[0][:0], *arguments[1:]).shape == (0, 48)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["token", "tensor", "static"])
@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 4, 16), (67, 13, 100), (18, 9, 2057), (131, 33, 2048)], ids=str)
@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, target: str, shape: tuple[int, int, int], scheme: str, dtype: torch.dtype
) -> None:
    """Every remainder of a tile, the extremes of int8, a bias; the tolerance is the float32 rounding of the scaling."""
    compile_for(target, monkeypatch)
    gc.collect()  # as in test_the_onednn_operator_passes_opcheck
    tokens, out_features, in_features = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    weight[0] = -128
    x[0] = -x[0].abs().max()
    weight_scale = torch.rand(out_features, generator=generator)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    static = torch.tensor([0.011]) if scheme == "static" else None
    arguments = (x, weight, weight_scale, weight.sum(1, dtype=torch.int32), static, bias, scheme == "token")
    y = ops.int8_linear(*arguments)
    assert y.dtype == dtype
    strategy = "token" if scheme == "token" else "tensor"
    reference = int8.linear_reference(
        x.double(), weight, weight_scale, strategy=strategy, input_scale_static=static, bias=bias.double()
    )
    # The sum becomes float32, is scaled twice, and the bias is added: four roundings, each 2**-24 relative. Rounding to
    # the output's dtype is half a unit in the last place.
    size = (reference - bias).abs() + bias.abs()
    bound = 4 * 2**-24 * size + (torch.finfo(dtype).eps / 2 * y.double().abs() if dtype != torch.float32 else 0)
    assert ((y.double() - reference).abs() <= bound).all()
    results = torch.library.opcheck(ops.int8_linear, arguments)
    assert set(results.values()) == {"SUCCESS"}, results


@pytest.mark.parametrize("times", [1, 6], ids=["few tokens", "many tokens"])
@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_holds_the_longest_sums(monkeypatch: pytest.MonkeyPatch, target: str, times: int) -> None:
    """2**16 products of extremes: up to 2**30 in magnitude, nearly 2**31 with the OFFSET of int8_tile.h."""
    compile_for(target, monkeypatch)
    x = torch.tensor([127.0, -128.0, 1.0]).reshape(3, 1).expand(3, build.MAX_IN_FEATURES).repeat(times, 1)
    weight = (
        torch.tensor([-128, 127, 1, -1, 0]).reshape(5, 1).expand(5, build.MAX_IN_FEATURES).to(torch.int8).contiguous()
    )
    one = torch.ones(5)
    y = ops.int8_linear(x, weight, one, weight.sum(1, dtype=torch.int32), one[:1], None, False)
    # float32 has 24 bits, which is exact for all of these sums except 127 * 127's.
    assert torch.allclose(y.double(), x.double() @ weight.double().t(), rtol=2**-24, atol=0)


def test_our_product_takes_other_dtypes_through_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_for("avx2", monkeypatch)
    weight = torch.randint(-128, 128, (5, 20), dtype=torch.int8)
    x, bias, sums = torch.randn(3, 20), torch.randn(5), weight.sum(1, dtype=torch.int32)
    for narrow in (x.half(), x.bfloat16()):  # the second: a bfloat16 model with a bias in float32
        y = ops.int8_linear(narrow, weight, torch.ones(5), sums, None, bias, True)
        wide = ops.int8_linear(narrow.float(), weight, torch.ones(5), sums, None, bias, True)
        assert torch.equal(y, wide.to(narrow.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("target", build.TARGETS)
def test_our_product_keeps_nan_and_takes_no_tokens(
    monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype
) -> None:
    """Integers cannot show a NaN: the output row of its token must, and no other row."""
    compile_for(target, monkeypatch)
    weight, weight_scale = torch.ones(3, 20, dtype=torch.int8), torch.ones(3)
    sums = weight.sum(1, dtype=torch.int32)
    x = torch.randn(4, 20).to(dtype)
    x[2, 7] = float("nan")
    for static, per_token, bad in ((None, True, [2]), (torch.ones(1), False, [2]), (None, False, [0, 1, 2, 3])):
        y = ops.int8_linear(x, weight, weight_scale, sums, static, None, per_token)
        assert y.isnan().all(dim=1).nonzero().flatten().tolist() == bad
        assert y.isnan().any(dim=1).sum() == len(bad)


@pytest.mark.parametrize("target", build.TARGETS)
def test_the_first_call_of_a_thread_may_have_no_tokens(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    """Each thread has memory of its own for the integers, and asks for 0 bytes of it here."""
    compile_for(target, monkeypatch)
    weight, one = torch.ones(3, 20, dtype=torch.int8), torch.ones(3)
    with ThreadPoolExecutor(1) as pool:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.empty(0, 20, dtype=dtype)
            y = pool.submit(ops.int8_linear, x, weight, one, weight.sum(1, dtype=torch.int32), None, None, False)
            assert y.result().shape == (0, 3)
            assert y.result().dtype == dtype


# --- the compiled library --------------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder of vLLM, and build.why_not without its own cache."""
    from vllm import envs

    if build.target() is None:
        pytest.skip("the product is for x86")
    monkeypatch.setattr(build, "why_not", build.why_not.__wrapped__)
    monkeypatch.setattr(envs, "VLLM_CACHE_ROOT", str(tmp_path / "root"))
    return tmp_path / "root" / "smoothquant"


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The library of this machine, in vLLM's own cache folder."""
    if build.target() is None:
        pytest.skip("the product is for x86")
    return build.build(build.target() or "")


@pytest.fixture
def compiler(compiled: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> Path:
    """A file with the arguments of each call of CXX, a program that copies a library which is compiled already."""
    calls, program = tmp_path / "calls", tmp_path / "a compiler"
    program.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nfor last; do :; done\ncp {compiled} "$last"\n')
    program.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{program}'")
    return calls


def test_the_product_compiles_for_all_instruction_sets(cache: Path) -> None:
    assert len({build.build(target) for target in build.TARGETS}) == len(build.TARGETS)


def test_a_failed_compilation_selects_the_next_kernel(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """No compiler, a failing compiler, a CPU without AVX2: select uses the next kernel and gives the reason."""
    request = base.Request("layer", TOKEN, True, torch.bfloat16, "cpu")
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for compiler, reason in (
        (str(cache.parent / "none"), "No such file"),
        ("false", "could not compile"),
        ("'g++", 'CXX: expected a command in the syntax of a shell, got "\'g++": No closing quotation'),
    ):
        monkeypatch.setenv("CXX", compiler)
        reasons = dict(select.explain_kernels(request))
        assert reason in (reasons["compiled"] or "")
        assert reasons["float32-integers"] is None
    assert list(cache.iterdir()) == []
    monkeypatch.setenv("CXX", " ")  # as if it were not set
    assert build.why_not() is None
    monkeypatch.setattr(build, "target", lambda: None)
    assert build.why_not() == "needs an x86 CPU with AVX2"


@pytest.mark.parametrize("more", ["", " -m64", " --sysroot '/a b'"])
def test_cxx_may_have_arguments(monkeypatch: pytest.MonkeyPatch, compiler: Path, more: str) -> None:
    """As in CXX="ccache g++" or "g++ -m64"."""
    monkeypatch.setenv("CXX", f"env {os.environ['CXX']}{more}")
    assert build.why_not() is None
    assert compiler.read_text().startswith(f"{more} -O3".replace("'", "").lstrip())


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022])
def test_nobody_else_may_write_the_library(cache: Path, compiler: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        assert build.why_not() is None
    finally:
        os.umask(previous)
    assert [oct(path.stat().st_mode & 0o777) for path in (cache, *cache.iterdir())] == ["0o700", "0o700"]
    assert build.why_not() is None
    assert len(compiler.read_text().splitlines()) == 1


@pytest.mark.parametrize("what", ["folder", "library"])
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, None], ids=lambda mode: "owner" if mode is None else oct(mode))
def test_what_another_user_may_have_put_there_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: Path, what: str, mode: int | None
) -> None:
    assert build.why_not() is None
    planted = cache if what == "folder" else next(cache.iterdir())
    if mode is not None:
        planted.chmod(mode)
    else:
        status, real = planted.stat(), Path.stat
        other = os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))
        monkeypatch.setattr(Path, "stat", lambda path, **options: other if path == planted else real(path, **options))
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: pytest.fail("loaded"))
    reason = build.why_not()
    assert isinstance(reason, str)
    assert reason.startswith(f"{planted}: expected a file or folder of user {os.geteuid()} that nobody else may write")
    assert (f"mode {mode:04o}" if mode is not None else f"user {os.geteuid() + 1}, mode 0700") in reason
    assert "VLLM_CACHE_ROOT" in reason


@pytest.mark.parametrize("content", [b"", b"not a library"], ids=["empty", "text"])
def test_a_library_that_cannot_be_loaded_is_compiled_again(
    compiled: Path, cache: Path, compiler: Path, content: bytes
) -> None:
    """A file that was cut off, or made on another system that shares the folder."""
    library = build.build(build.target() or "")
    library.write_bytes(content)
    assert build.why_not() is None
    assert library.read_bytes() == compiled.read_bytes()
    assert len(compiler.read_text().splitlines()) == 2


def test_a_library_that_is_compiled_and_cannot_be_loaded_is_said_so(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    """As in a folder whose file system forbids execution. It is compiled twice, not for ever."""
    calls, program = tmp_path / "calls", tmp_path / "program"
    program.write_text(f'echo call >> {calls}\nfor last; do :; done\necho text > "$last"\n')
    monkeypatch.setenv("CXX", f"sh {program}")
    reason = build.why_not()
    assert isinstance(reason, str)
    assert reason.startswith(f"could not load {cache}/int8_linear-")
    assert calls.read_text() == "call\ncall\n"


# --- other products --------------------------------------------------------------------------------------------------


def test_a_product_with_wrong_sums_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong as oneDNN's sums without VNNI are: pairs of products are clipped to 16 bits."""
    compile_for("avx2", monkeypatch)
    monkeypatch.setattr(exact, "compiled_is_exact", uncached := exact.compiled_is_exact.__wrapped__)
    request = base.Request("layer", TOKEN, True, torch.float32, "cpu")
    assert cpu.Compiled.rejects(request) is None

    def clips(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
        products = x[:, None] * weight[None]
        return products.unflatten(2, (-1, 2)).sum(3).clamp(-(2**15), 2**15 - 1).sum(2)

    monkeypatch.setattr(exact, "int8_linear", clips)
    assert not uncached()
    assert "wrong sums" in (cpu.Compiled.rejects(request) or "")


@pytest.mark.parametrize("in_features", [32, 1024, 1025, 5000, 73728])
def test_widened_products_are_integer_products(in_features: int) -> None:
    """Rounded to float32 once, however long the sums are: the largest here is 2**30."""
    generator = torch.Generator().manual_seed(0)
    for out_features in (513, 48):  # more rows than the buffer has, and fewer
        x = torch.randint(-128, 128, (5, in_features), generator=generator, dtype=torch.int8)
        weight = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
        x[0], x[1], weight[0], weight[1] = 127, -128, 127, -128
        y = ops.widened_linear(x.float(), weight)
        assert torch.equal(y, int8.int8_matmul(x, weight).float())
        assert ops.widened_linear(x[:0].float(), weight).shape == (0, out_features)
    if in_features < 2000:
        results = torch.library.opcheck(ops.widened_linear, (x.float(), weight))
        assert set(results.values()) == {"SUCCESS"}, results


def test_the_dynamic_scale_equals_the_reference() -> None:
    x = torch.randn(7, 33)
    for value in (x, -x, x.bfloat16(), torch.zeros(2, 3)):
        assert torch.equal(ops.dynamic_tensor_scale(value), int8.input_scale(value, "tensor"))


def test_a_torch_without_mkldnn_calibrates_in_float32() -> None:
    """It has none of the operators that tell what MKL-DNN supports (Apple silicon)."""
    program = """
import torch, types
torch.ops.mkldnn = types.SimpleNamespace()
from calibration.running import precision
print([precision.is_native(dtype, "cpu") for dtype in (torch.float32, torch.bfloat16, torch.float16)])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[True, False, False]\n", done.stderr
