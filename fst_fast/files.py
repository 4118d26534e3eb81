"""Files that survive a crash: append-only logs that can be cut back, and whole files replaced atomically."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

from fst_fast.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Appender:
    """Append-only text file. Opening cuts it back to `offset` bytes, the length its last checkpoint recorded.

    UserError, and the file is left alone, when no line of it ends there. `dry`: the file is another rank's to write,
    and what this one would is only counted.
    """

    def __init__(self, path: Path, *, offset: int = 0, dry: bool = False):
        self.offset = offset
        self._file: io.FileIO | None = None
        if dry:
            return
        check_line_ends(path, offset)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close())
        self._file.truncate(offset)

    def write(self, text: str) -> None:
        """Hand `text` to the system. Lone surrogates, which hostile text can contain, are kept as escapes."""
        data = memoryview(text.encode("utf-8", errors="backslashreplace"))
        while data:
            # in part when the disk runs full; the next try raises
            written = self._file.write(data) if self._file else len(data)
            self.offset += written
            data = data[written:]

    def sync(self) -> None:
        if self._file:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
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


def check_line_ends(path: Path, offset: int) -> None:
    """UserError when no line of the file ends at byte `offset`; 0: it need not be there."""
    end = b""
    if offset and path.is_file():
        with open(path, "rb") as file:
            file.seek(offset - 1)
            end = file.read(1)
    if offset and end != b"\n":
        raise UserError(
            f"{path} is not the file this checkpoint knew: no line of it ends at byte {offset}; put the file back, "
            "or start again in another run_dir"
        )


def sync_directory(path: Path) -> None:
    """Make a rename inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
