"""Calibration samples with images, made by the model's own processor: one sample is one row of the data set.

A row has images in a column of images (or of paths), and a text or a chat in the column of documents. In a chat the
parts {"type": "image"} say where the images are, in their order; without such parts they come first.
Rows are not cut, because the tokens of an image belong together.
"""

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from PIL import Image, UnidentifiedImageError
from transformers import AutoProcessor, PreTrainedConfig

from vllm_smoothquant.format.errors import SmoothQuantError

from .chat import Messages, read_messages
from .data_files import files_of
from .documents import is_text

COLUMNS = ("image", "images")
# By these names a configuration says which token stands for an image.
IMAGE_TOKENS = ("image_token_id", "image_token_index")


@dataclass(frozen=True)
class Pictures:
    """processor: of the model. column: of images in the data set. token: the id that stands for one.

    folder: what paths in the column are relative to. chat_template: a Jinja text instead of the processor's.
    """

    processor: Any
    column: str
    token: int
    folder: Path
    chat_template: str | None = None


def image_token(config: PreTrainedConfig) -> int | None:
    """The id of the token that stands for (a part of) an image; None if the model reads text alone."""
    return next((value for name in IMAGE_TOKENS if (value := getattr(config, name, None)) is not None), None)


def find_pictures(table: Dataset, dataset: str, name: str, config: PreTrainedConfig, *, quiet: bool) -> Pictures | None:
    """The images of `table` for the model `name`; None, said on stderr, if the data or the model has none.

    Errors (SmoothQuantError): the processor of the model cannot be loaded.
    """
    columns = [column for column, feature in table.features.items() if _of_images(column, feature)]
    token = image_token(config)
    if token is None or not columns:
        if not quiet and columns:
            print(f"{dataset}: the images of {columns[0]!r} are left out: the model reads text alone", file=sys.stderr)
        if not quiet and token is not None:
            print(
                f"{dataset}: no images, so the ranges of image tokens are not observed; a data set with a column "
                "image would show them", file=sys.stderr,
            )  # fmt: skip
        return None
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of any kind: it imports what the model needs
        fix = "install what is missing, or give texts without images"
        raise SmoothQuantError(name, "a processor for images that transformers can load", error, fix) from error
    files = files_of(dataset) if Path(dataset).is_file() else None
    return Pictures(processor, columns[0], token, files[0].parent if files else Path(dataset))


def read_images(
    table: Dataset, dataset: str, column: str, pictures: Pictures, *, samples: int, seed: int
) -> list[Mapping[str, torch.Tensor]]:
    """The processor's tensors of `samples` rows in shuffled order. column: of texts or chats.

    Errors (SmoothQuantError): fewer rows, a row without an image or with one that cannot be read, or one that the
    processor refuses.
    """
    if len(table) < samples:
        fix = "give more rows, or fewer --samples"
        raise SmoothQuantError(dataset, f"{samples} rows with images", f"{len(table)}", fix)
    order = list(range(len(table)))
    random.Random(seed).shuffle(order)
    return [_tensors(table[index], column, pictures, f"{dataset}: row {index + 1}") for index in order[:samples]]


def without_images(rows: Sequence[Mapping[str, torch.Tensor]], token: int, seq_len: int) -> torch.Tensor:
    """int64 [windows, tokens]: the text of `rows`, joined, for what looks at text alone; at least two windows."""
    text = torch.cat([row["input_ids"][0] for row in rows])
    text = text[text != token]
    length = max(1, min(seq_len, len(text) // 2))
    return text[: len(text) // length * length].reshape(-1, length)


def together(rows: Sequence[Mapping[str, torch.Tensor]], tokens: int) -> dict[str, torch.Tensor]:
    """About `tokens` tokens of `rows` as one batch, filled up on the right; attention_mask says what is a token.

    Only rows whose images have one shape are taken.
    """
    first, chosen = rows[0], list[Mapping[str, torch.Tensor]]()
    for row in rows:
        alike = row.keys() == first.keys() and all(
            row[key].shape[1:] == first[key].shape[1:] for key in first if not _per_token(first, key)
        )
        if alike and sum(r["input_ids"].numel() for r in chosen) < tokens:
            chosen.append(row)
    longest = max(row["input_ids"].shape[1] for row in chosen)

    def filled(row: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
        return torch.nn.functional.pad(row[key], (0, longest - row[key].shape[1])) if _per_token(row, key) else row[key]

    batch = {key: torch.cat([filled(row, key) for row in chosen]) for key in first}
    return {"attention_mask": (batch["input_ids"] * 0 + 1)} | batch


def _per_token(row: Mapping[str, torch.Tensor], key: str) -> bool:
    return row[key].shape == row["input_ids"].shape


def _of_images(column: str, feature: Any) -> bool:
    inner = getattr(feature, "feature", None) or feature
    return isinstance(inner, datasets.Image) or (column in COLUMNS and is_text(inner))


def _tensors(row: Any, column: str, pictures: Pictures, where: str) -> Mapping[str, torch.Tensor]:
    found, processor = row[pictures.column], pictures.processor
    images = [_image(value, pictures.folder, where) for value in (found if isinstance(found, list) else [found])]
    messages = _messages(row[column], len(images), where)
    template = pictures.chat_template or processor.chat_template
    try:
        if template is None:  # a model that was not trained to chat
            words = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
            prompt = processor.image_token * len(images) + "".join(words)
        else:
            prompt = processor.apply_chat_template(messages, chat_template=template, tokenize=False)
        tensors = processor(text=[prompt], images=[images], return_tensors="pt")
    except Exception as error:  # of any kind, because template and processor are the model's
        fix = "correct or remove the row"
        raise SmoothQuantError(where, "images and text that the model's processor takes", error, fix) from error
    return {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}


def _messages(document: Any, count: int, where: str) -> Messages:
    """`document`, a text or a chat, as messages whose contents are lists of parts, `count` of them images."""
    if isinstance(document, str):
        document = [{"role": "user", "content": document}]
    messages, _ = read_messages(document, where)
    for message, given in zip(messages, document, strict=True):
        parts = given.get("content") or given.get("value")
        parts = parts if isinstance(parts, list) else [message["content"] or ""]
        message["content"] = [_part(part, where) for part in parts]
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed not in (0, count):
        expected, fix = f"as many image parts as the row has images ({count})", "correct or remove the row"
        raise SmoothQuantError(where, expected, str(placed), fix)
    if not placed:
        asked = next((message for message in messages if message["role"] == "user"), messages[0])
        asked["content"] = [{"type": "image"}] * count + asked["content"]
    return messages


def _part(part: Any, where: str) -> dict[str, str]:
    kind = "text" if isinstance(part, str) else part.get("type", "text")
    if kind not in ("text", "image"):
        raise SmoothQuantError(where, "parts that are texts or images", kind, "correct or remove the row")
    if kind == "image":
        return {"type": "image"}  # without the image itself, which is in the column
    return {"type": "text", "text": part if isinstance(part, str) else part["text"]}


def _image(value: Any, folder: Path, where: str) -> Image.Image:
    try:
        image = Image.open(folder / value) if isinstance(value, str) else value
        if image is None:
            raise SmoothQuantError(where, "an image", "none", "correct or remove the row")
        return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise SmoothQuantError(where, "an image that can be read", error, "check the path and the file") from error
