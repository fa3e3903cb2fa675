"""Run vLLM on vision-language checkpoints with an image in the prompt, in a process of its own (as engine.py).

answers([folder, ...])  ->  for each folder, for each of PICTURES: (token ids, log-probabilities) of the prompt
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.helpers import engine, tiny_vision

PICTURES = (0, 1)
QUESTION = "what is it?"
Answer = list[tuple[list[int], torch.Tensor]]


def prompt(processor: Any) -> str:
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )


def inputs(folder: Path, picture: int) -> dict[str, torch.Tensor]:
    """What the model of `folder` reads for the prompt with the image number `picture`."""
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return processor(text=[prompt(processor)], images=[[tiny_vision.picture(picture)]], return_tensors="pt")


def answers(folders: Sequence[Path]) -> list[Answer]:
    """Log-probabilities float32 [tokens - 1, vocabulary] of the prompt under each checkpoint, in one process."""
    return engine.elsewhere(answer, list(map(str, folders)))


def answer(folder: str) -> Answer:
    """The answer of one checkpoint, by an engine in this process."""
    from vllm import LLM, SamplingParams

    text = prompt(transformers.AutoProcessor.from_pretrained(folder))
    arguments = engine.DEFAULTS | {"skip_tokenizer_init": False, "max_num_seqs": 2}
    llm = LLM(folder, limit_mm_per_prompt={"image": 1}, max_logprobs=-1, **arguments)
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    found = []
    for picture in PICTURES:
        request = {"prompt": text, "multi_modal_data": {"image": tiny_vision.picture(picture)}}
        (output,) = llm.generate([request], sampling, use_tqdm=False)
        rows = [[at[token].logprob for token in range(len(at))] for at in output.prompt_logprobs[1:]]
        found.append((list(output.prompt_token_ids), torch.tensor(rows)))
    return found
