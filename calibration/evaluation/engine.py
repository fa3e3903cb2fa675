"""The process that measure.py starts: `python -m calibration.evaluation.engine REQUESTS ANSWERS`.

REQUESTS: a JSON file, a list of objects (measure.make_request). ANSWERS: a file that gets one JSON object a line.
Nothing else imports this module, because it needs vLLM.
"""

import ctypes
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
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt
from vllm.logprobs import Logprob
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.platforms import current_platform

from vllm_smoothquant.linear import SmoothQuantLinearMethod

from ..running.progress import anonymous_bytes
from .columns import standard_error

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

# Number of the baseline's likeliest words whose probabilities are stored; all other words are joined into one.
LIKELIEST = 256


class Agreement:
    """How far the next-token distributions of a model are from a baseline's; same prompts in the same order.

        KL = sum over words w of p(w) log(p(w) / q(w))     p the baseline's, q this model's; in nats, mean over tokens

    The words are the baseline's LIKELIEST, and all others as one. Joining words can only lower KL, and the joined words
    have little probability.
    """

    def __init__(self, baseline: list[dict[str, torch.Tensor]] | None) -> None:
        """baseline: the `distributions` of the baseline; None to collect them from this model."""
        self.baseline = baseline
        self.distributions: list[dict[str, torch.Tensor]] = []
        self.figures: list[torch.Tensor] = []  # [2, rows] of each prompt: divergence, same likeliest word (0 or 1)

    def add(self, logits: torch.Tensor | None) -> None:
        """logits [rows, words]: of a prompt if it has several rows, else of the generated token, which is ignored."""
        if logits is None or len(logits) < 2:
            return
        logprobs = logits.detach().float().log_softmax(-1)
        if self.baseline is None:
            top = logprobs.topk(min(LIKELIEST, logprobs.shape[1]))
            self.distributions.append({"words": top.indices.to("cpu", torch.int32), "logprobs": top.values.cpu()})
            return
        expected = self.baseline[len(self.figures)]
        words = expected["words"].to(logprobs.device, torch.int64)
        p, q = with_rest(expected["logprobs"].to(logprobs.device)), with_rest(logprobs.gather(1, words))
        agrees = words[:, 0] == logprobs.argmax(-1)
        self.figures.append(torch.stack([(p.exp() * (p - q)).sum(-1), agrees.float()]).cpu())

    def result(self) -> dict[str, float] | None:
        """kl_divergence in nats per token; top1_agreement: share of tokens whose likeliest word is the baseline's.

        kl_standard_error: of kl_divergence over the prompts, if there are several.
        """
        if not self.figures:
            return None
        kl_divergence, top1_agreement = torch.cat(self.figures, dim=1).double().mean(1).tolist()
        means = [float(figures[0].double().mean()) for figures in self.figures]
        return {
            "kl_divergence": kl_divergence, "top1_agreement": top1_agreement,
            **({"kl_standard_error": standard_error(means)} if len(means) > 1 else {}),
        }  # fmt: skip


def with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """[rows, words] with another column: the logarithm of 1 minus all probabilities, of at least float32's epsilon."""
    rest = (1 - logprobs.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(torch.float32).eps)
    return torch.cat([logprobs, rest.log()], dim=1)


class MeasuredWorker(Worker):
    """The platform's own worker. It also measures the memory that loading the weights adds."""

    def load_model(self, **kwargs: Any) -> None:
        without_weights = held_bytes()
        super().load_model(**kwargs)
        self.weight_bytes = held_bytes() - without_weights

    def memory_of_weights(self) -> int:
        return self.weight_bytes

    def start_agreement(self, keep: str | None, compare: str | None) -> None:
        """From now on collect each prompt's distribution for the file `keep`, or compare it with the file `compare`."""
        self.agreement = Agreement(None if compare is None else torch.load(compare))
        self.keep = keep
        (processor,) = (m for m in self.get_model().modules() if isinstance(m, LogitsProcessor))
        self.hook = processor.register_forward_hook(lambda module, args, logits: self.agreement.add(logits))

    def finish_agreement(self) -> dict[str, float] | None:
        """The agreement; None without `compare`, and on a rank that has no logits."""
        self.hook.remove()
        if self.keep is not None and self.agreement.distributions:
            torch.save(self.agreement.distributions, self.keep)
        return self.agreement.result()

    def peak_memory(self) -> tuple[int, int]:
        """(process id, its largest memory so far): on a GPU the bytes that torch reserved, else resident pages."""
        return os.getpid(), peak_resident() if current_platform.is_cpu() else torch.cuda.max_memory_reserved()

    def kernels(self) -> list[str]:
        """Names of the kernels that compute our quantised layers (vllm_smoothquant/kernels/select.py)."""
        methods = (getattr(module, "quant_method", None) for module in self.get_model().modules())
        return sorted({m.kernel.name for m in methods if isinstance(m, SmoothQuantLinearMethod)})


