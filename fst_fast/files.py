"""Files that survive a crash: append-only logs that can be cut back, and whole files replaced atomically."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fst_fast.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Appender:
    """Append-only text file. Opening cuts it back to `offset` bytes, the length its last checkpoint recorded.

    UserError, and the file is left alone, when no line of it ends there.
    """

    def __init__(self, path: Path, *, offset: int = 0):
        if offset and not _line_ends_at(path, offset):
            raise UserError(
                f"{path} is not the file this checkpoint knew: no line of it ends at byte {offset}; put the file back, "
                "or start again in another run_dir"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self._file.truncate(offset)
        self.offset = offset

    def write(self, text: str) -> None:
        """Hand `text` to the system. Lone surrogates, which hostile text can contain, are kept as escapes."""
        data = memoryview(text.encode("utf-8", errors="backslashreplace"))
        while data:
            written = self._file.write(data)  # in part when the disk runs full; the next try raises
            self.offset += written
            data = data[written:]

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: a temporary file beside it, fsync, rename. A crash leaves either whole."""
    temporary = path.with_name(f".{path.name}.tmp")
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


def _line_ends_at(path: Path, offset: int) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(offset - 1)
        return file.read(1) == b"\n"


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
