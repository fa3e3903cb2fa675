"""Calibrating on local files opens no socket, so that confidential text stays on the machine."""

import json
import subprocess
import sys
from pathlib import Path

from tests.helpers import tiny_checkpoints

SCRIPT = Path(__file__).parent.parent / "examples/domain_data.py"

# Python calls an audit hook for every socket and every name lookup of any Python library, the hub's client included. It
# does not see sockets of native code; safetensors and torch have no reason to open one.
NO_SOCKETS = """
import sys
def refuse(event, args):
    if event.startswith("socket."):
        raise PermissionError(f"a socket: {event} {args}")
sys.addaudithook(refuse)
"""

# The example, then verify and report on its checkpoint, in one process because imports take most of the time.
EXAMPLE = (
    NO_SOCKETS
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


def test_the_hook_refuses_sockets():
    lookup = run(NO_SOCKETS + "import socket; socket.create_connection(('a.b', 1))")
    assert "a socket: socket.getaddrinfo" in lookup.stderr
    assert "a socket: socket.__new__" in run(NO_SOCKETS + "import socket; socket.socket()").stderr


def test_the_domain_example_verify_and_report_open_no_socket(tmp_path):
    """Half of the documents contain the word "tumours"; both held-out texts are measured for all three models."""
    model = tiny_checkpoints.save("llama", tmp_path / "model")
    lines = tiny_checkpoints.save_text(tmp_path / "t.jsonl").read_text().splitlines()
    plain = [json.loads(line)["text"] for line in lines]
    documents = plain + [text.replace("a", " tumours ") for text in plain]
    text, out = tmp_path / "text.jsonl", tmp_path / "out"
    text.write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    small = ["--word", "tumour", "--samples", "4", "--windows", "4", "--seq-len", "32"]
    process = run(EXAMPLE, str(SCRIPT), str(model), str(out), str(text), *small)
    assert process.returncode == 0, process.stderr
    assert "domain: 12 documents" in process.stdout
    assert "general: 12 documents" in process.stdout
    figures = json.loads((out / "figures.json").read_text())
    assert figures.keys() == {"floating point", "domain", "general"}
    assert all(f"{value:.3f}" in process.stdout for row in figures.values() for value in row.values())
    halves = [(out / f"domain-{half}.jsonl").read_text() for half in ("calibration", "held-out")]
    assert not set(halves[0].splitlines()) & set(halves[1].splitlines())
    assert (out / "page.html").stat().st_size > 10_000
