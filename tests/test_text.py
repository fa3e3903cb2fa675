"""Calibration samples: full windows of any file, from many documents first, the same for the same seed.

Texts are compared with what a byte tokenizer decodes, chats with a template that is rendered by hand.
"""

import csv
import gzip
import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from datasets import Dataset
from datasets.packaged_modules.json.json import JsonConfig
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, LlamaConfig, MptConfig

from calibration import __main__ as cli
from calibration.inputs import chat, text
from calibration.inputs.model import Source, check_seq_len
from calibration.options import Options
from calibration.pipeline import calibrate
from calibration.recipe import RECIPE
from tests.helpers import tiny_checkpoints
from tests.helpers.tiny_checkpoints import save_text, tokenizer
from vllm_smoothquant.format.errors import SmoothQuantError

datasets.disable_progress_bars()  # their lines are on stderr, which tests read

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def load(path, tokens=None, **options):
    options = {"text_column": "text", "samples": 4, "seq_len": 16, "seed": 0} | options
    return text.load_samples(str(path), tokens or tokenizer(), **options)


def decoded(samples):
    return [tokenizer().decode(row) for row in samples.input_ids]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path, texts):
    path.write_text(jsonl({"text": t} for t in texts))
    return path


def fault(path, *parts, **options):
    """The error of `path`, in one line, which contains `parts`."""
    with pytest.raises(SmoothQuantError) as caught:
        load(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message
    return message


def test_every_window_is_full_and_from_the_text(tmp_path):
    texts = ["a" * 40, "b" * 40, "c" * 7, "d" * 7, "e" * 7]
    samples = load(write(tmp_path / "t.jsonl", texts), samples=5)
    assert samples.input_ids.shape == (5, 16)
    assert sum(set(d) in ({"a"}, {"b"}) for d in decoded(samples)) == 4  # two from each long document
    assert any(set(d) <= set("cde") for d in decoded(samples))  # short documents, joined


def test_each_long_document_is_seen_before_any_is_seen_twice(tmp_path):
    samples = load(write(tmp_path / "t.jsonl", [letter * 160 for letter in "abcdefgh"]), samples=8)
    assert sorted(d[0] for d in decoded(samples)) == list("abcdefgh")


def test_the_seed_decides_which_samples(tmp_path):
    path = save_text(tmp_path / "t.jsonl")
    assert load(path).sha256 == load(path).sha256
    assert load(path).sha256 != load(path, seed=1).sha256


def test_the_samples_of_a_seed_do_not_change(tmp_path):
    """The hash is that of the first release: checkpoints that recipes describe must stay the same."""
    path = save_text(tmp_path / "t.jsonl")
    assert load(path, samples=20, seed=3).sha256 == "040a889adfd3f04bfab604fea1bdaeaf877d68825acb8ed260036e61cc7fc83b"


# Files


def content(suffix, column="text", value="x" * 100):
    """The bytes of a file with one document."""
    if suffix == ".txt":
        return value.encode()
    if suffix == ".parquet":
        Dataset.from_dict({column: [value]}).to_parquet(stream := io.BytesIO())
        return stream.getvalue()
    if suffix == ".csv":
        csv.writer(stream := io.StringIO()).writerows([[column], [value]])
        return stream.getvalue().encode()
    return json.dumps([{column: value}] if suffix == ".json" else {column: value}).encode()


PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True)}
SUFFIXES = [".txt", ".jsonl", ".json", ".parquet", ".csv"]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_file_holds_the_same_text(tmp_path, suffix, packed):
    path = tmp_path / f"t{suffix}{packed}"
    path.write_bytes(PACK[packed](content(suffix)))
    assert decoded(load(path)) == ["x" * 16] * 4


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "UPPER.JSONL"])
def test_a_file_name_is_no_pattern(tmp_path, name):
    write(tmp_path / "a1.jsonl", ["b" * 100])
    assert decoded(load(write(tmp_path / name, ["x" * 100]))) == ["x" * 16] * 4


