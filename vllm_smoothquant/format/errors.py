"""The one error class of both packages."""

from typing import Any

MAX_LENGTH = 1000


class SmoothQuantError(ValueError):
    """One fault, described in one line: "WHERE: expected EXPECTED, got GOT; FIX".

    got may be an exception: its type and message are then used, flattened to one line.

    Example: SmoothQuantError("--samples", "at least 1", "0", "give a positive number")
    """

    def __init__(self, where: str, expected: str, got: str | BaseException, fix: str) -> None:
        if isinstance(got, BaseException):
            got = f"{type(got).__name__}: {' '.join(str(got).split())[:300]}"
        self.where, self.expected, self.got, self.fix = map(printable, (where, expected, got, fix))
        super().__init__(f"{self.where}: expected {self.expected}, got {self.got}; {self.fix}")

    def __reduce__(self) -> tuple[Any, ...]:
        # vLLM's workers pickle their exceptions for the parent process; by default pickle passes only the message.
        return type(self), (self.where, self.expected, self.got, self.fix)

    def to_dict(self) -> dict[str, str]:
        return {"where": self.where, "expected": self.expected, "got": self.got, "fix": self.fix}


def printable(text: str) -> str:
    """Escape control characters and truncate, so that tensor names from a checkpoint are safe to print."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= MAX_LENGTH else f"{text[:MAX_LENGTH]}..."
