"""tests/test_cuda.py starts this with TRITON_INTERPRET=1: our Triton kernel, run by Triton's interpreter on the CPU.

python -m tests.interpreted IN OUT    IN: a list of (x, inverse_smoothing_factor); OUT: what quantize_per_token gives
"""

import sys

import torch

from vllm_smoothquant.kernels import ops
from vllm_smoothquant.kernels.triton_quantize import quantize_per_token


def main(source: str, target: str) -> None:
    cases = torch.load(source)
    # On a GPU the operator is this function, too.
    ops._library.impl("quantize_per_token", quantize_per_token, "CPU")
    checked = torch.library.opcheck(ops.quantize_per_token, cases[0])
    torch.save({"results": [ops.quantize_per_token(*case) for case in cases], "opcheck": checked}, target)


if __name__ == "__main__":
    main(*sys.argv[1:])
