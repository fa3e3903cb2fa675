"""The files of a model beside its weights and config.json, which a checkpoint gets unchanged, byte for byte.

transformers would write another tokenizer than it read, and refuses to write a generation config that it reads. Only
files that a library reads are copied, because a folder may also hold files of its user.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from vllm_smoothquant.format.errors import SmoothQuantError

# sentence-transformers' list of modules; each has a folder with a configuration, and some have weights.
MODULES = "modules.json"
# Tokenizer; chat template; processors; generation; pooling; licence.
PATTERNS = (
    "tokenizer*.json", "tokenizer.model*", "*.tiktoken", "*.spm", "spiece.model", "sentencepiece*.model", "vocab.*",
    "merges.txt", "added_tokens.json", "special_tokens_map.json", "tekken.json", "*_vocab.json",
    "chat_template*", "*.jinja", "additional_chat_templates/*.jinja",
    "*processor_config.json", "processor.json", "generation_config.json",
    MODULES, "config_sentence_transformers.json", "sentence_*_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def model_folder(name: str) -> Path:
    """The local folder of `name` (a folder or a hub id) with its side files; those of a hub id are downloaded."""
    if Path(name).is_dir():
        return Path(name)
    patterns = ["config.json", *PATTERNS]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        modules = [f"{path}/*" for path in _module_paths(folder)]
        return Path(snapshot_download(name, allow_patterns=[*patterns, *modules])) if modules else folder
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        fix = "check the name and the network"
        raise SmoothQuantError(name, "a model whose files can be downloaded", error, fix) from error


def side_files(folder: Path) -> Iterator[str]:
    """Names of the side files in `folder`, relative to it."""
    modules = [f"{path}/*" for path in _module_paths(folder)]
    for path in sorted({path for pattern in (*PATTERNS, *modules) for path in folder.glob(pattern)}):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def copy_side_files(folder: Path, output: Path) -> None:
    for name in side_files(folder):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, output / name)


def _module_paths(folder: Path) -> list[str]:
    """Folders of the modules that sentence-transformers lists, without the model itself, whose path is empty."""
    if not (folder / MODULES).is_file():
        return []
    # A list, which read_json would refuse: it reads objects only.
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "correct the file, or remove it if the model is not a sentence-transformers model"
        raise SmoothQuantError(str(folder / MODULES), "a list of modules with paths", error, fix) from error
    for path in paths:
        if path and not (folder / path).resolve().is_relative_to(folder.resolve()):
            raise SmoothQuantError(str(folder / MODULES), "paths inside the model's folder", path, "correct the file")
    return [path for path in paths if path]
