"""`vllm serve` while a block runs: on a free loopback port, in a process group of its own that is killed at the end."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calibration.evaluation.measure import engine_environment

# On two cores a start takes 25 s eager and up to two minutes compiled; a server that needs longer than this hangs.
START_SECONDS = 600
STOP_SECONDS = 30


class ServerError(RuntimeError):
    """The server ended before it answered; str() is the end of its log."""


@contextmanager
def vllm_serve(model: str | Path, *arguments: str, log: Path) -> Iterator[str]:
    """Yield the URL of a `vllm serve MODEL ARGUMENTS...` that is ready; its output goes to `log`.

    Errors: ServerError if the server ends before it is ready, TimeoutError if it does neither.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    vllm = str(Path(sys.executable).parent / "vllm")
    command = [vllm, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=engine_environment(), start_new_session=True
        )
    try:
        _wait(process, url, log)
        yield url
    finally:
        stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process, and after STOP_SECONDS at the latest kill it with all processes of its group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # the whole group has ended already
    process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with exit code {process.returncode}:\n{log.read_text()[-5000:]}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # not listening yet
        time.sleep(0.5)
    raise TimeoutError(f"vllm serve did not answer within {START_SECONDS} s; see {log}")
