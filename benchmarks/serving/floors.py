"""The least time of a step: the limits that this machine's memory and arithmetic set for the weights of a checkpoint.

    floor = sum over parts of max(bytes / bandwidth, 2 * weights * rows / peak)

A part is all weights with the same arithmetic and the same number of rows: INT8 layers, layers in floating point, and
the output head, which gets one row of each request. Products of 4-bit weights are those of INT8, or of floating point
if activations are not rounded. Attention, norms, quantisation and sampling are not in the floor.

`python -m benchmarks.serving.floors DTYPE` measures bandwidth and peaks in a process of its own and prints JSON.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant.format import int4
from vllm_smoothquant.format.files import read_headers, read_json

ROWS, COLUMNS = 2**15, 2**12  # of float32: half a GiB, more than any cache
LONG_ENOUGH_S = 0.05
LARGEST = 2**14
REPEATS = 5


@dataclass(frozen=True)
class Part:
    """int8: integers are multiplied. weights: elements that are. bytes: what is read for it, scales included."""

    int8: bool
    head: bool
    weights: int
    bytes: int


def parts(folder: Path, itemsize: int) -> list[Part]:
    """The parts of the checkpoint in `folder`; an element of its floating-point tensors takes `itemsize` bytes."""
    config = read_json(folder / "config.json")
    tied, scheme = config.get("tie_word_embeddings", False), config.get("quantization_config", {})
    rounded = (scheme.get("input_activations") or {"num_bits": 16})["num_bits"] < 16
    headers = read_headers(folder)
    sizes: dict[tuple[bool, bool], list[int]] = {}
    for name, (dtype, shape) in headers.items():
        layer, _, kind = name.rpartition(".")
        embeddings = "embed_tokens" in layer
        if embeddings and not tied:
            continue  # of the table only the rows of the tokens are read
        packed = f"{layer}.weight_packed" in headers
        int8 = rounded if packed else headers.get(f"{layer}.weight", (dtype,))[0] == "I8"
        sums = sizes.setdefault((int8, embeddings or layer.endswith("lm_head")), [0, 0])
        elements = math.prod(shape)
        if kind in ("weight", "weight_packed") and len(shape) == 2:
            sums[0] += elements * (int4.IN_WORD if packed else 1)
        sums[1] += elements * {"I8": 1, "I32": 4}.get(dtype, 4 if int8 and not packed else itemsize)
    return [Part(*key, *sums) for key, sums in sizes.items()]


def floor(of: Iterable[Part], limits: Mapping[str, float], tokens: int, requests: int) -> float:
    """Seconds of a step with `tokens` tokens that gives a next token to `requests` requests; limits: of `measure`."""

    def seconds(part: Part) -> float:
        peak = limits["int8_ops_per_s" if part.int8 else "dtype_ops_per_s"]
        return max(part.bytes / limits["bytes_per_s"], 2 * part.weights * (requests if part.head else tokens) / peak)

    return math.fsum(map(seconds, of))


def floors(
    of: Sequence[Part], limits: Mapping[str, float], cases: Mapping[str, tuple[int, int, int]]
) -> dict[str, float]:
    """Case of run.py (requests, tokens of each prompt, new tokens of each) -> least seconds of the measured step."""
    return {
        case: floor(of, limits, requests * length if new == 1 else requests, requests)
        for case, (requests, length, new) in cases.items()
    }


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of REPEATS calls, after one that allocates memory."""
    run()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak(product: Callable[[int], Callable[[], Any]]) -> float:
    """Operations a second of the square product(n); n is doubled until one call takes LONG_ENOUGH_S."""
    n = 256
    while (seconds := best(product(n))) < LONG_ENOUGH_S and n < LARGEST:
        n *= 2
    return 2 * n**3 / seconds


def floating(dtype: torch.dtype) -> Callable[[int], Callable[[], Any]]:
    def product(n: int) -> Callable[[], Any]:
        a, b = torch.randn(2, n, n).to(dtype)
        return lambda: torch.nn.functional.linear(a, b)

    return product


def plain_int8(n: int) -> Callable[[], Any]:
    a, b = torch.randint(-127, 128, (2, n, n), dtype=torch.int8)
    return lambda: torch._int_mm(a, b.t())


def onednn_int8(n: int) -> Callable[[], Any]:
    """The call of vLLM's kernel; if oneDNN saturates on this CPU, this is the speed of wrong sums."""
    from vllm import _custom_ops as vllm_ops

    a, b = torch.randint(-127, 128, (2, n, n), dtype=torch.int8)
    one, out = torch.ones(1), torch.empty(n, n)
    handler = vllm_ops.create_onednn_scaled_mm(b.t(), one, torch.float32, False, False, 1)
    return lambda: torch.ops._C.onednn_scaled_mm(out, a, one, None, None, None, handler.handler_tensor)


def measure(dtype: torch.dtype) -> dict[str, float]:
    """bytes_per_s of reading; dtype_ops_per_s and int8_ops_per_s of square products, each by the fastest method."""
    matrix, vector = torch.ones(ROWS, COLUMNS), torch.ones(COLUMNS)
    read = min(best(lambda: torch.mv(matrix, vector)), best(matrix.sum))
    return {
        "bytes_per_s": matrix.nbytes / read, "dtype_ops_per_s": peak(floating(dtype)),
        "int8_ops_per_s": max(map(peak, (plain_int8, onednn_int8))),
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(measure(getattr(torch, sys.argv[1]))))
