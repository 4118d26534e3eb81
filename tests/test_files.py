from __future__ import annotations

from pathlib import Path

import pytest

from fst_fast.errors import UserError
from fst_fast.files import Appender, write_atomic


def test_what_the_system_writes_in_part_is_written_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Appender(tmp_path / "log")
    real = log._file

    class Grudging:
        def write(self, data: memoryview) -> int:
            return real.write(data[:3])

    monkeypatch.setattr(log, "_file", Grudging())
    log.write("one line\nand é \ud800\n")
    assert (tmp_path / "log").read_text() == "one line\nand é \\ud800\n"
    assert log.offset == (tmp_path / "log").stat().st_size


def test_a_log_is_cut_back_to_its_checkpoint_and_refused_when_no_line_ends_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("kept\nlost\nhal")
    Appender(path, offset=5).write("new\n")
    assert path.read_text() == "kept\nnew\n"
    for offset in (4, 100):
        with pytest.raises(UserError, match=f"at byte {offset};"):
            Appender(path, offset=offset)
    assert path.read_text() == "kept\nnew\n"


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["page"]
    assert path.read_bytes() == b"old"
