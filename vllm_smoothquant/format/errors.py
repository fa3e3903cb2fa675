"""The one error class of both packages."""

from typing import Any


class SmoothQuantError(ValueError):
    """One fault, said in one line: where it is, what was expected, what was found, what to do next."""

    def __init__(self, where: str, *, expected: str, got: str, do: str) -> None:
        self.where, self.expected, self.got, self.do = map(_printable, (where, expected, got, do))
        super().__init__(f"{self.where}: expected {self.expected}, got {self.got}; {self.do}")

    def __reduce__(self) -> tuple[Any, ...]:
        # vLLM's workers pickle their exceptions for the parent; by default __init__ would get the message alone.
        return _rebuild, (type(self), self.where, self.expected, self.got, self.do)


def _rebuild(cls: type[SmoothQuantError], where: str, expected: str, got: str, do: str) -> SmoothQuantError:
    return cls(where, expected=expected, got=got, do=do)


def _printable(text: str) -> str:
    """`text` fit for a terminal and one line, whatever a checkpoint has in its names: no control character, no end."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 1000 else f"{text[:1000]}..."
