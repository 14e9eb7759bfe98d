"""The rows of a data set with the place each came from. Refuses to know what the columns mean."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from grpo.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Row:
    """One row of a data set."""

    name: str  # unique in the data set: `train.jsonl:17`
    place: str  # for messages: `train.jsonl line 17`
    columns: Mapping[str, object]


def rows_of(source: str, *, split: str) -> Iterator[Row]:
    """Every row; UserError if the source cannot be read at all, or with every bad JSON line."""
    path = Path(source)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        return _json_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    return _hub_rows(source, split)


def _json_rows(path: Path) -> Iterator[Row]:
    """Own reading rather than `datasets`, which names neither the line nor the field."""
    problems: list[str] = []
    rows: list[Row] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path.name} line {number}"
        try:
            columns = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{place}, column {error.colno}: this is no valid JSON: {error.msg}")
            continue
        if isinstance(columns, dict):
            rows.append(Row(name=f"{path.name}:{number}", place=place, columns=columns))
        else:
            kind = type(columns).__name__
            problems.append(f'{place}: found {kind}; expected an object: {{"prompt": "..."}}')
    if problems:
        shown = problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])
        raise UserError("\n".join(shown) + "\nexpected one JSON object on each line")
    return iter(rows)


def _lines(path: Path) -> Sequence[str]:
    try:
        # Not splitlines(): JSON text may hold U+2028 and the like, which are no line ends here.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"data set {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"data set {path}: byte {error.start} is no UTF-8; save the file as UTF-8"
        ) from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow  # here, as JSONL recipes must not pay for loading it
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"data set {path}: no readable Parquet file: {error}") from error
    return _numbered(path.name, cast("Sequence[Mapping[str, object]]", table.to_pylist()))


def _hub_rows(source: str, split: str) -> Iterator[Row]:
    import datasets  # here, as it takes a second to load and most recipes name files

    try:
        if (Path(source) / "dataset_info.json").is_file() or (
            Path(source) / "dataset_dict.json"
        ).is_file():
            loaded = datasets.load_from_disk(source)
            table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            table = datasets.load_dataset(source, split=split)
    except (OSError, ValueError, KeyError) as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(
            f"data set {source!r}, split {split!r}: it could not be loaded ({what}); expected a "
            ".jsonl or .parquet file, or the id of a Hugging Face data set that this machine can "
            "reach or has cached"
        ) from error
    return _numbered(Path(source).name, table)


def _numbered(name: str, rows: Sequence[Mapping[str, object]]) -> Iterator[Row]:
    for number, columns in enumerate(rows):
        yield Row(name=f"{name}:{number}", place=f"{name} row {number}", columns=columns)
