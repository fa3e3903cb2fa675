"""The tokenizer of a model, and whether it gives the ids of the model's tokenizer.json.

transformers builds the class that tokenizer_config.json names. If that class does not fit the file (a byte-level
tokenizer that declares LlamaTokenizerFast), AutoTokenizer gives other ids than those that the model was trained on.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vllm_smoothquant.format.errors import SmoothQuantError

# Spaces, line breaks, tabs, digits, punctuation, letters beyond ASCII: where tokenizers differ.
PROBE = 'def f(x):\n    return x + 1234  # naïve\n\n\tDon\'t stop: 東京, Ωmega ... "end"'


def load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, whose files are in `folder`. Its ids are those of tokenizer.json, if there is one.

    Errors (SmoothQuantError): there is no tokenizer, or a library that it needs is not installed.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        fix = "check the files of the tokenizer"
        if next(folder.glob("*.model"), None) is not None and not (folder / "tokenizer.json").exists():
            fix = "pip install sentencepiece tiktoken protobuf, or add a tokenizer.json"
        raise SmoothQuantError(name, "a tokenizer that transformers can read", error, fix) from error
    path = folder / "tokenizer.json"
    if not path.is_file():
        return tokenizer
    expected = Tokenizer.from_file(str(path)).encode(PROBE, add_special_tokens=False).ids
    if tokenizer(PROBE, add_special_tokens=False)["input_ids"] == expected:
        return tokenizer
    text = f"tokenizer.json gives other ids than {type(tokenizer).__name__}, which tokenizer_config.json names"
    print(f"{name}: {text}: calibrating with those of tokenizer.json", file=sys.stderr)
    special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=tokenizer.chat_template, **special)
