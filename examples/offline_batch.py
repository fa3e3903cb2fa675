"""Many prompts at once, without a server: vLLM's LLM() reads a checkpoint that `smoothquant calibrate` wrote.

python examples/offline_batch.py SmolLM2-INT8
"""

import argparse

from vllm import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "The capital of Italy is",
    "The capital of Japan is",
    "Water boils at a temperature of",
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("--enforce-eager", action="store_true")
    args = parser.parse_args()
    # The checkpoint names its quantization, and vLLM loads the plugin automatically.
    llm = LLM(args.checkpoint, max_model_len=512, enforce_eager=args.enforce_eager)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


# vLLM starts processes that import this file again; without this guard each of them would start more.
if __name__ == "__main__":
    main()
