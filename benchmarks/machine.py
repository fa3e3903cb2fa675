"""The machine and the versions that the figures of a table were measured with."""

from importlib.metadata import version

from calibration.doctor import machine


def describe() -> str:
    """One sentence: cores, CPU and its instructions, or the GPU; versions."""
    return f"{machine()}; vLLM {version('vllm')}, transformers {version('transformers')}."
