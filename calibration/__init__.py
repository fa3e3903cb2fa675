"""Turn a Hugging Face model into a smoothed INT8 checkpoint: `from calibration import calibrate`.

Nothing is imported until it is used, so that `smoothquant --help` answers at once.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("calibrate", "smooth"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import pipeline

    return getattr(pipeline, name)
