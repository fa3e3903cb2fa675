"""Run vLLM with LoRA in a new process: next-token log-probabilities with and without adapters.

    answers([{"model": folder, "prompts": [[1, 2], ...], "adapters": [None, folder, ...]}, ...])

gives, for each request and adapter, a float32 tensor [prompts, vocabulary], or the text of the error. vLLM's CPU LoRA
cannot compute log-probabilities of prompts, of a float model either, so that each prompt gives those of the next token.
"""

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.helpers.engine import DEFAULTS, TIMEOUT_S, EngineFailedError, small_engine
from tests.helpers.lora import RANK


def answers(requests: list[dict[str, Any]]) -> list[list[torch.Tensor | str]]:
    with tempfile.TemporaryDirectory() as folder:
        request_file, answer = Path(folder, "requests.json"), Path(folder, "answer.pt")
        request_file.write_text(json.dumps(requests, default=str))
        command = [sys.executable, "-m", "tests.helpers.lora_engine", str(request_file), str(answer)]
        done = subprocess.run(
            command, env=small_engine(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode != 0 or not answer.exists():
            raise EngineFailedError(done.stdout + done.stderr)
        return torch.load(answer)


def _answer(llm: Any, prompts: list[list[int]], number: int, adapter: str | None) -> torch.Tensor | str:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    request = None if adapter is None else LoRARequest(f"adapter-{number}", number, adapter)
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False, lora_request=request
        )
    except Exception as error:  # what a user would see
        return f"{type(error).__name__}: {error}"
    first = [output.outputs[0].logprobs[0] for output in outputs]
    return torch.tensor([[each[token].logprob for token in range(len(each))] for each in first])


def _main(request_file: str, answer_file: str) -> None:
    from vllm import LLM

    found = []
    for request in json.loads(Path(request_file).read_text()):
        llm = LLM(
            **DEFAULTS, model=request["model"], enable_lora=True, max_lora_rank=RANK, max_loras=1, max_logprobs=-1
        )
        prompts = request["prompts"]
        found.append([_answer(llm, prompts, number + 1, path) for number, path in enumerate(request["adapters"])])
        del llm
        gc.collect()
    torch.save(found, answer_file)


if __name__ == "__main__":
    _main(*sys.argv[1:])
