"""docs/experts.md: the routed experts of one block in INT8 and 4 bits against vLLM's in floating point, on this CPU.

`python -m benchmarks.experts [--page experts_vnni]`. One block in the shape of Qwen3-30B-A3B (128 experts, 8 for each
token, hidden 2048, inner 768) with random weights and random routing. The products run in turn, in one process, as
often as TOKENS says; the table has medians and quartiles. --page: of docs/ and benchmarks/results/. The last line
printed is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from benchmarks.machine import describe
from vllm_smoothquant.experts.four_bits import OurFourBitExperts
from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import InputActivations, Scheme, Weights
from vllm_smoothquant.kernels import build, ops
from vllm_smoothquant.kernels.four_bits import for_product

ROOT = Path(__file__).parent.parent
EXPERTS, CHOICES, HIDDEN, INNER = 128, 8, 2048, 768
TOKENS = {1: 60, 16: 20, 256: 5}  # tokens -> rounds
HEADER = """# The speed of experts in INT8 and 4 bits

Written by `python -m benchmarks.experts`; not by hand. {machine}

One block of {experts} experts, {choices} for each token, hidden {hidden}, inner {inner}, with random weights; bfloat16
activations. vLLM: its floating-point experts for CPUs (`cpu_fused_moe`, "vec"), bfloat16 weights. Ours: INT8 weights, a
scale for each token. Ours: 4-bit weights in groups of 128, with 8-bit activations (W4A8) and with 16-bit ones (W4A16),
one expert after the other. In turn in one process; milliseconds, median [quartiles]; x: vLLM's time over ours. Weights:
{float_mb:.0f} MB in bfloat16, {int8_mb:.0f} MB in INT8 with scales and sums, {int4_mb:.0f} MB in 4 bits with scales.

| tokens | vLLM, bfloat16 | ours, INT8 | ours, W4A8 | ours, W4A16 |
|---|---|---|---|---|
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


def four_bit_experts(
    gate_up: torch.Tensor, down: torch.Tensor, kinds: Sequence[InputActivations]
) -> tuple[list[Callable[..., torch.Tensor]], int]:
    """The product for each kind of activations, and the bytes that it reads."""
    layer: Any = SimpleNamespace(
        moe_config=SimpleNamespace(has_bias=False), activation=MoEActivation.SILU, expert_map=None,
        apply_router_weight_on_input=False,
    )  # fmt: skip
    weights = Weights("group", int4.GROUP_SIZES[0], num_bits=4)
    methods = [OurFourBitExperts("experts", Scheme(weights, activations), layer, lambda: None) for activations in kinds]
    size = 0
    for name, weight in (("w13", gate_up), ("w2", down)):
        parts = []
        for expert in weight.float():
            scale = int4.group_scale(expert, int4.GROUP_SIZES[0])
            parts.append(for_product(int4.pack(int4.quantize(expert, scale)), scale))
        for suffix, tensors in zip(("weight_packed", "weight_scale"), zip(*parts, strict=True), strict=True):
            setattr(layer, f"{name}_{suffix}", torch.stack(tensors))
            size += sum(t.nbytes for t in tensors)

    def run(method: OurFourBitExperts, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return method.apply(layer, x, weights, chosen, None, None)

    return [partial(run, method) for method in methods], size


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", default="experts")
    page = parser.parse_args().page
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS, 2 * INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)
    gate_up, down = (torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in shapes)
    assert build.why_not() is None, build.why_not()
    ours, int8_bytes = our_experts(gate_up, down)
    (w4a8, w4a16), int4_bytes = four_bit_experts(gate_up, down, [InputActivations(), InputActivations(num_bits=16)])
    arms = {"vllm": vllm_experts(gate_up, down), "ours": ours, "W4A8": w4a8, "W4A16": w4a16}
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
        float_mb=(gate_up.nbytes + down.nbytes) / 1e6, int8_mb=int8_bytes / 1e6, int4_mb=int4_bytes / 1e6,
    )  # fmt: skip
    for tokens, found in figures.items():
        cells = [f"{q[1]:.2f} [{q[0]:.2f}, {q[2]:.2f}], {found['vllm'][1] / q[1]:.2f} x" for q in found.values()]
        text += f"| {tokens} | {cells[0].rpartition(',')[0]} | {' | '.join(cells[1:])} |\n"
    (ROOT / "benchmarks" / "results" / f"{page}.json").write_text(json.dumps(figures, indent=1) + "\n")
    (ROOT / "docs" / f"{page}.md").write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
