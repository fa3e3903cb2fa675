"""Processes that are forked from a test and may be killed."""

import threading
from collections.abc import Iterator

import tqdm


def own_tqdm_locks() -> None:
    """Give every bar of tqdm a lock of this process alone; call it in the forked process, before the first bar.

    tqdm's own lock is a semaphore that forked processes share: one that is killed while it holds it stops all others.
    A subclass that showed a bar before tqdm itself did has another one of these, as that of huggingface_hub has.
    """
    for cls in _with_subclasses(tqdm.tqdm):
        cls.set_lock(threading.RLock())


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _with_subclasses(subclass)
