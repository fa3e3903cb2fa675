"""Many prompts at once, without a server: vLLM's LLM() reads a checkpoint that `smoothquant calibrate` wrote.

python examples/offline_batch.py SmolLM2-INT8
"""

import sys

from vllm import LLM, SamplingParams

PROMPTS = [
    "The capital of France is",
    "The capital of Italy is",
    "The capital of Japan is",
    "Water boils at a temperature of",
]


def main() -> None:
    # The checkpoint says that it is SmoothQuant; vLLM finds the plugin by itself.
    llm = LLM(sys.argv[1], max_model_len=512)
    for output in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


# vLLM starts processes that import this file again: without the guard, each would start more.
if __name__ == "__main__":
    main()
