"""Rows from files, folders and the Hub: the same rows whatever the format, and an error that says what is missing."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fst_fast.errors import UserError
from fst_fast.tasks.datasets import records

ROWS: list[dict[str, Any]] = [{"id": 1, "text": "é\u2028ü", "n": [1.5, 2]}, {"id": 2, "text": "", "n": []}]


def written(path: Path) -> str:
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n", "utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS), "utf-8-sig")
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_file_gives_its_rows_in_order(tmp_path: Path, suffix: str) -> None:
    assert list(records(written(tmp_path / f"data{suffix}"))) == ROWS


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    Path(written(tmp_path / "a.jsonl")).rename(tmp_path / "a.json")
    assert list(records(str(tmp_path / "a.json"))) == ROWS


def test_a_file_is_read_only_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"id": 1}\nbroken')
    rows = records(str(path))
    assert next(rows) == {"id": 1}
    with pytest.raises(UserError, match="line 2: not JSON"):
        next(rows)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` with an empty cache and no network."""
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_a_folder_has_splits_and_keeps_values_of_mixed_types(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    train: list[dict[str, Any]] = [{"ios": [{"output": [1, 2]}, {"output": 3}]}]
    train += [{"ios": [{"output": {"z": x}}]} for x in (1.0, 1 / 3, 1e-300, float("inf"), float("nan"), 2**70)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, train)))
    (folder / "test.jsonl").write_text('{"ios": []}')
    assert repr(list(records(str(folder)))) == repr(train)
    assert list(records(str(folder), "test")) == [{"ios": []}]
    (folder / "train.jsonl").rename(folder / "train-00000-of-00002.jsonl")
    (folder / "train-00001-of-00002.jsonl").write_text('{"ios": [0]}')
    assert [len(row["ios"]) for row in records(str(folder))] == [2, *[1] * 7]
    with pytest.raises(UserError, match=r"cannot load the split 'dev' \(there is train, test\); give"):
        records(str(folder), "dev")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no-such-org/no-such-name", r"no-such-org/no-such-name: cannot load the split 'train' \(.*\); give a \.jsonl"),
        ("no-such-org/no-such-name:main", "cannot load the split"),
        ("not an id", "cannot load the split"),
        ("no/such.jsonl", "'no/such.jsonl': there is no such file; give a"),
        ("", "there is no such file"),
        ("{}", "cannot load the split"),
    ],
)
def test_what_is_not_there_is_named_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as e:
        records(source)
    assert "\n" not in str(e.value)
    assert len(str(e.value)) < 600


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b", r"a\.csv: the file's name must end in \.jsonl, \.json or \.parquet"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1: \[1\] is a list, not an object"),
        ("a.jsonl", b'{"a": "\xe9"}', "line 1: not UTF-8 at byte 8"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json, row 2: 2 is a int, not an object"),
        ("a.json", b'[{"a": 1}', r"a\.json: not JSON in UTF-8"),
        ("a.json", b"[" * 100_000, "not JSON in UTF-8"),
        ("a.json", b'["\xe9"]', "not JSON in UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a parquet file that can be read"),
    ],
)
def test_what_is_malformed_is_named_in_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        list(records(str(tmp_path / name)))
    assert "\n" not in str(e.value)


@pytest.mark.usefixtures("offline")
def test_a_folder_may_hold_what_only_the_library_reads(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.csv").write_text("a,b\n1,x\n")
    assert list(records(str(tmp_path / "folder"))) == [{"a": 1, "b": "x"}]
