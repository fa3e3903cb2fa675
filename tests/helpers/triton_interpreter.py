"""Run our Triton kernel in Triton's interpreter on the CPU; tests/test_cuda.py starts this with TRITON_INTERPRET=1.

    python -m tests.helpers.triton_interpreter IN OUT

IN: a file with a list of (x, inverse_smoothing_factor). OUT: the results of quantize_per_token and of opcheck.
"""

import sys

import torch

from vllm_smoothquant.kernels import ops
from vllm_smoothquant.kernels.triton_quantize import quantize_per_token


def main(source: str, target: str) -> None:
    cases = torch.load(source)
    # The operator calls the same function on a GPU.
    ops._library.impl("quantize_per_token", quantize_per_token, "CPU")
    opcheck = torch.library.opcheck(ops.quantize_per_token, cases[0])
    torch.save({"results": [ops.quantize_per_token(*case) for case in cases], "opcheck": opcheck}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
