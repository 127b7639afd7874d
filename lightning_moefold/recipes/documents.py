# SPDX-License-Identifier: Apache-2.0
"""Files of text as documents.

The ending of a file's name, in capitals or not, says how it is read:

    .txt .text .md    the whole file is one document
    .jsonl .ndjson    each line is an object whose string ``text`` is a document
    .json             a list of such objects, a single one, or lines of them

A ``.gz`` after it is unpacked. Every other ending is refused, for its markup would be trained on as if it were text.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning_moefold.errors import InputError

_WHOLE, _LINES, _JSON = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".json",)
#: The endings, for a sentence.
READABLE = ".txt, .jsonl or .json files"


def read_documents(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Name and text of every document.

    Raises:
        InputError: For a file that cannot be read as its name says, or an object without a string ``text``.
    """
    for path in files:
        endings = [ending.lower() for ending in path.suffixes]
        packed = endings[-1:] == [".gz"]
        ending = "".join(endings[: -1 if packed else None][-1:])
        if ending not in (*_WHOLE, *_LINES, *_JSON):
            raise InputError(
                f"{path} is not read, as text is taken from {READABLE} (or .gz of them); give its text in one of these."
            )
        content = _read(path, packed)
        if ending in _WHOLE:
            yield path.name, content
        else:
            objects = _lines(path, content) if ending in _LINES else _objects(path, content)
            for number, where, found in objects:
                yield f"{path.name}:{number}", _text(found, f"{path}, {where}")


def _read(path: Path, packed: bool) -> str:
    """The text of a file, without the byte-order mark that some editors put first, and with line feeds alone as line ends."""
    try:
        content = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); give files with text.") from None


def _lines(path: Path, content: str) -> Iterator[tuple[int, str, Any]]:
    for number, line in enumerate(content.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that was joined to another
        if line.strip():
            try:
                found = json.loads(line)
            except ValueError:
                raise InputError(f'{path}, line {number} is not a JSON object with a string "text".') from None
            yield number, f"line {number}", found


def _objects(path: Path, content: str) -> Iterator[tuple[int, str, Any]]:
    try:
        found = json.loads(content)
    except ValueError:
        yield from _lines(path, content)
        return
    for number, item in enumerate(found if isinstance(found, list) else [found], start=1):
        yield number, f"entry {number}", item


def _text(found: Any, where: str) -> str:
    text = found.get("text") if isinstance(found, dict) else None
    if not isinstance(text, str):
        keys = f"; its keys are {', '.join(map(repr, found))}" if isinstance(found, dict) else ""
        raise InputError(f'{where} is not a JSON object with a string "text"{keys}.')
    return text
