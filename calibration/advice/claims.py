"""Every figure and statement that an advice rests on, with its source. The advice is in table.py.

The value of an `Ours` is written here, because an installed package has no benchmarks; `python -m
benchmarks.which_scheme` and tests/test_which_scheme.py compare each with the file or the page that it comes from.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ours:
    """A figure of this project. text: with {} for the value. page: of docs.

    where: the path to the figure in benchmarks/results/PAGE.json, or the row's first cells and the column in the page.
    """

    text: str
    page: str
    where: tuple[str, ...]
    value: str

    @property
    def sentence(self) -> str:
        return self.text.format(self.value)


@dataclass(frozen=True)
class Published:
    """What others measured or state. source: who, and where to read it."""

    sentence: str
    source: str
    address: str


_KURTIC = ("Kurtic et al., arXiv 2411.02355", "https://arxiv.org/abs/2411.02355")
_DOCS = "https://docs.vllm.ai/en/v0.32.0/features/quantization/llm_compressor"
_L, _S = ("1.1B", "compiled", "default"), ("SmolLM2", "compiled")
CLAIMS: dict[str, Ours | Published] = {
    "avx2 one": Ours("a step takes {} of float32's time (0.92 G)", "serving", (*_L, "decode 1"), "0.32"),
    "avx2 many": Ours("a step of 16 takes {} of float32's time (0.92 G)", "serving", (*_L, "decode 16"), "0.57"),
    "avx2 long": Ours("1,024 tokens take {} of float32's time (0.92 G)", "serving", (*_L, "prefill 1024"), "0.63"),
    "avx2 4 one": Ours(
        "4-bit weights with 8-bit activations: a product for one token takes {} of ours in INT8", "products",
        ("Llama 1.1B gate, up", "1", "W4A8 / INT8"), "0.56",
    ),
    "avx2 4 long": Ours(
        "4-bit weights with 8-bit activations: a product for 256 tokens takes {} of ours in INT8",
        "products", ("Llama 1.1B gate, up", "256", "W4A8 / INT8"), "0.84",
    ),
    "vnni one": Ours("a step takes {} of BF16's time (135 M)", "serving_vnni", (*_S, "default", "decode 1"), "0.89"),
    "vnni head": Ours(
        "a step takes {} of BF16's time with --quantize-lm-head (135 M)", "serving_vnni",
        (*_S, "default, INT8 head", "decode 1"), "0.83",
    ),
    "vnni many": Ours(
        "a step of 16 takes {} of BF16's time (135 M)", "serving_vnni", (*_S, "default", "decode 16"), "0.87"
    ),
    "vnni long": Ours(
        "1,024 tokens take {} of BF16's time with a scale per token (135 M)", "serving_vnni",
        (*_S, "default", "prefill 1024"), "0.80",
    ),
    "vnni static": Ours(
        "1,024 tokens take {} of BF16's time with static scales (135 M)", "serving_vnni",
        (*_S, "static, rotated", "prefill 1024"), "0.72",
    ),
    "vnni 4 one": Ours(
        "4-bit weights with 8-bit activations: a product for one token takes {} of oneDNN's in INT8", "products_vnni",
        ("Llama 1.1B gate, up", "1", "W4A8 / oneDNN"), "0.54",
    ),
    "vnni 4 long": Ours(
        "4-bit weights with 8-bit activations: a product for 256 tokens takes {} of oneDNN's in INT8", "products_vnni",
        ("Llama 1.1B gate, up", "256", "W4A8 / oneDNN"), "2.09",
    ),
    "experts one": Ours("AVX2: INT8 experts are {} times as fast for one token", "experts", ("1", "ours"), "1.39"),
    "experts 256": Ours("AVX2: INT8 experts are {} times as fast for 256 tokens", "experts", ("256", "ours"), "2.12"),
    "experts vnni": Ours(
        "VNNI: INT8 experts are {} times as fast for 256 tokens", "experts_vnni", ("256", "ours"), "2.11"
    ),
    "experts 4": Ours(
        "VNNI: experts with 4-bit weights and 8-bit activations are {} times as fast for 256 tokens", "experts_vnni",
        ("256", "W4A8"), "1.61",
    ),
    "loss": Ours(
        "perplexity changes by {} (135 M)", "accuracy", ("SmolLM2-135M-Instruct", "per token (default)"), "+0.79%"
    ),
    "loss 0.5B": Ours(
        "perplexity changes by {} (0.5 G)", "accuracy", ("Qwen2.5-Coder-0.5B-Instruct", "per token (default)"), "+0.44%"
    ),
    "loss static": Ours(
        "perplexity changes by {} with --activations static (135 M)", "accuracy",
        ("SmolLM2-135M-Instruct", "static (--activations static)"), "+1.29%",
    ),
    "loss O3": Ours("perplexity changes by {} (135 M)", "accuracy", ("SmolLM2-135M-Instruct", "O3"), "+8.56%"),
    "loss 4": Ours(
        "perplexity changes by {} with --bits 4 (135 M)", "four_bits",
        ("SmolLM2-135M-Instruct", "128", "default (--bits 4)"), "+14.38%",
    ),
    "loss 4x32": Ours(
        "perplexity changes by {} with --bits 4 --group-size 32 (135 M)", "four_bits",
        ("SmolLM2-135M-Instruct", "32", "default (--bits 4)"), "+11.95%",
    ),
    "fp8 cache": Ours("KL of INT8 with an FP8 cache: {}", "kv_cache", ("INT8", "fp8"), "0.0377"),
    "16-bit cache": Ours("KL of INT8 with the cache in the model's dtype: {}", "kv_cache", ("INT8", "auto"), "0.0103"),
    "static text": Ours(
        "KL of static scales calibrated on text alone: {} millionths of a nat", "vision", ("static, text alone",),
        "316.24",
    ),
    "static images": Ours(
        "KL of static scales calibrated with images: {} millionths of a nat", "vision", ("static",), "0.99"
    ),
    "paper": Published(
        "up to 1.56 times as fast as FP16 with half the memory", "SmoothQuant, arXiv 2211.10438",
        "https://arxiv.org/abs/2211.10438",
    ),
    "paper 4": Published(
        "W4A16 on one A100 40GB: no loss, 1.9 to 4.0 times the throughput of FP16 on two (Code Llama 34B)",
        "SmoothQuant+, arXiv 2312.03788", "https://arxiv.org/abs/2312.03788",
    ),
    "1508": Published(
        "INT8 with a scale per token on an A100: 29 % more throughput at 14 requests a second (Llama 13B)",
        "vLLM #1508", "https://github.com/vllm-project/vllm/pull/1508",
    ),
    "sync": Published("W4A16 is the most cost-efficient where requests come one at a time (synchronous)", *_KURTIC),
    "async": Published("W8A8 is ahead under continuous batching (asynchronous)", *_KURTIC),
    "lossless": Published("FP8 is effectively lossless, tuned INT8 loses 1 to 3 % of accuracy (Llama 3.1)", *_KURTIC),
    "fp8": Published("FP8: up to 1.6 times the throughput", "vLLM's documentation", f"{_DOCS}/fp8/"),
    "blackwell": Published(
        "stock vLLM does not support INT8 from compute capability 10.0 on", "vLLM's documentation",
        "https://docs.vllm.ai/en/latest/features/quantization/int8/",
    ),
    "turing": Published(
        "W8A8 INT8 and W4A16 from compute capability 7.5, FP8 from 8.9", "llm-compressor's documentation",
        "https://docs.vllm.ai/projects/llm-compressor/en/0.11.0/steps/choosing-scheme/",
    ),
    "w4a8 3090": Published(
        "W4A8 against W4A16 on two RTX 3090 (27B, SGLang): prompts of 10,000 tokens 49 % faster, decoding 5 to 8 % "
        "slower", "club-3090 #1346", "https://github.com/noonghunna/club-3090/pull/1346",
    ),
    "int8 cache": Published(
        "an INT8 cache on an RTX 3090 (27B): decoding as fast as with FP8 at 8K, 34 % slower at 60K",
        "qwen38-27b-rtx3090 #117", "https://github.com/syv-ai/qwen38-27b-rtx3090/pull/117",
    ),
    "2549": Published(
        "a user found W8A8 slower than FP16 with an 8B model; the maintainers advise W4A16 for latency",
        "llm-compressor #2549", "https://github.com/vllm-project/llm-compressor/issues/2549",
    ),
}  # fmt: skip


def sources(claims: Sequence[str]) -> list[tuple[str, str, str]]:
    """(sentence, source, address) of each claim; the address of a page of ours is relative to docs."""
    found = []
    for claim in (CLAIMS[key] for key in claims):
        if isinstance(claim, Ours):
            found.append((claim.sentence, f"docs/{claim.page}.md", f"{claim.page}.md"))
        else:
            found.append((claim.sentence, claim.source, claim.address))
    return found
