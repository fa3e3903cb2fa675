"""Hooks that are removed also after an error."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove `handles` when the block ends. Pass a generator, so that they are removed if registering one fails, too.

    Example: with hooked(model.get_submodule(name).register_forward_hook(hook) for name in names): ...
    """
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield
