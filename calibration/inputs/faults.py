"""Why a data set could not be read. This is looked for after a failure only, because it reads the files once more."""

import codecs
import json
from pathlib import Path

from vllm_smoothquant.format.errors import SmoothQuantError

from .data_files import SUFFIXES, files_of, plain_file, reader_of, unreadable

CHUNK = 1 << 20
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def explain(dataset: str, error: Exception) -> SmoothQuantError:
    """`error`, which `datasets` raised while it read `dataset`, as one line that names the file and the line in it."""
    files = files_of(dataset)
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if files is None:
        expected = f"a data set: a file ending in {SUFFIXES}, a folder of them, or a hub name"
        fix = "check the path or the name, and that the hub can be reached"
        return SmoothQuantError(dataset, expected, cause, fix)
    for file in files:
        plain, reader = plain_file(file), reader_of(file)
        try:
            fault = _not_utf8(file, plain) if reader != "parquet" else None
            if fault is None and reader == "json":
                fault = _not_json(file, plain)
        except OSError as unread:
            fault = unreadable(file, unread)
        if fault is not None:
            return fault
    where = str(files[0]) if len(files) == 1 else dataset
    if isinstance(cause, OSError):
        return unreadable(files[0], cause)
    if isinstance(cause, UnicodeDecodeError):
        return SmoothQuantError(where, "text in UTF-8", cause, "convert the text to UTF-8")
    if "corresponds to no data" in str(cause) or isinstance(cause, StopIteration):
        return SmoothQuantError(where, "at least one document", "no row", "give some text")
    expected = f"a sound {files[0].suffix} file" if len(files) == 1 else "sound files with the same columns"
    return SmoothQuantError(where, expected, cause, "check how it was written")


def _not_utf8(file: Path, plain: Path) -> SmoothQuantError | None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with plain.open("rb") as stream:
        chunk = stream.read(CHUNK)
        while True:
            # UTF-16 has a NUL byte in each letter of English; UTF-8 has none.
            if chunk.startswith(UTF16) or b"\0" in chunk:
                return _convert(file, "UTF-16 or binary data", "utf-16")
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                return _convert(file, f"byte {error.object[error.start]:#04x} in line {line}", "latin1")
            if not chunk:
                return None
            line += chunk.count(b"\n")
            chunk = stream.read(CHUNK)


def _convert(file: Path, got: str, encoding: str) -> SmoothQuantError:
    fix = f"convert it, such as with iconv -f {encoding} -t utf-8"
    return SmoothQuantError(str(file), "text in UTF-8", got, fix)


def _not_json(file: Path, plain: Path) -> SmoothQuantError | None:
    """A line that is no JSON, unless the whole file is one JSON value."""
    with plain.open(encoding="utf-8-sig", newline="\n") as lines:
        faults = ((line, _json_fault(line, number)) for number, line in enumerate(lines, 1) if line.strip())
        line, fault = next(((line, fault) for line, fault in faults if fault is not None), ("", None))
        if line.lstrip().startswith("[") or line.strip() == "{":  # one value in several lines
            lines.seek(0)
            fault = _json_fault(lines.read(), 1)
    if fault is None:
        return None
    return SmoothQuantError(f"{file}: line {fault[0]}", "JSON", fault[1], "correct or remove the line")


def _json_fault(text: str, first_line: int) -> tuple[int, str] | None:
    """(line, what is wrong) of `text`, which starts in `first_line`; None if it is one JSON value."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return first_line + error.lineno - 1, f"{error.msg} (column {error.colno})"
    except RecursionError:
        return first_line, "values within values beyond measure"
    return None
