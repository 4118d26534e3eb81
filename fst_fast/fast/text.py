"""Text that others wrote, made safe to keep, to send and to show. It stays data: nothing here escapes for a format."""

from __future__ import annotations

import re

_UNPRINTABLE = re.compile(r"[^\n\t\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]")


def printable(text: str) -> str:
    """`text` with Unix line ends, without control characters and lone surrogates."""
    return _UNPRINTABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def cut_middle(text: str, limit: int) -> str:
    """`text` in at most `limit` characters plus a mark that says how many were left out of its middle."""
    if len(text) <= limit:
        return text
    head, tail = limit - limit // 2, limit // 2
    return f"{text[:head]}\n[... {len(text) - head - tail} characters left out ...]\n{text[len(text) - tail :]}"
