"""Tiny random vision-language models with their processors, built from the configurations of transformers.

`save(name, folder)` writes a model of two decoder layers with a tower of two layers for images of 28 x 28 pixels or
so, a byte tokenizer with the family's special tokens, its image processor and a chat template. The sizes of the
decoders are those of tiny_architectures, outliers in the norms included.
"""

import json
import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from tests.helpers import tiny_architectures, tiny_checkpoints

SPECIAL = (
    "<image>", "<video>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<boi>", "<eoi>",
    "<img>", "</img>", "<IMG_CONTEXT>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>",
    *(f"<row_{i + 1}_col_{j + 1}>" for i in range(2) for j in range(2)), "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>",
    "\n", "\n\n", "\n\n\n", "\n\n\n\n",
)  # fmt: skip
ID = {token: 256 + index for index, token in enumerate(SPECIAL)}
VOCAB = 288
TEMPLATE = (
    "{{% for m in messages %}}{{{{ m['role'] }}}}: {{% if m['content'] is string %}}{{{{ m['content'] }}}}{{% else %}}"
    "{{% for p in m['content'] %}}{{% if p['type'] == 'image' %}}{image}{{% else %}}{{{{ p['text'] }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}{{{{ '\\n' }}}}{{% endfor %}}{{% if add_generation_prompt %}}assistant: {{% endif %}}"
)

TEXT: dict[str, Any] = {k: v for k, v in tiny_architectures.COMMON.items() if v is not None} | {
    "vocab_size": VOCAB, "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": ID["<pad>"],
    "max_position_embeddings": 512,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}
QWEN_IDS: dict[str, Any] = {
    "image_token_id": ID["<|image_pad|>"], "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"], "vision_end_token_id": ID["<|vision_end|>"],
}  # fmt: skip
SIZE = {"height": 28, "width": 28}


@dataclass(frozen=True)
class Family:
    """config: its class and arguments. processor: of the tokenizer. image: what the chat template writes for one.

    tokens: attributes of the tokenizer that the family's processor reads.
    """

    config: tuple[str, dict[str, Any]]
    processor: Callable[[PreTrainedTokenizerFast], Any]
    image: str
    tokens: tuple[tuple[str, str], ...] = ()


def _qwen(kind: str, patch: int = 14) -> Callable[[PreTrainedTokenizerFast], Any]:
    def processor(tokenizer: PreTrainedTokenizerFast) -> Any:
        size = dict.fromkeys(("shortest_edge", "longest_edge"), (4 * patch) ** 2)
        sizes = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2, "size": size}
        images = transformers.Qwen2VLImageProcessor(**sizes)
        videos = getattr(transformers, "Qwen3VLVideoProcessor" if "Qwen3" in kind else "Qwen2VLVideoProcessor")
        return getattr(transformers, kind)(images, tokenizer, videos(**sizes))

    return processor


def _idefics(kind: str) -> Callable[[PreTrainedTokenizerFast], Any]:
    def processor(tokenizer: PreTrainedTokenizerFast) -> Any:
        sizes = {"size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": False}
        images = getattr(transformers, f"{kind}ImageProcessor")(**sizes)
        videos = ()
        if kind == "SmolVLM":
            videos = (transformers.SmolVLMVideoProcessor(size={"longest_edge": 28}, video_sampling={
                "max_frames": 4, "fps": 1, "video_size": {"longest_edge": 28},
            }),)  # fmt: skip
        return getattr(transformers, f"{kind}Processor")(images, tokenizer, *videos, image_seq_len=1)

    return processor


