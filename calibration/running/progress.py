"""What the user sees of a run: bars on a terminal, plain lines elsewhere, nothing if quiet; and the memory it takes."""

import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Of `blocks` blocks (or passes over the whole model), each over `samples` samples."""

    def __init__(self, blocks: int, samples: int, *, done: int = 0, quiet: bool = False, unit: str = "block") -> None:
        """done: blocks that an earlier run finished."""
        self.blocks, self.samples, self.unit, self.quiet = blocks, samples, unit, quiet
        self.done, self.done_before = done, done
        self.clock = self.last_line = time.perf_counter()
        self.bars: list[tqdm] = []
        if not quiet and sys.stderr.isatty():
            self.bars = [
                tqdm(total=blocks, initial=done, desc="observe", unit=unit, position=0),
                tqdm(total=samples, desc=unit, unit="sample", position=1, leave=False),
            ]

    def sample(self, count: int) -> None:
        """`count` samples more went through the running block."""
        if self.bars:
            self.bars[1].update(count)

    def block(self) -> None:
        """The running block is finished."""
        self.done += 1
        if self.bars:
            self.bars[0].set_postfix_str(memory_text())
            self.bars[0].update()
            self.bars[1].reset()
        elif not self.quiet:
            now = time.perf_counter()
            if now - self.last_line >= SECONDS_BETWEEN_LINES or self.done == self.blocks:
                self.last_line = now
                here = now - self.clock
                left = here / (self.done - self.done_before) * (self.blocks - self.done)
                print(
                    f"observe: {self.unit} {self.done} of {self.blocks}, {_clock(here)} so far, {_clock(left)} left, "
                    f"{memory_text()}", file=sys.stderr, flush=True,
                )  # fmt: skip

    def close(self) -> None:
        for bar in reversed(self.bars):
            bar.close()


def _clock(seconds: float) -> str:
    return tqdm.format_interval(round(seconds))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (RssAnon); 0 where the system does not tell.

    Pages of memory-mapped weight files are not counted: the system takes them back when it needs room.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def memory_text() -> str:
    """Memory in use now: this process's own, and a GPU's at most so far."""
    text = f"{anonymous_bytes() / 1e9:.2f} GB"
    return text + (f", GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if torch.cuda.is_available() else "")


class PeakMemory(threading.Thread):
    """While open, looks at anonymous_bytes() ten times a second; `bytes` is the most it saw."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = anonymous_bytes()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __enter__(self) -> "PeakMemory":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.join()
