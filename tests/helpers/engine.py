"""Run vLLM on a checkpoint in a process of its own and bring back log-probabilities, for tests that need an engine.

    logprobs(folder, [[1, 2, 3], ...], enforce_eager=True, dtype="float32")  ->  one float32 tensor per prompt

A fresh process frees everything at its end and shows a refusal as a user sees it. A token list needs no tokenizer.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# One engine for one comparison: 20 s eager, 90 s compiled on two cores. Ten times that means it hangs.
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
    """vLLM did not start or did not answer; str() is everything it wrote."""


def small_engine() -> dict[str, str]:
    """The environment a small engine wants here: all our cores, 1 GiB of cache, no network, no second process."""
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
    """Log-probabilities of `prompts` under `checkpoint`, one tensor a prompt of n tokens.

    [n - 1] for the tokens that came, at positions 1..n-1; with vocabulary=True [n - 1, vocabulary] for all that could.
    engine_args go to vllm.LLM over DEFAULTS, environment over small_engine(). Raises EngineFailedError.
    """
    return logprobs_of([checkpoint], prompts, vocabulary=vocabulary, environment=environment, **engine_args)[0]


def logprobs_of(
    checkpoints: Sequence[str | Path],
    prompts: list[list[int]],
    *,
    vocabulary: bool = False,
    environment: dict[str, str] | None = None,
    **engine_args: Any,
) -> list[list[torch.Tensor]]:
    """`logprobs` of each of `checkpoints`, one engine after the other in one process: importing vLLM is half of it."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "request.json"), Path(folder, "answer.pt")
        request.write_text(
            json.dumps(
                {
                    "llms": [{"model": str(c), **DEFAULTS, **engine_args} for c in checkpoints],
                    "prompts": prompts,
                    "vocabulary": vocabulary,
                    "answer": str(answer),
                }
            )
        )
        done = subprocess.run(
            [sys.executable, __file__, str(request)],
            env=small_engine() | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0 or not answer.exists():
            raise EngineFailedError(done.stdout)
        return torch.load(answer)


def generate(llm_args: dict[str, Any], prompts: list[list[int]], *, vocabulary: bool = False) -> list[torch.Tensor]:
    """What `logprobs` returns, by an engine in this process; `small_engine()` should hold here."""
    from vllm import LLM

    return ask(LLM(**llm_args, **({"max_logprobs": -1} if vocabulary else {})), prompts, vocabulary=vocabulary)


def ask(llm: Any, prompts: list[list[int]], *, vocabulary: bool = False) -> list[torch.Tensor]:
    """What `logprobs` returns, by `llm`."""
    from vllm import SamplingParams

    # 0 asks for the token that came and no other.
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


def _main(request: dict[str, Any]) -> None:
    answers = []
    for llm in request["llms"]:
        answers.append(generate(llm, request["prompts"], vocabulary=request["vocabulary"]))
        gc.collect()
    torch.save(answers, request["answer"])


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text()))
