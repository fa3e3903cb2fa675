"""What masked loads of vLLM's Triton GEMM yield: read in the PTX that Triton generates. Needs no GPU.

    python -m tests.helpers.triton_ptx CAPABILITY...        90 for compute capability 9.0

The GEMM loads the end of a row with a mask and without a value for the elements behind it. Triton's language leaves
them undefined; its back end for NVIDIA makes them 0. Prints, for each capability, for `in` odd and for a multiple of
16, the masked loads and those that may yield something else than 0; or that Triton cannot compile the GEMM.
"""

import re
import sys

import torch  # noqa: F401  vLLM needs it before Triton

from tests.helpers.triton_interpreter import import_gemm

POINTERS = {"a": "i8", "b": "i8", "scale_a": "fp32", "scale_b": "fp32", "c": "bf16", "bias": "bf16"}
# Of a batch of up to 64 tokens. The weight is a transposed view [in, out] of [out, in].
TILE = {
    "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 256, "BLOCK_SIZE_SCALE_A": 64, "BLOCK_SIZE_SCALE_B": 64,
    "stride_ak": 1, "stride_bk": 1, "stride_cn": 1, "USE_TD": False, "B_T": True,
}  # fmt: skip


def compiled(capability: int, aligned: bool) -> str:
    """The PTX for sizes that are multiples of 16, or for any sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = import_gemm().scaled_mm_kernel
    constants = TILE | {"ACCUMULATOR_DTYPE": triton.language.int32}
    types = {name: "constexpr" if name in constants else "i32" for name in kernel.arg_names}
    types |= {f"{name}_ptr": f"*{dtype}" for name, dtype in POINTERS.items()}
    divisible = [name for name in types if name.endswith("_ptr") or (aligned and types[name] == "i32")]
    index = kernel.arg_names.index
    source = ASTSource(
        kernel,
        types,
        {(index(name),): value for name, value in constants.items() if name in kernel.arg_names},
        {(index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]


def masked_loads(ptx: str) -> tuple[list[str], list[str]]:
    """The masked loads from global memory, and those of them that do not yield 0 where they load nothing."""
    loads, unset = [], []
    for block in ptx.split("// begin inline asm")[1:]:
        block = block.partition("// end inline asm")[0]
        for load, registers in re.findall(r"(@%p\d+ ld\.global\S* \{ ([^}]*) \}.*)", block):
            loads.append(load)
            before = block.partition(load)[0]
            if not all(re.search(rf"mov\.\w+ {re.escape(r.strip())}, 0x0;", before) for r in registers.split(",")):
                unset.append(load)
        for load, operands in re.findall(r"(cp\.async\.c[ag]\S* (.*);)", block):
            loads.append(load)
            if operands.count(",") != 3:  # the fourth operand is the number of bytes to read; the others become 0
                unset.append(load)
    return loads, unset


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for aligned in (False, True):
            try:
                loads, unset = masked_loads(compiled(capability, aligned))
                print(f"{capability} {'aligned' if aligned else 'odd'}: {len(loads)} masked loads, {len(unset)} unset")
            except RuntimeError as error:
                print(f"{capability} {'aligned' if aligned else 'odd'}: {error}")
