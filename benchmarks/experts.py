"""docs/experts.md: the routed experts of one block in INT8 against vLLM's in floating point, on this CPU.

`python -m benchmarks.experts`. One block in the shape of Qwen3-30B-A3B (128 experts, 8 for each token, hidden 2048,
inner 768) with random weights and random routing. Both products run in turn, in one process, ROUNDS times for each
number of tokens; the table has medians and quartiles. The last line printed is JSON.
"""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from vllm_smoothquant.format import int8
from vllm_smoothquant.kernels import build, ops

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "experts.json"
OUTPUT = ROOT / "docs" / "experts.md"
EXPERTS, CHOICES, HIDDEN, INNER = 128, 8, 2048, 768
TOKENS = {1: 60, 16: 20, 256: 5}  # tokens -> rounds
HEADER = """# The speed of INT8 experts

Written by `python -m benchmarks.experts`; not by hand. {machine}

One block of {experts} experts, {choices} for each token, hidden {hidden}, inner {inner}, with random weights; bfloat16
activations. vLLM: its floating-point experts for CPUs (`cpu_fused_moe`, "vec"), bfloat16 weights. Ours: INT8 weights, a
scale for each token. Both in turn in one process; milliseconds, median [quartiles]. Weights: {float_mb:.0f} MB in
bfloat16, {int8_mb:.0f} MB in INT8 with scales and sums.

| tokens | vLLM, bfloat16 | ours, INT8 | speed |
|---|---|---|---|
"""


def routing(tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(int32 experts, float32 weights), [tokens, CHOICES] each."""
    weights, chosen = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOICES)
    return chosen.int(), weights / weights.sum(1, keepdim=True)


def vllm_experts(gate_up: torch.Tensor, down: torch.Tensor) -> Callable[..., torch.Tensor]:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    packed = [cpu_prepack_moe_weight(weight, "vec") for weight in (gate_up, down)]

    def run(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        cpu_fused_moe(y, x, *packed, None, None, weights, chosen, "silu", "vec", False)
        return y

    return run


def our_experts(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[Callable[..., torch.Tensor], int]:
    """The product, and the bytes that it reads."""
    tensors: list[torch.Tensor | None] = []
    for weight in (gate_up, down):
        rounded = [int8.quantize_weight(expert.float(), "channel") for expert in weight]
        q, scale = (torch.stack(parts) for parts in zip(*rounded, strict=True))
        tensors += [q, scale.flatten(1).contiguous(), q.sum(2, dtype=torch.int32), None]

    def run(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return ops.int8_experts(x, *tensors, chosen, weights, 0)

    return run, sum(t.nbytes for t in tensors if t is not None)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    gate_up, down = (torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in shapes)
    assert build.why_not() is None, build.why_not()
    ours, int8_bytes = our_experts(gate_up, down)
    arms = {"vllm": vllm_experts(gate_up, down), "ours": ours}
    figures: dict[str, Any] = {}
    for tokens, rounds in TOKENS.items():
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(rounds + 1):  # the first round warms up
            x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
            chosen, weights = routing(tokens, generator)
            for arm, run in arms.items():
                start = time.perf_counter()
                run(x, chosen, weights)
                times[arm].append(1000 * (time.perf_counter() - start))
        figures[str(tokens)] = {arm: statistics.quantiles(each[1:], n=4) for arm, each in times.items()}
    text = HEADER.format(
        machine=describe(), experts=EXPERTS, choices=CHOICES, hidden=HIDDEN, inner=INNER,
        float_mb=(gate_up.nbytes + down.nbytes) / 1e6, int8_mb=int8_bytes / 1e6,
    )  # fmt: skip
    for tokens, found in figures.items():
        cells = [f"{q[1]:.2f} [{q[0]:.2f}, {q[2]:.2f}]" for q in (found["vllm"], found["ours"])]
        text += f"| {tokens} | {' | '.join(cells)} | {found['vllm'][1] / found['ours'][1]:.2f} |\n"
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    OUTPUT.write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
