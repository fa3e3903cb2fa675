"""Generate by vLLM with a draft, in a process of its own (engine.py), and count the guesses.

speak([{"model": ..., "speculative_config": {...}, "new": 24, "prompts": [[1, 2], ...]}])  ->  for each request, for
each prompt: (new tokens, tokens guessed, guesses accepted)
"""

from collections.abc import Sequence
from typing import Any

from tests.helpers import engine

GUESSED, ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
Spoken = list[tuple[list[int], int, int]]


def speak(requests: Sequence[dict[str, Any]], environment: dict[str, str] | None = None) -> list[Spoken]:
    return engine.elsewhere(_speak, requests, environment)


def _speak(request: dict[str, Any]) -> Spoken:
    from vllm import LLM, SamplingParams

    prompts, new = request.pop("prompts"), request.pop("new")
    llm = LLM(**engine.DEFAULTS | {"disable_log_stats": False} | request)
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)

    def counts() -> list[int]:
        values = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
        return [int(values.get(name, 0)) for name in (GUESSED, ACCEPTED)]

    found, before = [], counts()
    for prompt in prompts:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        after = counts()
        found.append((list(output.outputs[0].token_ids), after[0] - before[0], after[1] - before[1]))
        before = after
    return found
