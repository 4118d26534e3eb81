"""Files that survive a crash: append-only logs that can be cut back, and whole files replaced atomically."""

from __future__ import annotations

import os
from pathlib import Path


class Appender:
    """Append-only text file. Opening cuts it back to `offset` bytes, the length its last checkpoint recorded."""

    def __init__(self, path: Path, *, offset: int = 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115 (closed by close())
        self._file.truncate(offset)
        self.offset = offset

    def write(self, text: str) -> None:
        """Write and flush. Lone surrogates, which hostile text can contain, are kept as escapes."""
        data = text.encode("utf-8", errors="backslashreplace")
        self._file.write(data)
        self._file.flush()
        self.offset += len(data)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a temporary file beside it, fsync, rename. A crash leaves either whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
