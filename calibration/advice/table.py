"""Which scheme, for which hardware, model and use: one table, as data.

docs/which_scheme.md (`python -m benchmarks.which_scheme`) and `smoothquant doctor` draw from it, and from nothing else,
so that they cannot disagree.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Advice:
    """take: a key of TAKE. claims: keys of claims.CLAIMS."""

    take: str
    why: str
    claims: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hardware:
    """ran: what of it we executed. note: what else to know. four: the key of TAKE if only 4 bits fit, or None.

    uses: an Advice for each key of USES.
    """

    name: str
    ran: str
    note: str
    four: str | None
    uses: dict[str, Advice]


@dataclass(frozen=True)
class Topic:
    """A kind of model, or a reason against INT8."""

    name: str
    text: str
    claims: tuple[str, ...] = ()


USES = {"one": "one stream", "many": "many streams", "long": "long prompts"}
# Key -> (what, the command; MODEL stands for the model).
TAKE = {
    "int8": ("INT8, a scale per token", "smoothquant calibrate MODEL -o OUT"),
    "static": ("INT8, static scales where they hold", "smoothquant calibrate MODEL -o OUT --activations static"),
    "w4a16": ("4-bit weights, 16-bit activations", "smoothquant calibrate MODEL -o OUT --bits 4"),
    "w4a8": ("4-bit weights, 8-bit activations", "smoothquant calibrate MODEL -o OUT --bits 4 --activations token"),
    "fp8": ("FP8, rounded by vLLM while loading", "vllm serve MODEL --quantization fp8"),
    "float": ("floating point", "vllm serve MODEL"),
}
NOT_RUN = "nothing: no GPU was available"
_LATENCY = "one stream waits for memory, so that the fewest bytes win; evaluate whether the quality allows 4 bits"
_ARITHMETIC = "arithmetic is the limit, and INT8 tensor cores have twice the rate of 16 bits"
_FLOAT8 = "this GPU multiplies FP8 as fast as INT8, and FP8 loses less"
_GPU_ONE = Advice("w4a16", _LATENCY, ("sync", "2549", "loss 4"))
_FP8 = {"many": Advice("fp8", _FLOAT8, ("lossless", "fp8")), "long": Advice("fp8", _FLOAT8, ("lossless", "fp8"))}
HARDWARE = {
    "a100": Hardware(
        "A100 (compute capability 8.0)", NOT_RUN,
        "INT8 helps where arithmetic is the limit. At batch 1 a fast GPU waits for memory and kernel launches, and "
        "INT8 may gain nothing: measure with `smoothquant evaluate`.", "w4a16", {
            "one": _GPU_ONE,
            "many": Advice("int8", _ARITHMETIC, ("async", "1508")),
            "long": Advice("int8", _ARITHMETIC, ("paper",)),
        },
    ),
    "ampere": Hardware(
        "RTX 3090, A10, A40 (8.6, 8.7)", NOT_RUN,
        "INT8 helps where arithmetic is the limit: at batch 1 it may gain nothing. Where 8 bits do not fit, W4A8 "
        "multiplies prompts in INT8, too.", "w4a8", {
            "one": _GPU_ONE,
            "many": Advice("int8", _ARITHMETIC, ("async",)),
            "long": Advice("int8", _ARITHMETIC, ("w4a8 3090",)),
        },
    ),
    "turing": Hardware(
        "T4 (7.5)", NOT_RUN,
        "This GPU has no BF16: serve with --dtype half. Layers whose sides are no multiples of 16 are refused. INT8 "
        "helps where arithmetic is the limit: at batch 1 it may gain nothing.", "w4a16", {
            "one": _GPU_ONE,
            "many": Advice("int8", _ARITHMETIC, ("turing", "async")),
            "long": Advice("int8", _ARITHMETIC, ("turing",)),
        },
    ),
    "ada": Hardware(
        "L4, L40S, RTX 4090 (8.9)", NOT_RUN,
        "This GPU multiplies FP8 as fast as INT8: use INT8 for checkpoints that must also run on older GPUs.",
        "w4a16", {"one": _GPU_ONE, **_FP8},
    ),
    "hopper": Hardware(
        "H100, H200 (9.0)", NOT_RUN,
        "This GPU multiplies FP8 as fast as INT8: use INT8 for checkpoints that must also run on older GPUs.",
        "w4a16", {"one": _GPU_ONE, **_FP8},
    ),
    "blackwell": Hardware(
        "Blackwell: B200, RTX 50xx (10.0 and above)", NOT_RUN,
        "Blackwell has no CUTLASS INT8 kernel in vLLM: the plugin takes Triton's. FP8 is the fast format of this GPU.",
        "w4a16", {
            use: Advice("fp8", "vLLM has no CUTLASS INT8 kernel for it", ("blackwell", "lossless")) for use in USES
        },
    ),
    "old": Hardware(
        "GPUs before Turing (below 7.5)", NOT_RUN,
        "This GPU has no INT8 tensor cores (compute capability 7.5 and above): vLLM will refuse the checkpoint.", None,
        {use: Advice("float", "vLLM refuses INT8 and 4 bits here", ("turing",)) for use in USES},
    ),
    "amx": Hardware(
        "Xeon with AMX", "nothing: our CPUs have no AMX",
        "AMX: per-token scales run on vLLM's AMX kernel in bfloat16 and float16, and on the plugin's in float32; "
        "static ones run on oneDNN. Use the default scheme.", "w4a8", {
            "one": Advice("int8", "it reads half the bytes of BF16; we have no figure"),
            "many": Advice("int8", "AMX multiplies INT8 at twice the rate of BF16; we have no figure"),
            "long": Advice("int8", "AMX multiplies INT8 at twice the rate of BF16; we have no figure"),
        },
    ),
    "vnni": Hardware(
        "Xeon or EPYC with VNNI", "everything on two cores of an EPYC",
        "With VNNI oneDNN's INT8 product is exact, and serves. Images in the prompt make static scales depend on "
        "images in calibration.", "w4a8", {
            "one": Advice("int8", "it reads half the bytes; 4 bits are faster for one token and slower for prompts",
                          ("vnni one", "vnni head", "vnni 4 one", "vnni 4 long")),
            "many": Advice("int8", "it reads half the bytes, and its products are faster", ("vnni many", "loss")),
            "long": Advice("static", "a scale per token costs a pass over the activations",
                           ("vnni long", "vnni static", "loss", "loss static")),
        },
    ),
    "avx2": Hardware(
        "EPYC or Xeon with AVX2 or AVX-512, without VNNI", "everything on one or two cores of an EPYC",
        "This CPU has no INT8 instructions (VNNI or AMX). Stock vLLM's INT8 product gives wrong sums here; the "
        "plugin's product is correct, and faster than floating point if a C++ compiler (g++) is available to build "
        "it. A CPU with VNNI, or a GPU, is faster.", "w4a8", {
            "one": Advice("int8", "it reads a quarter of the bytes of float32", ("avx2 one", "avx2 4 one", "loss")),
            "many": Advice("int8", "the plugin's exact product is faster than float32", ("avx2 many", "loss")),
            "long": Advice("int8", "the plugin's exact product is faster than float32",
                           ("avx2 long", "avx2 4 long", "loss")),
        },
    ),
    "arm": Hardware(
        "Arm servers, and other CPUs", "nothing",
        "oneDNN serves INT8 where its sums prove exact, else a slow product in float32. 4-bit weights are served "
        "by our kernels on x86 only.", None,
        {use: Advice("int8", "it reads half the bytes of BF16; we have no figure") for use in USES},
    ),
}  # fmt: skip
MODELS = {
    "dense": Topic("dense", "All linear layers but the output head become integers.", ("loss", "loss 0.5B", "loss 4")),
    "experts": Topic(
        "mixture of experts, one matrix for each expert in the files",
        "Routed experts become INT8, a scale per token under every scheme, and have 4 bits with --bits 4. Routers stay "
        "in floating point. On GPUs it takes vLLM 0.32 or newer.",
        ("experts one", "experts 256", "experts vnni", "experts 4"),
    ),
    "stacked experts": Topic(
        "mixture of experts, stacked in the files",
        "Experts stay in floating point, so that only attention and shared experts gain. Take a version of the model "
        "whose files have one matrix for each expert, or another tool.",
    ),
    "hybrid": Topic(
        "hybrid: recurrent layers (state spaces, gated delta rules, short convolutions) beside attention",
        "Their projections become integers, too, where vLLM has quantised layers for them; recurrences stay in "
        "floating point. Only tiny models of this kind ran here, so that no figure is given.",
    ),
    "towers": Topic(
        "reads images or sound",
        "The language part becomes integers; towers and projectors stay in floating point. Calibrate with images, "
        "above all for static scales.",
        ("static text", "static images"),
    ),
}
AGAINST = (
    Topic("FP8 is there (H100, L4, RTX 4090)", "FP8 has INT8's speed, loses less, and needs no calibration.",
          ("lossless", "fp8")),
    Topic("Blackwell", "vLLM has no CUTLASS INT8 kernel from compute capability 10.0 on.", ("blackwell",)),
    Topic("one stream on a fast GPU", "Memory and kernel launches are the limit; the arithmetic of INT8 gains nothing.",
          ("2549", "sync")),
    Topic("INT8 keys and values at long context", "vLLM's INT8 cache runs in the Triton backend alone. For long "
          "contexts use FP8 for the cache, or 16 bits if quality decides.",
          ("int8 cache", "fp8 cache", "16-bit cache")),
    Topic("4-bit weights with 16-bit activations, for prompts on a CPU", "Ours multiplies in float32: widening the "
          "weights costs more than it saves (docs/cpu.md). Take INT8: with VNNI, 4-bit weights are slower beside 8-bit "
          "activations, too.", ("vnni 4 long",)),
    Topic("experts that the files stack", "They stay in floating point: most of the model gains nothing."),
    Topic("4 bits for a small model", "Ours lost much; the paper reports no loss for 34B.",
          ("loss 4", "loss 4x32", "paper 4")),
    Topic("one scale for all tokens, everywhere (--level O3)", "It is the paper's level, and too coarse for modern "
          "models; --activations static keeps a scale per token where it is needed.", ("loss O3", "loss static")),
)  # fmt: skip
_CAPABILITIES = ((100, "blackwell"), (90, "hopper"), (89, "ada"), (81, "ampere"), (80, "a100"), (75, "turing"))


def hardware_of(facts: Mapping[str, Any]) -> list[str]:
    """The keys of HARDWARE that the facts of doctor.examine fit: one of each kind of GPU, or the CPU's."""
    gpus = {gpu["capability"] for gpu in facts["gpus"]}
    if gpus:
        found = (next((key for least, key in _CAPABILITIES if gpu >= least), "old") for gpu in sorted(gpus))
        return list(dict.fromkeys(found))
    return [_cpu(facts["int8_instructions"], facts["x86"])]


def _cpu(instructions: Collection[str], x86: bool) -> str:
    if "AMX" in instructions:
        return "amx"
    return "arm" if not x86 else "vnni" if instructions else "avx2"
