"""llm-compressor's recipes on given tokens, run by its own interpreter: `python llm_compressor.py REQUEST.json`.

    smoothquant    the scheme and the strength are ours: weights per channel, activations per token (dynamic), alpha 0.5
    w8a8           that scheme alone
    awq, gptq      symmetric 4-bit weights in groups: `groups` has the size of the group -> patterns of layers' names

The output head is not quantized. Prints one JSON line: seconds of loading, of calibrating and of saving.
"""

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
except ImportError:
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier


def recipe(request: dict) -> list:
    """The modifiers of the request's recipe."""
    name = request.get("recipe", "smoothquant")
    if name in ("smoothquant", "w8a8"):
        smoothing = [SmoothQuantModifier(smoothing_strength=0.5)] if name == "smoothquant" else []
        return [*smoothing, QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]
    from llmcompressor.modifiers.quantization import GPTQModifier

    groups = {
        f"group_{size}": {
            "targets": patterns,
            "weights": {
                "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": int(size),
            },
        }
        for size, patterns in request["groups"].items()
    }  # fmt: skip
    if request["recipe"] == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    try:
        from llmcompressor.modifiers.transform.awq import AWQModifier
    except ImportError:
        from llmcompressor.modifiers.awq import AWQModifier
    try:
        return [AWQModifier(config_groups=groups, ignore=["lm_head"])]
    except Exception:  # newer versions separate the two: AWQ moves scales, another modifier rounds
        return [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]


def main() -> None:
    """Load, calibrate, save; print the seconds of each."""
    if not torch.accelerator.is_available():
        # Its AWQ (0.14) pins memory in any case, which torch refuses without an accelerator.
        torch.Tensor.pin_memory = lambda self, *_: self
    with open(sys.argv[1]) as file:
        request = json.load(file)
    clock = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"]))
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    ids = request["input_ids"]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    loaded = time.perf_counter()
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=data,
        recipe=recipe(request),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        **request["options"],
    )
    calibrated = time.perf_counter()
    model.save_pretrained(request["output"], save_compressed=True)
    tokenizer.save_pretrained(request["output"])
    print(json.dumps({
        "load": loaded - clock, "calibrate": calibrated - loaded, "save": time.perf_counter() - calibrated,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
