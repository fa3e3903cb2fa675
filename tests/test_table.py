"""`smoothquant evaluate --table`: the three files, and refusals before the measurements, which take hours."""

import io
import json

import pytest
from PIL import Image

from calibration import __main__ as cli
from calibration.evaluation import evaluate
from calibration.evaluation.measure import SERVE
from calibration.report import table

ROW = {
    "perplexity": 12.3456, "last_word_accuracy": 0.25, "passages": 8, "memory_bytes": 300 << 20, "baseline": False,
    "peak_memory_bytes": 1200 << 20, "first_token_seconds": 0.0123, "tokens_per_second_batch_1": 10.04,
    "tokens_per_second_batch_16": 99.96, "kernels": [],
}  # fmt: skip

RESULT = {
    "text": {"source": "some/where/text.jsonl", "windows": 3, "seq_len": 34},
    "engine": {"vllm": "0.32.0", "dtype": "auto", "score_dtype": "float32"},
    "serve": SERVE,
    "models": [
        ROW | {"model": "a/base", "baseline": True, "perplexity_change": 0.0},
        ROW | {"model": "a/dynamic", "perplexity_change": 0.0123},
        ROW | {"model": "a/stat|ic", "perplexity_change": -0.5},
    ],
}  # fmt: skip


def test_the_three_files_agree(tmp_path):
    text = table.write(RESULT, str(tmp_path), "smoothquant evaluate x")
    assert text == (tmp_path / "table.md").read_text()
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["models"] == RESULT["models"]
    assert record["command"] == "smoothquant evaluate x"
    with Image.open(io.BytesIO((tmp_path / "table.png").read_bytes())) as image:
        assert image.width > 600


def test_every_figure_has_its_column_and_unit():
    lines = table.markdown(RESULT, "the command").splitlines()
    assert lines[3] == "| dynamic | 12.346 | +1.23% | 25.0% | 300 MiB | 1200 MiB | 12 ms | 10.0 tok/s | 100.0 tok/s |"
    assert lines[4].startswith("| stat ic |")
    assert len({line.count("|") for line in lines[:5]}) == 1
    text = "\n".join(lines)
    assert "3 windows of 34 tokens of text.jsonl, dtype float32; last words of 8" in text
    assert "prompts of 128 tokens" in text
    assert "`the command`" in text


def test_a_column_without_a_figure_is_left_out():
    rows = [{k: v for k, v in row.items() if k != "last_word_accuracy"} for row in RESULT["models"]]
    assert "last word |" not in table.markdown(RESULT | {"models": rows}, "c")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--table", "here"], "--baseline"), (["--table", "file/in", "--baseline", "m"], "--table file/in")],
)
def test_a_table_that_cannot_be_written_is_refused_before_measuring(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(evaluate, "evaluate", lambda options: pytest.fail("evaluate() was called"))
    assert cli.main(["evaluate", "m", *arguments]) == 1
    assert expected in capsys.readouterr().err
