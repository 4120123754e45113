"""Text for messages."""

import os
import sys


def plural(n: float, noun: str, form: str = ",") -> str:
    """Return a number, in the given format, and its noun: "1 thread", "2,000 images", "2 processes"."""
    ending = "" if n == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{n:{form}} {noun}{ending}"


def printable(path) -> str:
    """Return a path for messages: characters that standard output cannot show are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a program's own stdout may have none
    return os.fspath(path).encode(encoding, "backslashreplace").decode(encoding)