FAMILIES: dict[str, Family] = {
    "gemma3-vl": Family(
        ("Gemma3Config", {
            "text_config": TEXT | {"query_pre_attn_scalar": 64, "sliding_window": 128, "tie_word_embeddings": True},
            "vision_config": TOWER | {"vision_use_head": False}, "mm_tokens_per_image": 4,
            "boi_token_index": ID["<boi>"], "eoi_token_index": ID["<eoi>"], "image_token_index": ID["<image>"],
        }),
        lambda tokenizer: transformers.Gemma3Processor(
            transformers.Gemma3ImageProcessor(size=SIZE), tokenizer, image_seq_length=4
        ),
        "<boi>",
        (("boi_token", "<boi>"), ("eoi_token", "<eoi>"), ("image_token", "<image>")),
    ),
    "llava": Family(
        ("LlavaConfig", {
            "text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER | {"model_type": "clip_vision_model"},
            "image_token_index": ID["<image>"], "image_seq_length": 4,
        }),
        lambda tokenizer: transformers.LlavaProcessor(
            transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=SIZE), tokenizer, patch_size=14,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        ),
        "<image>",
    ),
    "llava-onevision": Family(
        ("LlavaOnevisionConfig", {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_index": ID["<image>"], "video_token_index": ID["<video>"],
            "image_grid_pinpoints": [[28, 28], [28, 56]],
        }),
        lambda tokenizer: transformers.LlavaOnevisionProcessor(
            transformers.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=[[28, 28], [28, 56]]), tokenizer,
            transformers.LlavaOnevisionVideoProcessor(size=SIZE), num_image_tokens=4,
            vision_feature_select_strategy="full",
        ),
        "<image>",
    ),
    "qwen2-vl": Family(
        ("Qwen2VLConfig", QWEN_IDS | {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_TOWER | {"embed_dim": 64, "hidden_size": 128},
        }),
        _qwen("Qwen2VLProcessor"), "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "qwen2.5-vl": Family(
        ("Qwen2_5_VLConfig", QWEN_IDS | {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": QWEN_TOWER | {
                "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128, "window_size": 56,
                "fullatt_block_indexes": [1],
            },
        }),
        _qwen("Qwen2_5_VLProcessor"), "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "qwen3-vl": Family(
        ("Qwen3VLConfig", QWEN_IDS | {
            "text_config": TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
            "vision_config": QWEN_TOWER | {
                "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 128, "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0], "patch_size": 16,
            },
        }),
        _qwen("Qwen3VLProcessor", 16), "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "internvl": Family(
        ("InternVLConfig", {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": TOWER | {"image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": ID["<IMG_CONTEXT>"], "image_seq_length": 1, "tie_word_embeddings": False,
        }),
        lambda tokenizer: transformers.InternVLProcessor(
            transformers.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=False), tokenizer,
            transformers.InternVLVideoProcessor(size=SIZE), image_seq_length=1,
        ),
        "<IMG_CONTEXT>",
        (("start_image_token", "<img>"), ("end_image_token", "</img>"), ("context_image_token", "<IMG_CONTEXT>"),
         ("video_token", "<video>")),
    ),
    "idefics3": Family(
        ("Idefics3Config", {
            "text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER, "image_token_id": ID["<image>"],
            "scale_factor": 2, "pad_token_id": ID["<pad>"],
        }),
        _idefics("Idefics3"), "<image>",
    ),
    "smolvlm": Family(
        ("SmolVLMConfig", {
            "text_config": TEXT | {"model_type": "llama"}, "vision_config": TOWER, "image_token_id": ID["<image>"],
            "scale_factor": 2, "pad_token_id": ID["<pad>"],
        }),
        _idefics("SmolVLM"), "<image>",
    ),
    "mistral3": Family(
        ("Mistral3Config", {
            "text_config": TEXT | {"model_type": "mistral"},
            "vision_config": TOWER | {"model_type": "pixtral", "image_size": 56, "head_dim": 32},
            "image_token_index": ID["[IMG]"], "spatial_merge_size": 2, "tie_word_embeddings": False,
        }),
        lambda tokenizer: transformers.PixtralProcessor(
            transformers.PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}),
            tokenizer, patch_size=14, spatial_merge_size=2,
        ),
        "[IMG]",
    ),
}  # fmt: skip


# Families whose towers have another name on the hub than transformers 5 writes; vLLM reads only that of the hub.
HUB_TOWERS, HUB_TOWER = ("gemma3-vl", "llava", "llava-onevision"), "vision_tower.vision_model."


def tokenizer(tokens: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    """The byte tokenizer with SPECIAL. tokens: attribute -> special token."""
    plain = tiny_checkpoints.tokenizer()
    plain.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    assert plain.convert_tokens_to_ids(list(SPECIAL)) == list(ID.values())
    return PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token=plain.bos_token, eos_token=plain.eos_token,
        pad_token="<pad>", extra_special_tokens=dict(tokens),
    )  # fmt: skip


def build(name: str, seed: int = 0, **text: Any) -> transformers.PreTrainedModel:
    """The tiny model `name`. text: other values for the decoder's configuration."""
    kind, values = FAMILIES[name].config
    config = getattr(transformers, kind)(**(values | {"text_config": values["text_config"] | text}))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    tiny_architectures.add_outliers(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():  # such as Gemma 3's projector: an image would change nothing
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.05, generator=generator)
    return model


def processor(name: str) -> Any:
    family = FAMILIES[name]
    made = family.processor(tokenizer(family.tokens))
    made.chat_template = TEMPLATE.format(image=family.image)
    return made


def save(name: str, folder: Path, **text: Any) -> Path:
    """Write the model `name` with its processor as a Hugging Face folder."""
    return save_folder(name, build(name, **text), processor(name), folder)


def save_folder(name: str, model: transformers.PreTrainedModel, processor: Any, folder: Path) -> Path:
    """Write a model of the family `name` with the names of tensors that files on the hub have."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = folder / "model.safetensors"
    if name in HUB_TOWERS:
        tensors = {re.sub(r"^vision_tower\.", HUB_TOWER, key): value for key, value in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    return folder


def picture(seed: int, size: int = 56) -> Image.Image:
    """A random image in one colour with a rectangle in another."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (2, 3), generator=generator).tolist()
    left, top = torch.randint(0, size // 2, (2,), generator=generator).tolist()
    image = Image.new("RGB", (size, size), tuple(colours[0]))
    image.paste(tuple(colours[1]), (left, top, left + size // 2, top + size // 2))
    return image


def save_pictures(folder: Path, count: int = 8) -> Path:
    """A folder of images with captions, as `datasets` reads it."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    rows = []
    for index in range(count):
        picture(index).save(folder / f"{index}.png")
        caption = "".join(rng.choices(string.ascii_letters + " ", k=40 + index))
        rows.append(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder
