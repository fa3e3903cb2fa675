"""Run vLLM on a checkpoint in a new process and return log-probabilities, for tests that need an engine.

    logprobs(folder, [[1, 2, 3], ...], enforce_eager=True, dtype="float32")  ->  one float32 tensor per prompt

A new process frees all memory at its end and shows a refusal as a user sees it. A token list needs no tokenizer.
"""

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# One engine for one comparison takes 20 s eager and 90 s compiled on two cores. Ten times that means that it hangs.
TIMEOUT_S = 900

DEFAULTS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "float32",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "enable_prefix_caching": False,
}


class EngineFailedError(RuntimeError):
    """vLLM did not start or did not answer; str() is its whole output."""


def small_engine() -> dict[str, str]:
    """The environment of a small engine: all cores of this process, 1 GiB of cache, no network, no second process."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def logprobs(
    checkpoint: str | Path,
    prompts: list[list[int]],
    *,
    vocabulary: bool = False,
    environment: dict[str, str] | None = None,
    **engine_args: Any,
) -> list[torch.Tensor]:
    """Log-probabilities of `prompts` under `checkpoint`, one tensor per prompt of n tokens.

    [n - 1] for the prompt's tokens at positions 1..n-1; with vocabulary=True [n - 1, vocabulary] for all tokens.
    engine_args override DEFAULTS and go to vllm.LLM; environment overrides small_engine(). Raises EngineFailedError.
    """
    return logprobs_of([checkpoint], prompts, vocabulary=vocabulary, environment=environment, **engine_args)[0]


def logprobs_of(
    checkpoints: Sequence[str | Path], prompts: list[list[int]], *, environment: dict[str, str] | None = None,
    **arguments: Any,
) -> list[list[torch.Tensor]]:  # fmt: skip
    """`logprobs` of each of `checkpoints` with the same prompts and arguments."""
    return logprobs_of_all([{"model": c, "prompts": prompts, **arguments} for c in checkpoints], environment)


def logprobs_of_all(
    requests: Sequence[dict[str, Any]], environment: dict[str, str] | None = None
) -> list[list[torch.Tensor]]:
    """The answer to each request, in one process because importing vLLM is half of an engine's start.

    A request has "model", "prompts", optionally "vocabulary", and arguments for vllm.LLM, which override DEFAULTS.
    """
    return elsewhere(_logprobs, [DEFAULTS | r | {"model": str(r["model"])} for r in requests], environment)


def elsewhere(
    function: Callable[[Any], Any], requests: Sequence[Any], environment: Mapping[str, str] | None = None
) -> list[Any]:
    """function(request) of each request, in one new process for all; environment overrides small_engine().

    function: of a module, not inside another one. Requests are sent as JSON, answers come by torch.save. Raises
    EngineFailedError.
    """
    name = sys.modules[function.__module__].__spec__.name if function.__module__ == "__main__" else function.__module__
    with tempfile.TemporaryDirectory() as folder:
        request_file, answer = Path(folder, "requests.json"), Path(folder, "answer.pt")
        request_file.write_text(json.dumps(requests))
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.engine", name, function.__name__, str(request_file), str(answer)],
            env=small_engine() | dict(environment or {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0 or not answer.exists():
            raise EngineFailedError(done.stdout)
        return torch.load(answer)


def logprobs_here(
    llm_args: dict[str, Any], prompts: list[list[int]], *, vocabulary: bool = False
) -> list[torch.Tensor]:
    """The result of `logprobs` by an engine in this process, whose environment should be that of `small_engine()`."""
    from vllm import LLM

    llm = LLM(**llm_args, **({"max_logprobs": -1} if vocabulary else {}))
    return logprobs_by(llm, prompts, vocabulary=vocabulary)


def logprobs_by(llm: Any, prompts: list[list[int]], *, vocabulary: bool = False) -> list[torch.Tensor]:
    """The result of `logprobs` by `llm`."""
    from vllm import SamplingParams

    # 0 requests only the prompt's own tokens.
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1 if vocabulary else 0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    answer = []
    for output, ids in zip(outputs, prompts, strict=True):
        positions = output.prompt_logprobs[1:]
        if vocabulary:
            rows = [[at[token].logprob for token in range(len(at))] for at in positions]
        else:
            rows = [at[token].logprob for at, token in zip(positions, ids[1:], strict=True)]
        answer.append(torch.tensor(rows, dtype=torch.float32))
    return answer


def _logprobs(request: dict[str, Any]) -> list[torch.Tensor]:
    prompts, vocabulary = request.pop("prompts"), request.pop("vocabulary", False)
    return logprobs_here(request, prompts, vocabulary=vocabulary)


def _main(module: str, function: str, request_file: str, answer_file: str) -> None:
    answer = getattr(importlib.import_module(module), function)
    answers = []
    for request in json.loads(Path(request_file).read_text()):
        answers.append(answer(request))
        gc.collect()
    torch.save(answers, answer_file)


if __name__ == "__main__":
    _main(*sys.argv[1:])
