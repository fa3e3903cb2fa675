"""llm-compressor's SmoothQuant on given tokens, run by its own interpreter: `python llm_compressor.py REQUEST.json`.

The scheme and the strength are ours: weights per channel, activations per token (dynamic), alpha 0.5; the output head
is not quantized. Prints one JSON line: seconds of loading, of calibrating and of saving.
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


def main() -> None:
    """Load, calibrate, save; print the seconds of each."""
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
        recipe=[
            SmoothQuantModifier(smoothing_strength=0.5),
            QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
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
