"""The exceptions that the command line turns into a sentence."""

import signal
import unicodedata
from typing import NoReturn


class UserError(ValueError):
    """What a user can mend: a bad field, file or model, and what would do. Exit code 2."""


class EngineError(RuntimeError):
    """A rollout engine died, hangs, or gives what cannot be trained on. Exit code 1; the last checkpoint is good."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as of a queue whose time is up: taken like Ctrl-C. Exit code 143."""


def terminated(number: int, frame: object) -> NoReturn:
    """A signal handler; a second SIGTERM ends the process."""
    signal.signal(number, signal.SIG_DFL)
    raise Terminated


def quoted(value: object, limit: int = 80) -> str:
    """`repr(value)` for a sentence, in at most `limit` characters: what is left out is an ellipsis before the end."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 2]}…{text[-1]}"


def visible(text: str) -> str:
    """`text` that is safe on any terminal: control and direction characters and lone surrogates are replaced, but for
    line ends and tabs."""
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join("�" if unicodedata.category(c) in hidden and c not in "\n\t" else c for c in text)