def test_another_text_column(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(jsonl([{"id": 1, "note": "y" * 200}]))
    assert decoded(load(path, text_column="note")) == ["y" * 16] * 4


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path, suffix):
    path = tmp_path / f"t{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + content(suffix))
    assert decoded(load(path)) == ["x" * 16] * 4


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    whole = write(tmp_path / "whole.jsonl", [letter * 20 for letter in "abcdef"])
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / ".hidden").write_text("not read")
    for number, letters in (("2", "cd"), ("10", "ab"), ("3", "ef")):  # "10" < "2" < "3"
        write(folder / f"{number}.jsonl", [letter * 20 for letter in letters])
    assert load(folder).sha256 == load(whole).sha256


def test_a_folder_of_texts_has_one_document_in_each_file(tmp_path):
    for letter in "abcd":
        (tmp_path / f"{letter}.txt").write_text(letter * 20 + "\n\n" + letter * 20)
    assert sorted(d[0] for d in decoded(load(tmp_path))) == list("abcd")


FOLDERS = {
    "no file": ({".hidden": b"x"}, "an empty folder"),
    "two formats": ({"a.csv": b"text\nx", "b.jsonl": b"{}"}, ".csv and .jsonl"),
    "compressed and not": ({"a.jsonl": b"{}", "b.jsonl.gz": b"{}"}, ".jsonl and .jsonl.gz"),
    "unread": ({"a.jsonl": b"{}", "b.docx": b"", "c": b""}, "b.docx, c;"),
    "a folder": ({"a.jsonl": b"{}", "deep/b.jsonl": b"{}"}, "deep/;"),
    "an empty file": ({"a.jsonl": content(".jsonl"), "b.jsonl": b""}, "b.jsonl: expected at least one document"),
    "other columns": ({"a.jsonl": content(".jsonl"), "b.jsonl": b'{"note": "x"}'}, "the same columns"),
    "one in latin-1": (
        {"a.jsonl": content(".jsonl"), "b.jsonl": b'{"text": "\xe9"}'},
        "b.jsonl: expected text in UTF-8",
    ),
}


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS)
def test_each_fault_of_a_folder_names_the_files(tmp_path, files, message):
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    fault(tmp_path, message)


