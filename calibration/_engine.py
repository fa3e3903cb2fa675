"""The process that evaluate.py starts for each model: `python -m calibration._engine REQUEST ANSWER`, two JSON files.

Nothing else imports this module: it needs vLLM.
"""

import ctypes
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.platforms import current_platform

from vllm_smoothquant.linear import SmoothQuantLinearMethod

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class MeasuredWorker(Worker):
    """The platform's own worker, which notes what loading the weights added to the memory it holds."""

    def load_model(self, **kwargs: Any) -> None:
        before = held_bytes()
        super().load_model(**kwargs)
        self.weights_added = held_bytes() - before

    def memory_of_weights(self) -> int:
        return self.weights_added

    def kernels(self) -> list[str]:
        """What computes our quantised layers, by the names of vllm_smoothquant/kernels.py."""
        methods = (getattr(module, "quant_method", None) for module in self.get_model().modules())
        return sorted({m.kernel.name for m in methods if isinstance(m, SmoothQuantLinearMethod)})


def held_bytes() -> int:
    """Memory held by this process now: on the GPU if there is one, else anonymous pages (mapped files are not)."""
    if not current_platform.is_cpu():
        return torch.cuda.memory_allocated()
    # Freed memory that the allocator keeps for later is not held by anything.
    ctypes.CDLL(None).malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def score(llm: LLM, windows: list[list[int]]) -> tuple[float, int]:
    """(perplexity, scored tokens)."""
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=w) for w in windows], parameters)
    logprobs = []
    for window, output in zip(windows, outputs, strict=True):
        # Position 0 has nothing before it: vLLM gives None there.
        for token, candidates in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            logprobs.append(candidates[token].logprob)
    return math.exp(-statistics.fmean(logprobs)), len(logprobs)


def decode_speed(
    llm: LLM, windows: list[list[int]], *, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> float:
    """Generated tokens per second, all prompts together; the time of the prompts and of a first token is taken off."""
    prompts = [TokensPrompt(prompt_token_ids=windows[i % len(windows)][:prompt_tokens]) for i in range(batch)]

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - start

    seconds(2)  # warm-up
    return statistics.median(batch * new_tokens / (seconds(1 + new_tokens) - seconds(1)) for _ in range(repeats))


def main() -> None:
    request_file, answer_file = map(Path, sys.argv[1:])
    request = json.loads(request_file.read_text())
    llm = LLM(
        request["model"],
        worker_cls="calibration._engine.MeasuredWorker",
        # The same prompts are timed again and again: their keys and values must not come from a cache.
        enable_prefix_caching=False,
        **request["engine"],
    )
    answer: dict[str, Any] = {
        "memory_bytes": sum(llm.collective_rpc("memory_of_weights")),
        "kernels": sorted(set().union(*llm.collective_rpc("kernels"))),
    }
    if request["score"]:
        answer["perplexity"], answer["scored_tokens"] = score(llm, request["windows"])
    if request["decode"]:
        answer["decode_tokens_per_second"] = decode_speed(llm, request["windows"], **request["decode"])
    answer_file.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
