"""Tiny models on disk, with a byte tokenizer and text, to test calibration from model folder to checkpoint."""

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calibration.checkpoint import export
from calibration.pipeline import calibrate
from tests.helpers import tiny_architectures
from vllm_smoothquant.format.files import MANIFEST

SEQ_LEN = 32

SAMPLES = 8


def tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens, one for each byte: it needs no training and no download, and encodes every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=alphabet[1], eos_token=alphabet[2])


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the model `name` of tiny_architectures as a Hugging Face folder."""
    tiny_architectures.build(name).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_pooling(folder: Path, mode: str, channels: int) -> None:
    """Write the files of sentence-transformers beside a model. mode: "lasttoken" or "mean_tokens"."""
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": channels, f"pooling_mode_{mode}": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def save_text(path: Path, documents: int = 12, characters: int = 200) -> Path:
    """Write a JSONL file of random documents."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(string.ascii_letters + " ", k=characters)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def checkpoints(root: Path, dtype: torch.dtype = torch.float32, **defaults: object) -> Callable[..., Path]:
    """get(name, **options) -> a checkpoint of the model `name` of tiny_architectures, made by its first call.

    options: of calibrate; they override `defaults`. `source(folder)` is the model that was calibrated.
    """
    text = save_text(root / "text.jsonl")

    def get(name: str, **options: object) -> Path:
        folder = root / "-".join([name, *(f"{key}={value}" for key, value in options.items())])
        if not folder.exists():
            model = save(name, source(folder), dtype)
            # On random weights the choice of a rotation is a coin flip, and it takes as long as the rest.
            common = {"dataset": str(text), "samples": SAMPLES, "seq_len": SEQ_LEN, "quiet": True, "rotation": "none"}
            calibrate(str(model), folder, **(common | defaults | options))
        return folder

    return get


def source(checkpoint: Path) -> Path:
    return checkpoint.with_name(f"{checkpoint.name}-source")


def rehash(folder: Path) -> None:
    """Update the hashes in the manifest, as an attacker would after changing a checkpoint, so that hashes match."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["quantization_config"] = json.loads((folder / "config.json").read_text())["quantization_config"]
    manifest["files"] = export.file_hashes(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest))