def held_bytes() -> int:
    """Memory in use by this process: on the GPU if there is one, else anonymous pages (without mapped files)."""
    if not current_platform.is_cpu():
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # return free memory of the allocator to the system
    return anonymous_bytes()


def peak_resident() -> int:
    """The most resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def prompt_logprobs(llm: LLM, prompts: list[list[int]], *, batched: bool = True) -> list[list[Logprob]]:
    """Of each token of each prompt except the first, which no token precedes."""
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    outputs = llm.generate(inputs, parameters) if batched else [llm.generate([i], parameters)[0] for i in inputs]
    return [
        [candidates[token] for token, candidates in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(prompts, outputs, strict=True)
    ]


def score(llm: LLM, windows: list[list[int]], *, keep: str | None, compare: str | None) -> dict[str, Any]:
    """perplexity, scored_tokens, window_losses: mean -log p of each; `compare` adds the agreement with its model."""
    agreement = keep is not None or compare is not None
    if agreement:
        llm.collective_rpc("start_agreement", args=(keep, compare))
    # One window at a time for an agreement, because the logits must come in the order of the windows.
    scored = [[p.logprob for p in window] for window in prompt_logprobs(llm, windows, batched=not agreement)]
    logprobs = [logprob for window in scored for logprob in window]
    result: dict[str, Any] = {
        "perplexity": math.exp(-statistics.fmean(logprobs)), "scored_tokens": len(logprobs),
        "window_losses": [-statistics.fmean(window) for window in scored],
    }  # fmt: skip
    for figures in llm.collective_rpc("finish_agreement") if agreement else []:
        result |= figures or {}
    return result


def last_word(llm: LLM, passages: list[dict[str, Any]]) -> dict[str, float]:
    """last_word_accuracy, as evaluation/last_word.py defines it."""
    logprobs = prompt_logprobs(llm, [passage["ids"] for passage in passages])
    targets = [ps[-passage["target"] :] for passage, ps in zip(passages, logprobs, strict=True)]
    correct = [all(p.rank == 1 for p in target) for target in targets]
    return {"last_word_accuracy": statistics.fmean(correct), "passages": len(correct)}


def seconds(llm: LLM, prompts: list[TokensPrompt], tokens: int) -> float:
    """The time to generate `tokens` tokens after each of `prompts`, all together."""
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
    return time.perf_counter() - start


def decode_speed(
    llm: LLM, windows: list[list[int]], *, batch: int, prompt_tokens: int, new_tokens: int, repeats: int
) -> float:
    """Generated tokens per second of all prompts together, without the time of the prompts and of a first token."""
    prompts = [TokensPrompt(prompt_token_ids=windows[i % len(windows)][:prompt_tokens]) for i in range(batch)]
    seconds(llm, prompts, 2)  # warm-up
    times = [seconds(llm, prompts, 1 + new_tokens) - seconds(llm, prompts, 1) for _ in range(repeats)]
    return statistics.median(batch * new_tokens / t for t in times)


def serving(
    llm: LLM, windows: list[list[int]], *, prompt_tokens: int, new_tokens: int, batches: list[int], repeats: int
) -> dict[str, float]:
    """first_token_seconds of a single prompt, tokens_per_second_batch_N of N prompts together, peak_memory_bytes.

    Medians of `repeats`, measured at the engine: no HTTP, no queue. On a CPU the memory is the sum over all processes,
    in which shared pages count once for each process.
    """
    prompt = [TokensPrompt(prompt_token_ids=windows[0][:prompt_tokens])]
    times = [seconds(llm, prompt, 1) for _ in range(1 + repeats)]
    figures = {"first_token_seconds": statistics.median(times[1:])}  # the first one is the warm-up
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    for batch in batches:
        figures[f"tokens_per_second_batch_{batch}"] = decode_speed(llm, windows, batch=batch, **sizes)
    peaks: dict[int, int] = dict(llm.collective_rpc("peak_memory"))
    if current_platform.is_cpu():
        peaks.setdefault(os.getpid(), peak_resident())
    return figures | {"peak_memory_bytes": sum(peaks.values())}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Every figure of `request` (measure.make_request), measured by a new engine."""
    llm = LLM(
        request["model"],
        worker_cls="calibration.evaluation.engine.MeasuredWorker",
        # The same prompts are timed several times: their keys and values must not come from a cache.
        enable_prefix_caching=False,
        **request["engine"],
    )
    result: dict[str, Any] = {
        "memory_bytes": sum(llm.collective_rpc("memory_of_weights")),
        "kernels": sorted(set().union(*llm.collective_rpc("kernels"))),
    }
    # First, because the logits of whole prompts, which no server holds, would be the memory's peak.
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
    with answer_file.open("w") as answers:
        for number, request in enumerate(json.loads(request_file.read_text())):
            if number > 0:
                cleanup_dist_env_and_memory()  # frees the previous engine, because this one measures its own memory
            print(json.dumps(answer(request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
