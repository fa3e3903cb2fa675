"""Calibrating on local files opens no socket: text that may not leave the building does not."""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import tiny_checkpoints

SCRIPT = Path(__file__).parent.parent / "examples/domain_data.py"

# Python tells every socket that is made, and every name that is looked up, to such a hook, whatever library asks. What
# native code does by itself it would not tell; safetensors and torch have no business there, and the hub's client is
# Python's.
CLOSED = """
import sys
def closed(event, args):
    if event.startswith("socket."):
        raise PermissionError(f"a socket: {event} {args}")
sys.addaudithook(closed)
"""

# The example, then what one would do with a checkpoint it made, in one process: importing is most of the time.
ALL = (
    CLOSED
    + """
import runpy
sys.argv = sys.argv[1:]
out = sys.argv[2]
runpy.run_path(sys.argv[0], run_name="__main__")
from calibration.__main__ import main
sys.exit(main(["verify", f"{out}/domain"]) or main(["report", f"{out}/domain", "-o", f"{out}/page.html"]))
"""
)


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)


def test_the_hook_notices():
    assert "a socket: socket.getaddrinfo" in run(CLOSED + "import socket; socket.create_connection(('a.b', 1))").stderr
    assert "a socket: socket.__new__" in run(CLOSED + "import socket; socket.socket()").stderr


def test_the_domain_example_verify_and_report_open_no_socket(tmp_path):
    """Documents full of the word "tumour" against others; both held-out texts are measured for all three models."""
    model = tiny_checkpoints.save("llama", tmp_path / "model")
    plain = [
        json.loads(line)["text"] for line in tiny_checkpoints.save_text(tmp_path / "t.jsonl").read_text().splitlines()
    ]
    documents = plain + [text.replace("a", " tumours ") for text in plain]
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    small = ["--word", "tumour", "--samples", "4", "--windows", "4", "--seq-len", "32"]
    done = run(ALL, str(SCRIPT), str(model), str(out), str(text), *small)
    assert done.returncode == 0, done.stderr
    assert "domain: 12 documents" in done.stdout
    assert "general: 12 documents" in done.stdout
    figures = json.loads((out / "figures.json").read_text())
    assert figures.keys() == {"floating point", "domain", "general"}
    assert all(f"{value:.3f}" in done.stdout for row in figures.values() for value in row.values())
    halves = [(out / f"domain-{half}.jsonl").read_text() for half in ("calibration", "held-out")]
    assert not set(halves[0].splitlines()) & set(halves[1].splitlines())
    assert (out / "page.html").stat().st_size > 10_000
