"""The files of a data set: which ones a name means, how each is read, and its bytes without compression."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import datasets
import pyarrow

from vllm_smoothquant.format.errors import SmoothQuantError

# Suffix -> the reader of `datasets`.
READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
COMPRESSED = (".gz", ".zst")
SUFFIXES = f"{', '.join(READERS)}, or one of them with {' or '.join(COMPRESSED)}"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NAMED = 8  # files that an error names


def has_pictures(dataset: str) -> bool:
    """Whether `dataset` is a folder of images, with metadata.jsonl (file_name, text) as `datasets` reads it."""
    try:
        return any(path.suffix.lower() in PICTURES for path in Path(dataset).glob("*"))
    except OSError:
        return False


def files_of(dataset: str) -> list[Path] | None:
    """The files that `dataset` means, in the order in which they are read; None for the name of a hub data set.

    A folder with a README.md is a copy of a hub data set, because the page may name its configurations and splits.
    Errors (SmoothQuantError): no such file, a file of a kind that is not read, files of different kinds.
    """
    path = Path(dataset)
    try:
        if not path.is_dir():
            if not path.exists() and path.suffix.lower() not in (*READERS, *COMPRESSED):
                return None
            files = [path]
        elif (path / "README.md").is_file():
            return None
        else:
            files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        folders = [file for file in files if file.is_dir()]
    except OSError as error:
        raise unreadable(path, error) from error
    if not files:
        raise SmoothQuantError(dataset, f"files ending in {SUFFIXES}", "an empty folder", "give some text")
    unread = [f"{file.name}{'/' * (file in folders)}" for file in files if file in folders or not reader_of(file)]
    if unread:
        fix = "convert it" if files == [path] else "convert or move what is not text, or name one of the folders"
        more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
        raise SmoothQuantError(dataset, f"only files ending in {SUFFIXES}", ", ".join(unread[:NAMED]) + more, fix)
    if len(kinds := sorted({_suffix(file) for file in files})) > 1:
        raise SmoothQuantError(dataset, "files that all end alike", " and ".join(kinds), "use one folder for each")
    return files


def reader_of(file: Path) -> str | None:
    """The reader of `datasets` for `file`; None if there is none."""
    return READERS.get(_suffix(file).removesuffix(file.suffix.lower() if _compressed(file) else ""))


def plain_file(file: Path) -> Path:
    """`file`, or its content without compression, which stays in the cache of `datasets` for the next run.

    Errors (SmoothQuantError): no such file, no permission, a damaged or truncated archive, nothing in it.
    """
    try:
        if not file.is_file():
            raise SmoothQuantError(str(file), "a readable file", "no such file", "check the path")
        plain = _unpacked(file) if _compressed(file) else file
        empty = plain.stat().st_size == 0
    except OSError as error:
        raise unreadable(file, error) from error
    if empty:
        raise SmoothQuantError(str(file), "at least one document", "an empty file", "give some text, or remove it")
    return plain


def unreadable(path: Path, error: OSError) -> SmoothQuantError:
    if error.errno is None:  # pyarrow's errors about the content
        return SmoothQuantError(str(path), f"a whole {path.suffix} file", error, "copy or compress it again")
    return SmoothQuantError(str(path), "a file that can be read", error, "check permissions and free space")


def _compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def _suffix(file: Path) -> str:
    """Such as ".jsonl" or ".jsonl.gz"."""
    return "".join(Path(file.stem).suffix + file.suffix if _compressed(file) else file.suffix).lower()


def _unpacked(file: Path) -> Path:
    # pyarrow, because it reads both formats without another package.
    state = file.stat()
    key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
    folder = Path(datasets.config.EXTRACTED_DATASETS_PATH)
    target = folder / (hashlib.sha256(key.encode()).hexdigest() + Path(file.stem).suffix)
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when it is complete, because another process may read it at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        with pyarrow.input_stream(str(file)) as packed, Path(partial, "plain").open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        os.replace(Path(partial, "plain"), target)
    return target
