"""Refuse and record every attempt of Python code to reach another machine, also in the processes that it starts.

The audit hook of tests/test_privacy.py refuses all sockets. vLLM cannot run under that, because its processes find a
free port of this machine. This one refuses every name lookup and every address except this machine's. Like that hook,
it does not see sockets of native code.
"""

import os
from pathlib import Path

# Python imports a module of this name at its start, so that the hook also is in the engine's processes.
MODULE = "sitecustomize.py"
FILES = {"NO_NETWORK_LOG": "refused.txt", "NO_NETWORK_PROCESSES": "processes.txt"}
HOOK = """
import os, sys

OWN = ("127.", "::1", "localhost", "0.0.0.0")
LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
SENDS = ("socket.connect", "socket.sendto", "socket.sendmsg")

def refuse(event, args):
    if event in LOOKUPS:
        host = args[0]
    elif event in SENDS:
        host = args[1]
    else:
        return
    host = host[0] if isinstance(host, tuple) else host
    # No host: the address of a connected or a listening socket. A path: a socket of this machine's file system.
    host = host.decode() if isinstance(host, bytes) else host
    if host is None or event in SENDS and (not host or "/" in host) or host.startswith(OWN):
        return
    with open(os.environ["NO_NETWORK_LOG"], "a") as log:
        log.write(f"{event} {host}\\n")
    raise PermissionError(f"{event} {host}")

sys.addaudithook(refuse)
with open(os.environ["NO_NETWORK_PROCESSES"], "a") as processes:
    processes.write(" ".join(sys.orig_argv) + "\\n")
"""
# So that neither the hub's client nor vLLM tries: no check for newer files, no usage statistics, no search for this
# machine's address by asking for the way to a public one.
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}


def environment(folder: Path) -> dict[str, str]:
    """Variables for processes without a network; `folder` gets the hook and the record."""
    (folder / MODULE).write_text(HOOK)
    for file in FILES.values():
        (folder / file).touch()
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return QUIET | {"PYTHONPATH": path, **{name: str(folder / file) for name, file in FILES.items()}}


def attempts(folder: Path, module: str) -> list[str]:
    """What was refused: the event and the host of each. ValueError if no process that runs `module` had the hook."""
    refused, processes = ((folder / file).read_text().splitlines() for file in FILES.values())
    if not any(module in process for process in processes):
        raise ValueError(f"expected the hook in a process that runs {module}, got it in {processes or 'none'}")
    return refused
