"""A small OPT, trained here: the paper's own architecture (LayerNorm, biases, ReLU), which no package contains.

`python -m benchmarks.small_opt` creates the model in .cache/ once and prints its folder; `--steps` is the length of the
training. The training text is that of calibration; accuracy is measured on other articles. A few minutes on one core do
not make a good language model, but the weights are trained and not random.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks import training
from demo import assets

NAME = "OPT-2M"
VOCABULARY, POSITIONS = 2048, 512
STEPS, BATCH, LENGTH, LEARNING_RATE = 800, 8, 128, 2e-3
END = "</s>"
CONFIG = OPTConfig(
    vocab_size=VOCABULARY, hidden_size=192, word_embed_proj_dim=192, num_hidden_layers=4, ffn_dim=768,
    num_attention_heads=6, max_position_embeddings=POSITIONS, dropout=0.0, bos_token_id=0, eos_token_id=0,
    pad_token_id=0,
)  # fmt: skip


def model_dir(steps: int = STEPS) -> Path:
    """A Hugging Face folder of the trained model in float32."""
    target = assets.CACHE / f"{NAME}-{steps}"
    if not target.is_dir():
        with assets.made(target) as folder:
            save_trained(OPTForCausalLM, CONFIG, folder, steps)
    return target


def _texts() -> list[str]:
    return [json.loads(line)["text"] for line in assets.calibration_text().read_text().splitlines()]


def save_trained(kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, steps: int) -> None:
    """Train a `kind` of model from scratch and save it, with its tokenizer, in `folder`."""
    torch.manual_seed(0)
    tokenizer = _tokenizer()
    _train(kind(config), tokenizer, steps).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(_texts(), vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)


def _train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, steps: int) -> PreTrainedModel:
    ids = torch.tensor([token for text in _texts() for token in [0, *tokenizer(text).input_ids]])
    draw = torch.Generator().manual_seed(0)

    def losses() -> Iterator[torch.Tensor]:
        while True:
            starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=draw)
            batch = torch.stack([ids[start : start + LENGTH] for start in starts])
            yield model(input_ids=batch, labels=batch).loss

    training.fit(model.parameters(), losses(), steps, LEARNING_RATE, weight_decay=0.1)
    return model.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    print(model_dir(parser.parse_args().steps))
