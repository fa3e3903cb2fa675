"""The process that evaluate.py starts for each model: `python -m calibration.evaluation.engine REQUEST ANSWER`, two
JSON files.

Nothing else imports this module: it needs vLLM.
"""

import ctypes
import gc
import json
import math
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.logprobs import Logprob
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.platforms import current_platform

from vllm_smoothquant.linear import SmoothQuantLinearMethod

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

# Of the baseline's distribution over the vocabulary this many of the likeliest words are kept, and the rest as one.
LIKELIEST = 256


class Agreement:
    """How far one model's distributions of the next token are from another's, prompt by prompt in the same order.

        KL = sum over words w of p(w) log(p(w) / q(w))     p the baseline's, q this model's; in nats, mean over tokens

    The words are the baseline's LIKELIEST, and all others as one: joining words can only lower KL, and these are few.
    """

    def __init__(self, baseline: list[dict[str, torch.Tensor]] | None) -> None:
        self.baseline = baseline
        self.kept: list[dict[str, torch.Tensor]] = []
        self.divergence: list[torch.Tensor] = []
        self.agrees: list[torch.Tensor] = []

    def see(self, logits: torch.Tensor | None) -> None:
        """logits [rows, words]: of a prompt where there are several rows, else of the token that is generated."""
        if logits is None or len(logits) < 2:
            return
        logprobs = logits.detach().float().log_softmax(-1)
        if self.baseline is None:
            top = logprobs.topk(min(LIKELIEST, logprobs.shape[1]))
            self.kept.append({"words": top.indices.to("cpu", torch.int32), "logprobs": top.values.cpu()})
            return
        before = self.baseline[len(self.divergence)]
        words = before["words"].to(logprobs.device, torch.int64)
        p, q = with_rest(before["logprobs"].to(logprobs.device)), with_rest(logprobs.gather(1, words))
        self.divergence.append((p.exp() * (p - q)).sum(-1).cpu())
        self.agrees.append((words[:, 0] == logprobs.argmax(-1)).cpu())

    def result(self) -> dict[str, float] | None:
        """kl_divergence in nats per token; top1_agreement: share of tokens whose likeliest word is the baseline's."""
        if not self.divergence:
            return None
        return {
            "kl_divergence": float(torch.cat(self.divergence).double().mean()),
            "top1_agreement": float(torch.cat(self.agrees).double().mean()),
        }


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """[rows, words] with the logarithm of what is left of 1 as another column; of float32's epsilon if nothing is."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)
    return torch.cat([logprobs, rest.log()], dim=1)


class MeasuredWorker(Worker):
    """The platform's own worker, which notes what loading the weights added to the memory it holds."""

    def load_model(self, **kwargs: Any) -> None:
        before = held_bytes()
        super().load_model(**kwargs)
        self.weights_added = held_bytes() - before

    def memory_of_weights(self) -> int:
        return self.weights_added

    def watch_prompts(self, keep: str | None, compare: str | None) -> None:
        """From now on each prompt's logits are kept in the file `keep`, or compared with those in `compare`."""
        self.agreement = Agreement(None if compare is None else torch.load(compare))
        self.keep = keep
        (processor,) = (m for m in self.get_model().modules() if isinstance(m, LogitsProcessor))
        self.hook = processor.register_forward_hook(lambda module, args, logits: self.agreement.see(logits))

    def unwatch_prompts(self) -> dict[str, float] | None:
        """What came of it; None on a rank that has no logits, and where nothing was compared."""
        self.hook.remove()
        if self.keep is not None and self.agreement.kept:
            torch.save(self.agreement.kept, self.keep)
        return self.agreement.result()

    def peak_memory(self) -> tuple[int, int]:
        """(process, the most memory it ever held): on the GPU what torch reserved, else resident pages."""
        if not current_platform.is_cpu():
            return os.getpid(), torch.cuda.max_memory_reserved()
        return os.getpid(), peak_resident()

    def kernels(self) -> list[str]:
        """What computes our quantised layers, by the names of vllm_smoothquant/kernels/select.py."""
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


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def prompt_logprobs(llm: LLM, prompts: list[list[int]], *, together: bool = True) -> list[list[Logprob]]:
    """Of each token of each prompt but the first, which has nothing before it."""
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    outputs = llm.generate(asked, parameters) if together else [llm.generate([a], parameters)[0] for a in asked]
    return [
        [candidates[token] for token, candidates in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(prompts, outputs, strict=True)
    ]


def score(llm: LLM, windows: list[list[int]], *, keep: str | None, compare: str | None) -> dict[str, float]:
    """perplexity, scored_tokens and, with `compare`, the agreement with the model whose logits are in that file."""
    watched = keep is not None or compare is not None
    if watched:
        llm.collective_rpc("watch_prompts", args=(keep, compare))
    # Watched, one window at a time: the order of the logits is then the order of the windows.
    logprobs = [p.logprob for found in prompt_logprobs(llm, windows, together=not watched) for p in found]
    answer: dict[str, float] = {"perplexity": math.exp(-statistics.fmean(logprobs)), "scored_tokens": len(logprobs)}
    for agreement in llm.collective_rpc("unwatch_prompts") if watched else []:
        answer |= agreement or {}
    return answer


def last_word(llm: LLM, passages: list[dict[str, Any]]) -> dict[str, float]:
    """last_word_accuracy, as evaluation/last_word.py defines it."""
    found = prompt_logprobs(llm, [p["ids"] for p in passages])
    right = [
        all(p.rank == 1 for p in logprobs[-passage["target"] :])
        for passage, logprobs in zip(passages, found, strict=True)
    ]
    return {"last_word_accuracy": statistics.fmean(right), "passages": len(right)}


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


def serving(
    llm: LLM, windows: list[list[int]], *, prompt_tokens: int, new_tokens: int, batches: list[int], repeats: int
) -> dict[str, float]:
    """first_token_seconds of one prompt alone, tokens_per_second_batch_N of N together, peak_memory_bytes until then.

    Medians of `repeats`. Asked of the engine itself: no HTTP, no queue. On a CPU the memory is that of all processes,
    pages that two of them share counted twice.
    """
    prompt = [TokensPrompt(prompt_token_ids=windows[0][:prompt_tokens])]
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        seconds.append(time.perf_counter() - start)
    answer = {"first_token_seconds": statistics.median(seconds[1:])}  # the first warms up
    for batch in batches:
        speed = decode_speed(
            llm, windows, batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats
        )
        answer[f"tokens_per_second_batch_{batch}"] = speed
    peaks: dict[int, int] = dict(llm.collective_rpc("peak_memory"))
    if current_platform.is_cpu():
        peaks.setdefault(os.getpid(), peak_resident())
    return answer | {"peak_memory_bytes": sum(peaks.values())}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Everything that `request` (measure.request) asks for, by a new engine."""
    llm = LLM(
        request["model"],
        worker_cls="calibration.evaluation.engine.MeasuredWorker",
        # The same prompts are timed again and again: their keys and values must not come from a cache.
        enable_prefix_caching=False,
        **request["engine"],
    )
    result: dict[str, Any] = {
        "memory_bytes": sum(llm.collective_rpc("memory_of_weights")),
        "kernels": sorted(set().union(*llm.collective_rpc("kernels"))),
    }
    # Before anything else: the logits of whole prompts, which no server holds, would be the peak.
    if request["serve"]:
        result |= serving(llm, request["windows"], **request["serve"])
    if request["score"]:
        result |= score(llm, request["windows"], keep=request["keep"], compare=request["compare"])
    if request["passages"]:
        result |= last_word(llm, request["passages"])
    if request["decode"]:
        result["decode_tokens_per_second"] = decode_speed(llm, request["windows"], **request["decode"])
    return result


def main() -> None:
    request_file, answer_file = map(Path, sys.argv[1:])
    answers = []
    for request in json.loads(request_file.read_text()):
        answers.append(answer(request))
        answer_file.write_text(json.dumps(answers))
        gc.collect()


if __name__ == "__main__":
    main()
