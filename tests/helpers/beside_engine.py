"""What vLLM does beside plain generation, in one process: prints one JSON object with what each feature answered.

`python -m tests.helpers.beside_engine CHECKPOINT DAMAGED`. DAMAGED: the same checkpoint without one scale.
"""

import gc
import json
import sys
import weakref
from typing import Any

from tests.helpers.engine import DEFAULTS

PROMPT = list(range(3, 99))


def tokens(llm: Any, **sampling: Any) -> list[int]:
    from vllm import SamplingParams

    settings = {"max_tokens": 8, "temperature": 0.0, "detokenize": False, "ignore_eos": True} | sampling
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], SamplingParams(**settings), use_tqdm=False)
    return list(output.outputs[0].token_ids)


def model_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def main(checkpoint: str, damaged: str) -> None:
    from vllm import LLM

    found: dict[str, Any] = {}
    llm = LLM(checkpoint, **DEFAULTS)
    found["plain"] = tokens(llm)
    layer = model_of(llm).model.layers[0].self_attn.qkv_proj
    before = layer.weight.clone()
    llm.collective_rpc("reload_weights")
    found["reloaded"], found["same weights"] = tokens(llm), bool((layer.weight == before).all())
    try:
        llm.collective_rpc("reload_weights", kwargs={"weights_path": damaged})
        found["damaged"] = "accepted"
    except Exception as error:  # what a user would see
        found["damaged"] = f"{type(error).__name__}: {error}"
    del llm, layer, before
    gc.collect()
    llm = LLM(checkpoint, **DEFAULTS | {"enable_prefix_caching": True, "max_num_batched_tokens": 32})
    found["in chunks"], found["from the cache"] = tokens(llm), tokens(llm)
    # Of an engine without a reload, after which vLLM itself keeps every layer, also of models in floating point.
    alive = weakref.ref(model_of(llm).model.layers[0].self_attn.qkv_proj)
    del llm
    gc.collect()
    found["freed"] = alive() is None
    llm = LLM(checkpoint, load_format="dummy", **DEFAULTS)
    found["dummy"] = tokens(llm)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
