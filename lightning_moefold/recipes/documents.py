# SPDX-License-Identifier: Apache-2.0
"""Files as rows, one after another: none is held in memory as a whole, but a list in a .json file.

The ending of a file's name, in capitals or not, says how it is read:

    .txt .text .md    the whole file is one document
    .jsonl .ndjson    each line is an object
    .json             a list of objects, a single one, or lines of them
    .parquet          each row is an object (pyarrow)
    a directory       what ``datasets`` has written with ``save_to_disk``

A ``.gz`` after it is unpacked. Every other ending is refused, for its markup would be trained on as if it were text. What an
object says is the subject of :mod:`.conversation`.
"""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_moefold.errors import InputError

_WHOLE, _LINES, _JSON, _PARQUET = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".json",), (".parquet",)
#: The endings, for a sentence.
READABLE = ".txt, .jsonl, .json or .parquet files"


class Raw(NamedTuple):
    """A row that has not been parsed yet.

    Args:
        file: Number of its file.
        number: Of the row in it, counted from 1 (lines, where it has lines); 0 where the whole file is the row.
        where: File and place, for a sentence.
        read: Gives a string for a text, or the object.
    """

    file: int
    number: int
    where: str
    read: Callable[[], Any]


def name_of(file: Path, number: int) -> str:
    """How a row is called in output, such as ``b.jsonl:3``."""
    return f"{file.name}:{number}" if number else file.name


def check_readable(file: Path) -> None:
    """Refuses what :func:`read_rows` could not read, without reading it.

    Raises:
        InputError: If it is not there, or nothing is known that reads it.
    """
    if not file.exists():
        raise InputError(f"{file} is no file; give {READABLE}, or a directory of datasets.")
    if file.is_dir():
        _check_dataset(file)
    elif _ending(file)[0] in _PARQUET:
        _package(file, "pyarrow")


def read_rows(files: Iterable[Path]) -> Iterator[Raw]:
    """Every row of the files, in order.

    Raises:
        InputError: For a file that cannot be read as its name says.
    """
    for index, path in enumerate(files):
        if path.is_dir():
            rows = _directory(path)
        else:
            ending, packed = _ending(path)
            if ending in _WHOLE:
                rows = iter([(0, "", partial(_whole, path, packed))])
            elif ending in _LINES:
                rows = _lines(path, packed)
            elif ending in _JSON:
                rows = _objects(path, packed)
            else:
                rows = _parquet(path)
        for number, place, read in rows:
            yield Raw(index, number, f"{path}, {place}" if place else path.name, read)


def _ending(path: Path) -> tuple[str, bool]:
    """The ending that says what is in a file, and whether it is packed."""
    endings = [ending.lower() for ending in path.suffixes]
    packed = endings[-1:] == [".gz"]
    ending = "".join(endings[: -1 if packed else None][-1:])
    if ending not in (*_WHOLE, *_LINES, *_JSON, *_PARQUET) or (packed and ending in _PARQUET):
        raise InputError(
            f"{path} is not read, as text is taken from {READABLE} (or .gz of them), or a directory of datasets; give its text "
            "in one of these."
        )
    return ending, packed


_Found = Iterator[tuple[int, str, Callable[[], Any]]]


def read_lines(path: Path, packed: bool = False) -> Iterator[str]:
    """The lines of a file, without the byte-order mark that some editors put first, and with line feeds alone as line ends."""
    number = 0
    try:
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                yield line
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}, near line {number + 1}).") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); give files with text.") from None


def _whole(path: Path, packed: bool) -> str:
    return "".join(read_lines(path, packed))


def _lines(path: Path, packed: bool) -> _Found:
    for number, line in enumerate(read_lines(path, packed), start=1):
        line = line.removeprefix("\ufeff")  # of a file that was joined to another
        if line.strip():
            yield number, f"line {number}", partial(_parse, path, line, number)


class RepeatedKey(ValueError):
    """An object in JSON has a key twice, of which ``json`` would keep the last."""


def parsed(text: str) -> Any:
    """What JSON says.

    Raises:
        RepeatedKey: If an object has a key twice.
        ValueError: If it is no JSON.
        RecursionError: If it is nested too deep.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return made


def _parse(path: Path, line: str, number: int) -> Any:
    try:
        return parsed(line)
    except RepeatedKey as error:
        raise InputError(f"{path}, line {number} has {error}; leave one of them out.") from None
    except RecursionError:
        raise InputError(f"{path}, line {number} is nested too deep to be read.") from None
    except ValueError:
        raise InputError(f"{path}, line {number} is not a JSON object.") from None


def _objects(path: Path, packed: bool) -> _Found:
    text = _whole(path, packed)
    if _holds_lines(text):
        yield from _lines(path, packed)
        return
    try:
        found = parsed(text)
    except RepeatedKey as error:
        raise InputError(f"{path} has {error} in one object; leave one of them out.") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deep to be read.") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno} is not JSON ({error.msg.lower()}).") from None
    for number, item in enumerate(found if isinstance(found, list) else [found], start=1):
        yield number, f"entry {number}", partial(given_as_is, item)


def _holds_lines(text: str) -> bool:
    """Whether each line is JSON by itself, as the first of them says, or there is none."""
    first, _, rest = text.lstrip().partition("\n")
    if not rest or rest.isspace():
        return not first
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _parquet(path: Path) -> _Found:
    pyarrow, parquet = _package(path, "pyarrow"), _package(path, "pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            rows = ((batch, row) for batch in file.iter_batches(256) for row in range(batch.num_rows))
            for number, (batch, row) in enumerate(rows, start=1):
                yield number, f"row {number}", partial(_table_row, batch, row)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as parquet ({str(error).splitlines()[0]}).") from None


def _check_dataset(path: Path) -> None:
    if (path / "dataset_dict.json").is_file():
        parts = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        raise InputError(f"{path} holds several datasets; name one of {', '.join(str(path / part) for part in parts)}.")
    if not (path / "state.json").is_file():
        raise InputError(f"{path} is a directory without a dataset that save_to_disk of datasets has written.")
    _package(path, "datasets")


def _directory(path: Path) -> _Found:
    _check_dataset(path)
    datasets = _package(path, "datasets")
    try:
        found = datasets.load_from_disk(str(path))
        for number in range(1, len(found) + 1):
            yield number, f"row {number}", partial(_dataset_row, found, number - 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read by datasets ({str(error).splitlines()[0]}).") from None


def _package(path: Path, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(
            f"{path} is read by {package}, which is not installed; pip install 'lightning-moefold[data]'."
        ) from None


def given_as_is(item: Any) -> Any:
    """Returns a row that is in memory already."""
    return item


def _table_row(batch: Any, row: int) -> Any:
    return _given(batch.slice(row, 1).to_pylist()[0])


def _dataset_row(found: Any, number: int) -> Any:
    return _given(found[number])


def _given(value: Any) -> Any:
    """A row of a table without the fields that it does not have: there, what one row has, all others have as null."""
    if isinstance(value, dict):
        return {key: _given(part) for key, part in value.items() if part is not None}
    return [_given(part) for part in value] if isinstance(value, list) else value


def dataset_files(path: Path) -> list[Path]:
    """The file, or those of a directory of ``datasets``, sorted."""
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
