"""What commands print: numbers with their nouns, and errors as messages."""

import io
import os
import sys
from contextlib import contextmanager


def plural(n, noun, form=","):
    """Return a number, in the given format, and its noun: "1 thread", "2,000 images", "2 processes"."""
    ending = "" if n == 1 else "es" if noun.endswith(("s", "tch")) else "s"
    return f"{n:{form}} {noun}{ending}"


@contextmanager
def command_line(*errors):
    """Run a command, and end it with a message instead of a traceback if the input is wrong.

    OSError, ValueError and the given `errors`, which are exceptions that the package documents, exit with status 1, an
    interruption with 130. Other exceptions are faults of the code, and pass unchanged. Characters that the output
    cannot encode are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not a notebook's
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            print(end="", flush=True)  # so that a closed pipe or a full disk is noticed here
    except BrokenPipeError:  # the reader has ended, as `head` does
        sys.exit(1)
    except (OSError, ValueError, *errors) as error:
        sys.exit("\n".join([str(error), *getattr(error, "__notes__", [])]))
    except KeyboardInterrupt as error:
        if is_first_rank():
            print(str(error) or "Interrupted.", file=sys.stderr)
        sys.exit(130)
    finally:
        try:
            print(end="", flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be a traceback at exit


def is_first_rank():
    """Return whether this process reports what all processes of torchrun have in common."""
    return os.environ.get("RANK", "0") == "0"

def printable(path):
    """Return a path for messages: characters that standard output cannot show are escaped."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # a program's own stdout may have none
    return os.fspath(path).encode(encoding, "backslashreplace").decode(encoding)
