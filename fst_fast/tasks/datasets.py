"""Rows of published data: a local file, a local folder, or a Hugging Face dataset by its id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from fst_fast.errors import UserError, quoted

Row = dict[str, Any]  # one JSON object
FORMS = "a .jsonl, .json or .parquet file, a folder of them, or the id of a Hugging Face dataset (ORG/NAME[:CONFIG])"


def records(source: str, split: str = "train") -> Iterator[Row]:
    """The rows of `source`, in its order, read as they are asked for.

    A file is its rows, whatever the `split`; of a folder (train.jsonl, test-00000-of-00002.parquet...) or a dataset on
    the Hub the rows of `split` come; the library `datasets` finds its files, and keeps a copy in its cache. UserError
    says what is missing: the file, the library, the dataset, the split; and which line or row is no object.
    """
    path = Path(source)
    if path.is_file():
        return _file(path, path.suffix)
    if not source or path.suffix in (".jsonl", ".json", ".parquet"):
        raise UserError(f"{source!r}: there is no such file; give {FORMS}.")
    return _dataset(source, split)


def json_lines(path: str | Path, *, name: str = "") -> Iterator[tuple[int, Row]]:
    """(line number, object) of every line that is not blank. `name` is the file's in errors, if not its path."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield number, _parse(line, f"{path}, line {number}")
    except OSError as e:
        raise UserError(f"{name or path}: cannot read the file ({e.strerror}); give a file of JSON lines.") from None


def _file(path: Path, suffix: str) -> Iterator[Row]:
    match suffix:
        case ".jsonl":
            return (row for _, row in json_lines(path))
        case ".json":
            return _json(path)
        case ".parquet":
            return _parquet(path)
    raise UserError(f"{path}: the file's name must end in .jsonl, .json or .parquet.")


def _json(path: Path) -> Iterator[Row]:
    """An array of objects, or JSON lines under this name."""
    with open(path, "rb") as file:
        head = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        return (row for _, row in json_lines(path))
    try:
        return _objects(json.loads(path.read_text("utf-8-sig")), str(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not JSON in UTF-8 ({e}); give an array of objects.") from None


def _parquet(path: Path) -> Iterator[Row]:
    _need("pyarrow", str(path))
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        for batch in file.iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a parquet file that can be read ({_one_line(e)}).") from None


def _dataset(source: str, split: str) -> Iterator[Row]:
    _need("datasets", source)
    import datasets
    from datasets.exceptions import DatasetsError

    name, _, config = (source, "", "") if Path(source).is_dir() else source.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        splits = {str(s): [str(file) for file in files] for s, files in (builder.config.data_files or {}).items()}
        if split not in splits:
            raise ValueError(f"there is {', '.join(splits) or 'none'}")
        suffixes = [Path(file).suffix for file in splits[split]]
        if not {".jsonl", ".json", ".parquet"}.issuperset(suffixes):
            return _objects(datasets.load_dataset(name, config or None, split=split), source)
        # Read here: through Arrow, JSON of mixed types would lose digits, NaN and Infinity.
        paths = datasets.DownloadManager(dataset_name=builder.dataset_name).download(splits[split])
    except (DatasetsError, OSError, ValueError, RuntimeError) as e:  # absent, unreachable, malformed; no such split
        raise UserError(f"{source}: cannot load the split '{split}' ({_one_line(e)}); give {FORMS}.") from None
    return chain.from_iterable(_file(Path(p), suffix) for p, suffix in zip(paths, suffixes, strict=True))


def _need(module: str, source: str) -> None:
    from importlib.util import find_spec

    if not find_spec(module):
        raise UserError(f"{source}: needs the library {module}; pip install -e '.[data]', or give a .jsonl file.")


def _objects(rows: Any, source: str) -> Iterator[Row]:
    for number, row in enumerate(rows, start=1):
        yield _object(row, f"{source}, row {number}")


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as e:
        raise UserError(f"{where}: not UTF-8 at byte {e.start + 1}; save the file as UTF-8.") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({e}); give one JSON object a line.") from None
    return _object(row, where)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: {quoted(row)} is a {type(row).__name__}, not an object; "
            'write it as {"problem": ..., "answer": ...}.'
        )
    return row


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