def test_a_copy_of_a_hub_data_set_has_its_splits(tmp_path):
    """A README.md marks it; `datasets` reads it as it reads the hub."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    write(tmp_path / "train.jsonl", ["a" * 100])
    write(tmp_path / "test.jsonl", ["b" * 100])
    assert decoded(load(f"{tmp_path}@test")) == ["b" * 16] * 4
    fault(f"{tmp_path}@nosplit", 'Unknown split "nosplit"', "['train', 'test']")
    fault(f"{tmp_path}:noconfig@test", "'noconfig' not found")


FAULTS = {
    "no such file": (".jsonl", None, {}, "no such file"),
    "no such archive": (".jsonl.gz", None, {}, "no such file"),
    "another file": (".docx", b"x", {}, "files ending in .txt, .jsonl"),
    "empty file": (".jsonl", b"", {}, "an empty file"),
    "blank lines": (".jsonl", b"\n\n", {}, "got no row"),
    "empty archive": (".jsonl.gz", gzip.compress(b""), {}, "an empty file"),
    "not packed": (".jsonl.zst", content(".jsonl"), {}, "a whole .zst file"),
    "truncated gz": (".jsonl.gz", gzip.compress(bytes(range(256)) * 99)[:-20], {}, "Truncated"),
    "truncated zst": (".csv.zst", PACK[".zst"](content(".csv"))[:-3], {}, "Truncated"),
    "truncated parquet": (".parquet", content(".parquet")[:-9], {}, "a sound .parquet file"),
    "no json": (".jsonl", b"{broken", {}, "line 1: expected JSON"),
    "a broken line": (
        ".jsonl",
        content(".jsonl") + b'\n\n{"text": "x\n' + content(".jsonl"),
        {},
        "line 3: expected JSON",
    ),
    "a broken list": (".json", b'[\n{"text": "x"},\n{"text" "x"}\n]', {}, "line 3: expected JSON"),
    "a number": (".json", b"3", {}, "a sound .json file"),
    "a list without rows": (".json", b"[]", {}, "got no row"),
    "a repeated key": (".jsonl", b'{"text": "a", "text": "b"}', {}, "specified twice"),
    "an object of columns": (".json", b'{"text": ["a", "b"]}', {}, "columns text (list of string)"),
    "an object of rows": (".json", b'{"data": [{"text": "a"}]}', {}, "columns data (list of {text: string})"),
    "a heading only": (".csv", b"text\n", {}, "got no row"),
    "an open quote": (".csv", b'text\n"abc\n', {}, "EOF inside string"),
    "no such column": (".csv", b"id,note\n1,x\n", {}, "columns id (int64), note (string)"),
    "numbers": (".jsonl", b'{"text": 1}', {}, "columns text (int64)"),
    "lists of numbers": (".jsonl", b'{"text": [1, 2]}', {}, "columns text (list of int64)"),
    "objects": (".jsonl", b'{"text": {"a": 1.5}}', {}, "columns text ({a: float64})"),
    "mixed types": (".jsonl", b'{"text": 1}\n{"text": "a"}', {}, "row 1 of 'text': expected a text"),
    "only blanks": (".jsonl", b'{"text": " "}\n{"text": null}', {}, "2 of 2 rows of text are empty"),
    "only null": (".csv", b"text,id\n,1\n,2\n", {}, "2 of 2 rows of text are empty"),
    "too little": (".jsonl", jsonl([{"text": "abcdefghijklmnopqrst"}]).encode(), {}, "enough for 1"),
    "too little with blanks": (".jsonl", jsonl([{"text": "a" * 20}, {"text": ""}]).encode(), {}, "1 of 2 rows of text"),
    "no samples": (".jsonl", b'{"text": "abc"}\n', {"samples": 0}, "at least 1"),
    "no length": (".jsonl", b'{"text": "abc"}\n', {"seq_len": 0}, "at least 1"),
}


@pytest.mark.parametrize(("suffix", "data", "options", "message"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_an_error_in_one_line(tmp_path, capfd, suffix, data, options, message):
    path = tmp_path / f"t{suffix}"
    if data is not None:
        path.write_bytes(data)
    capfd.readouterr()
    fault(path, message, **options)
    assert capfd.readouterr().err == ""  # no library printed it as well


def test_a_column_of_bytes_is_named(tmp_path):
    Dataset.from_dict({"text": [b"abc"], "id": [1]}).to_parquet(str(tmp_path / "t.parquet"))
    fault(tmp_path / "t.parquet", "columns text (binary), id (int64)")


ENCODINGS = {"latin-1": "latin1", "UTF-16": "utf-16", "UTF-16 without a mark": "utf-16-le"}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_another_encoding_is_an_error_that_names_the_file(tmp_path, suffix, encoding, packed):
    document = {".txt": "café", ".csv": "text\ncafé\n", ".jsonl": '{"text": "café"}\n', ".json": '[{"text": "café"}]'}
    path = tmp_path / f"t{suffix}{packed}"
    path.write_bytes(PACK[packed](document[suffix].encode(encoding)))
    fault(path, f"{path}: expected text in UTF-8", seq_len=2)


def test_another_encoding_that_shows_only_in_a_later_row_names_its_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(content(".jsonl") + b'\n{"text": "caf\xe9"}\n')
    fault(path, "byte 0xe9 in line 2", samples=99)
    with pytest.raises(SmoothQuantError, match="byte 0xe9 in line 2"):
        text.read_texts(str(path), "text")


def test_a_column_in_another_encoding_in_parquet(tmp_path):
    path = tmp_path / "t.parquet"
    latin = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), path)
    fault(path, "t.parquet: expected text in UTF-8")


# Rows


def test_empty_rows_are_skipped_and_counted(tmp_path, capsys):
    texts = ["a" * 40, "", None, "b" * 40, "  \n"]
    samples = load(write(tmp_path / "t.jsonl", texts))
    assert samples.skipped == 3
    assert capsys.readouterr().err.endswith("t.jsonl: 3 of 5 rows of text are empty: skipped, the first is row 2\n")
    assert load(write(tmp_path / "full.jsonl", ["a" * 40, "b" * 40])).skipped == 0
    assert capsys.readouterr().err == ""


def test_rows_that_are_not_read_are_not_counted(tmp_path, capsys):
    samples = load(write(tmp_path / "t.jsonl", [""] * 50 + ["a" * 20] * 50))
    read = samples.skipped + 4
    assert f"{samples.skipped} of {read} rows (100 in all) of text are empty" in capsys.readouterr().err


def with_image_token():
    tokens = tokenizer()
    tokens.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokens


def test_a_token_beyond_the_embedding_is_named(tmp_path):
    path = write(tmp_path / "t.jsonl", ["words " * 30 + "<image>" * (i == 5) + "words " * 2 for i in range(12)])
    fault(path, "token 256 (<image>)", "256 rows", tokens=with_image_token(), samples=120, vocab_rows=256)
    assert load(path, with_image_token(), samples=120, vocab_rows=257).input_ids.max() == 256
    load(path, with_image_token(), samples=12, vocab_rows=256)  # the first window of each row has none


# Chats

CHAT = [{"role": "user", "content": "a question " * 5}, {"role": "assistant", "content": "an answer " * 5}]
SHARE = [{"from": "human", "value": "a question " * 5}, {"from": "gpt", "value": "an answer " * 5}]
PARTS = [{"role": "user", "content": [
    {"type": "text", "text": "a question " * 2}, {"type": "image_url", "image_url": {"url": "u"}},
    {"type": "text", "text": "a question " * 3}]}, CHAT[1]]  # fmt: skip
RENDERED = "<user>" + "a question " * 5 + "<assistant>" + "an answer " * 5


def chat_tokenizer(template=TEMPLATE):
    """A tokenizer that puts BOS before each text, with a template that writes BOS itself."""
    tokens = tokenizer()
    bos = (tokens.bos_token, tokens.bos_token_id)
    tokens.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokens.chat_template = template
    return tokens


def write_chat(path, *rows, column="messages"):
    path.write_text(jsonl({column: row} for row in rows))
    return path


def load_chat(path, tokens=None, **options):
    return load(path, tokens or chat_tokenizer(), **{"samples": 1, "seq_len": len(RENDERED) + 1} | options)


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(
    ("column", "rows"),
    [("messages", [CHAT]), ("conversations", [SHARE]), ("messages", [PARTS]), ("messages", [PARTS, CHAT])],
)
def test_chats_pass_the_template_with_each_special_token_once(tmp_path, capsys, column, rows, default):
    path = write_chat(tmp_path / "chat.jsonl", *rows, column=column)
    samples = load_chat(path, samples=len(rows), **{} if default else {"text_column": column})
    expected = [tokenizer().bos_token_id, *tokenizer()(RENDERED)["input_ids"]]
    assert samples.input_ids.tolist() == [expected] * len(rows)
    said = capsys.readouterr().err.splitlines()
    assert sum(f"the chats of '{column}' are used" in line for line in said) == default
    assert sum(line.endswith("parts of messages that are no text: 1 left out") for line in said) == (PARTS in rows)
    assert len(said) == default + (PARTS in rows)


def test_shares_roles_and_others(tmp_path):
    row = [{"from": "system", "value": "s"}, *SHARE, {"from": "tool", "value": "t"}]
    rendered = f"<system>s{RENDERED}<tool>t"
    samples = load_chat(write_chat(tmp_path / "chat.jsonl", row, column="conversations"), seq_len=len(rendered) + 1)
    assert decoded(samples) == [tokenizer().bos_token + rendered]


def test_texts_keep_the_tokenizers_special_tokens(tmp_path):
    samples = load(write(tmp_path / "t.jsonl", ["x" * 100]), chat_tokenizer(), samples=1)
    assert samples.input_ids[0].tolist() == [tokenizer().bos_token_id, *tokenizer()("x" * 15)["input_ids"]]


def test_a_template_from_a_file_replaces_the_tokenizers(tmp_path):
    path, template = write_chat(tmp_path / "chat.jsonl", CHAT), tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    for tokens in (chat_tokenizer(), chat_tokenizer(None)):
        samples = load_chat(path, tokens, seq_len=10, chat_template=str(template))
        assert decoded(samples) == ["[a questio"]


def test_a_template_of_a_vision_model_gets_the_texts_as_parts(tmp_path):
    """Such a template passes over content that is a text."""
    template = (
        "{% for m in messages %}{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
        "{{ c.text }}{% endfor %}{% endfor %}"
    )
    samples = load_chat(write_chat(tmp_path / "chat.jsonl", CHAT), chat_tokenizer(template), seq_len=11)
    assert decoded(samples) == ["a question "]


def test_a_template_that_prints_the_day_gives_the_same_samples_every_day(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    samples = load_chat(write_chat(tmp_path / "chat.jsonl", CHAT), chat_tokenizer(template), seq_len=11)
    assert decoded(samples) == [chat.DAY.strftime("%d %b %Y")]


def test_a_call_of_a_tool_needs_no_content(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": None}}}]}
    template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls[0].function.name if m.tool_calls }}{% endfor %}"
    path = write_chat(tmp_path / "chat.jsonl", [{"role": "user", "content": "call"}, call])
    assert decoded(load_chat(path, chat_tokenizer(template), seq_len=9)) == ["callNonef"]


def test_empty_chats_are_skipped_and_counted(tmp_path, capsys):
    blank = [{"role": "user", "content": " "}, {"role": "assistant", "content": ""}]
    path = write_chat(tmp_path / "chat.jsonl", CHAT, None, [], blank, CHAT)
    assert load_chat(path, samples=2, seed=2).skipped == 3
    assert "3 of 5 rows of messages are empty: skipped, the first is row 2" in capsys.readouterr().err
    fault(write_chat(tmp_path / "no.jsonl", None, [], blank), "3 of 3 rows of messages are empty")


def test_a_data_set_with_the_columns_of_an_agents_trace_is_read_as_it_is(tmp_path):
    """`datasets` would rewrite these five columns, with another package."""
    assert "parse_agent_traces" in JsonConfig.__dataclass_fields__  # or this test and our option can go
    row = {"id": "1", "source": "s", "model": "m", "system_prompt": "p", "messages": CHAT}
    (tmp_path / "chat.jsonl").write_text(jsonl([row]))
    assert decoded(load_chat(tmp_path / "chat.jsonl", seq_len=7)) == [tokenizer().bos_token + "<user>"]


USER = {"role": "user", "content": "x" * 40}
STRICT = (
    "{% for m in messages %}{% if m.role == 'wizard' %}{{ raise_exception('no wizards') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)

BAD_ROWS = {
    "no content": ([{"role": "user"}], "message 1: expected a message with a role and content, got no content"),
    "null content": ([USER, {"role": "user", "content": None}], "message 2: expected a message with a role"),
    "no role": ([{"content": "x"}], "message 1: expected a message with a role and content, got no role"),
    "a number as role": ([{"role": 3, "content": "x"}], "the role 3"),
    "a number as content": ([{"role": "user", "content": 3}], "content of type int"),
    "an object as content": ([{"role": "user", "content": {"a": 1}}], "content of type dict"),
    "a list as message": ([[USER]], "message 1: expected a message with a role and content, got a value of type list"),
    "a text as message": (["x"], "message 1: expected a message with a role and content, got a value of type str"),
    "a role that the template refuses": ([{"role": "wizard", "content": "x"}], "no wizards"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_faulty_chat_is_named_by_its_row(tmp_path, row, message):
    path = write_chat(tmp_path / "chat.jsonl", [USER], [USER], row)
    fault(path, "row 3 of 'messages'", message, tokens=chat_tokenizer(STRICT), samples=99)


BAD_TEMPLATES = {
    "none": (None, "expected a tokenizer with a chat template, got one without; give one with --chat-template FILE"),
    "several": ({"a": TEMPLATE, "b": TEMPLATE}, "expected a tokenizer with one chat template"),
    "no Jinja": ("{% for m in messages %}{{ m.content", "the chat template: expected Jinja"),
    "undefined": ("{{ messages[0].nothing.more }}", "row 1 of 'messages'"),
    "without the text": ("hello", "a chat template that writes the messages"),
    "empty": ("", "a chat template that writes the messages"),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_each_fault_of_a_template_is_an_error_in_one_line(tmp_path, template, message):
    fault(write_chat(tmp_path / "chat.jsonl", CHAT), message, tokens=chat_tokenizer(template))


def test_each_fault_of_a_template_file_is_an_error_in_one_line(tmp_path):
    path = write_chat(tmp_path / "chat.jsonl", CHAT)
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    for file in ("nowhere.jinja", "latin.jinja", ""):
        fault(path, "--chat-template: expected a file with a Jinja template", chat_template=str(tmp_path / file))
    texts = write(tmp_path / "t.jsonl", ["x" * 100])
    fault(texts, "--chat-template: expected a column of chats", chat_template=str(tmp_path / "latin.jinja"))


def test_chat_columns_that_are_not_chosen(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(jsonl([{"messages": CHAT, "conversations": SHARE}]))
    fault(
        path,
        "messages (list of {role: string, content: string}), conversations (list of {from: string, value: string})",
    )
    path.write_text(jsonl([{"messages": "a text", "id": 1}]))
    fault(path, "messages (string), id (int64)")
    path.write_text(jsonl([{"messages": [CHAT]}]))
    fault(path, "columns messages (list of list of {role: string, content: string})", text_column="messages")
    path.write_text(jsonl([{"text": "x" * 40, "messages": CHAT}]))
    assert decoded(load(path, samples=1)) == ["x" * 16]


def test_passages_need_texts(tmp_path):
    with pytest.raises(SmoothQuantError, match=r"columns messages \(list of"):
        text.read_texts(str(write_chat(tmp_path / "chat.jsonl", CHAT)), "messages")


# Options


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_sample_has_at_least_two_tokens(length):
    with pytest.raises(SmoothQuantError, match=f"--seq-len: expected at least 2, got {length}"):
        Options(model="m", output="o", seq_len=length)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlamaConfig(max_position_embeddings=64), "max_position_embeddings"),
        (GPT2Config(n_positions=64), "max_position_embeddings"),  # transformers knows n_positions by this name, too
        (GPT2Config(n_positions=128, n_ctx=64), "n_ctx"),
        (MptConfig(max_seq_len=64), "max_seq_len"),
        (LlamaConfig(max_position_embeddings=128, max_sequence_length=64), "max_sequence_length"),
    ],
)
def test_samples_longer_than_the_model_are_refused(config, name):
    model = torch.nn.Module()
    model.config = config
    source = Source("", model, None, {}, "")
    check_seq_len(source, 64)
    with pytest.raises(SmoothQuantError, match=f"--seq-len: expected at most the model's 64 positions .{name}"):
        check_seq_len(source, 65)


def test_positions_without_a_limit():
    model = torch.nn.Module()
    model.config = LlamaConfig(max_position_embeddings=-1)
    check_seq_len(Source("", model, None, {}, ""), 1 << 20)


SIZE = {"samples": 4, "seq_len": 32, "quiet": True}


def test_calibrate_and_smooth_take_chats_and_a_template(tmp_path, capsys):
    source = tiny_checkpoints.save("llama", tmp_path / "llama")
    data, template = write_chat(tmp_path / "chat.jsonl", *[CHAT] * 12), tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    calibrate(str(source), tmp_path / "out", dataset=data, chat_template=template, **SIZE)
    assert yaml.safe_load((tmp_path / "out" / RECIPE).read_text())["chat-template"].endswith("t.jinja")
    assert "the chats of 'messages' are used" in capsys.readouterr().err
    arguments = ["smooth", str(source), "-o", str(tmp_path / "smooth"), "--dataset", str(data), "--seq-len", "32"]
    assert cli.main(arguments) == 1
    assert "give one with --chat-template FILE" in capsys.readouterr().err
    assert cli.main([*arguments, "--chat-template", "nowhere.jinja"]) == 1
    assert "--chat-template: expected a file" in capsys.readouterr().err


def test_calibrate_names_a_token_beyond_the_embedding(tmp_path):
    source = tiny_checkpoints.save("llama", tmp_path / "llama")
    with_image_token().save_pretrained(source)
    data = write(tmp_path / "t.jsonl", ["<image>" * (i == 5) + "words " * 30 for i in range(12)])
    with pytest.raises(SmoothQuantError, match=r"token 256 \(<image>\)"):
        calibrate(str(source), tmp_path / "out", dataset=str(data), **SIZE | {"samples": 12})
    assert not (tmp_path / "out").exists()
