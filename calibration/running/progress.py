"""The progress of a run (bars on a terminal, lines elsewhere, nothing if quiet) and the memory that it takes."""

import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Progress over `total` blocks (or batches), each over `samples` samples."""

    def __init__(self, total: int, samples: int, *, done: int = 0, quiet: bool = False, unit: str = "block") -> None:
        """done: blocks that an earlier run finished."""
        self.total, self.done, self.earlier, self.quiet, self.unit = total, done, done, quiet, unit
        self.start = self.printed = time.perf_counter()
        hidden = quiet or not sys.stderr.isatty()
        self.blocks = tqdm(total=total, initial=done, desc="observe", unit=unit, position=0, disable=hidden)
        self.samples = tqdm(total=samples, desc=unit, unit="sample", position=1, leave=False, disable=hidden)

    def sample(self, count: int) -> None:
        """`count` more samples passed the running block."""
        self.samples.update(count)

    def block(self) -> None:
        """The running block is finished."""
        self.done += 1
        self.blocks.set_postfix_str(memory_text())
        self.blocks.update()
        self.samples.reset()
        now = time.perf_counter()
        due = now - self.printed >= SECONDS_BETWEEN_LINES or self.done == self.total
        if self.blocks.disable and not self.quiet and due:
            self.printed, elapsed = now, now - self.start
            left = elapsed / (self.done - self.earlier) * (self.total - self.done)
            times = f"{tqdm.format_interval(round(elapsed))} so far, {tqdm.format_interval(round(left))} left"
            print(f"observe: {self.unit} {self.done} of {self.total}, {times}, {memory_text()}", file=sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.samples.close()
        self.blocks.close()


def anonymous_bytes() -> int:
    """Memory of this process that no file backs (RssAnon); 0 where the system does not report it.

    Pages of memory-mapped weight files are not counted, because the system takes them back when it needs room.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def memory_text() -> str:
    """The memory of this process now, and the peak so far on the GPU."""
    text = f"{anonymous_bytes() / 1e9:.2f} GB"
    return text + (f", GPU {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if torch.cuda.is_available() else "")


class PeakMemory(threading.Thread):
    """While open, reads anonymous_bytes() ten times a second; `bytes` is the maximum."""

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
