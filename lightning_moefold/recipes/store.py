# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents on disk: flat arrays that are mapped into memory, never read as a whole.

    tokens.bin        T int32 ids, one document after another
    trained.bin       T bool; left out where everything is trained on
    ends.bin          N int64, where each document ends
    origins.bin       N x 3 int64, file, row and :class:`~.template.Kind` of each
    counts.json       what happened to the rows on their way
    checksums.json    of the blocks of these files; those of tokens.bin and trained.bin are compared when rows of them are read

Legend: N documents, T tokens of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from lightning_moefold.checkpoint.drafts import sync_file
from lightning_moefold.checkpoint.sums import ALGORITHM, is_known, pack_sums, sum_of, unpack_sums
from lightning_moefold.errors import InputError
from lightning_moefold.recipes.documents import name_of
from lightning_moefold.recipes.template import Document, Kind

#: File of the checksums, and bytes of a block that has one.
SUMS, BLOCK = "checksums.json", 1 << 16


@dataclass
class Counts:
    """What happened to rows.

    Args:
        rows: Rows read.
        chats: How many of them are conversations.
        documents: Documents made of them.
        tokens: Tokens of these.
        trained: How many of them are trained on.
        unlabelled: Conversations left out, as nothing of them is trained on.
        empty: Texts left out, as they are empty.
        largest: The largest token.
    """

    rows: int = 0
    chats: int = 0
    documents: int = 0
    tokens: int = 0
    trained: int = 0
    unlabelled: int = 0
    empty: int = 0
    largest: int = 0

    def add(self, other: Counts) -> None:
        """Adds those of another part."""
        for one in fields(self):
            mine, others = getattr(self, one.name), getattr(other, one.name)
            setattr(self, one.name, max(mine, others) if one.name == "largest" else mine + others)


class CheckedArray:
    """A mapped array whose blocks are compared with their checksums when something of them is first read.

    Args:
        array: The array.
        sums: The checksum of each block of its bytes.
        algorithm: Of the checksums.
        block: Bytes of a block.
        path: Its file.
    """

    def __init__(self, array: np.ndarray, sums: Sequence[str], algorithm: str, block: int, path: Path) -> None:
        self._array, self._sums, self._algorithm, self._block, self._path = array, sums, algorithm, block, path
        self._checked = bytearray(len(sums))

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, part: slice) -> np.ndarray:
        begin, end, _ = part.indices(len(self._array))
        size = self._array.itemsize
        for block in range(begin * size // self._block, -(-end * size // self._block)):
            if not self._checked[block]:
                self._check(block)
        return self._array[part]

    def _check(self, block: int) -> None:
        found = self._array.view(np.uint8)[block * self._block : (block + 1) * self._block]
        if sum_of(found, self._algorithm) != self._sums[block]:
            raise InputError(
                f"{self._path} is damaged: a part of it does not have its checksum; delete {self._path.parent}, and the text is "
                "tokenised again."
            )
        self._checked[block] = 1


@dataclass
class TokenStore:
    """Documents as arrays, mapped or in memory.

    Args:
        tokens_T: Ids.
        trained_T: Whether each is trained on; None for all.
        ends_N: Where each document ends.
        origins_N3: File, row and :class:`~.template.Kind` of each.
        files: The files.
        counts: What happened to the rows.
    """

    tokens_T: np.ndarray | CheckedArray
    trained_T: np.ndarray | CheckedArray | None
    ends_N: np.ndarray
    origins_N3: np.ndarray
    files: Sequence[Path]
    counts: Counts

    def __len__(self) -> int:
        return len(self.ends_N)

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each document."""
        return np.diff(self.ends_N, prepend=0)

    def name(self, document: int) -> str:
        """Where a document was found, such as ``"b.jsonl:3"``."""
        file, number, _ = self.origins_N3[document].tolist()
        return name_of(self.files[file], number)

    def document(self, number: int) -> Document:
        """A document."""
        begin, end = int(self.ends_N[number - 1]) if number else 0, int(self.ends_N[number])
        trained = None if self.trained_T is None else self.trained_T[begin:end].tolist()
        return Document(self.tokens_T[begin:end].tolist(), trained, Kind(int(self.origins_N3[number, 2])))

    @classmethod
    def of(cls, documents: Sequence[Document], origins: Sequence[tuple[int, int]], files: Sequence[Path]) -> TokenStore:
        """Documents in memory.

        Args:
            documents: The documents.
            origins: File and row of each.
            files: The files.
        """
        sizes = [len(document.tokens) for document in documents]
        tokens = np.array([token for document in documents for token in document.tokens], np.int32)
        trained = np.array([on for d in documents for on in d.trained or [True] * len(d.tokens)], np.bool_)
        origins_N3 = np.array([(*o, d.kind) for o, d in zip(origins, documents, strict=True)], np.int64).reshape(-1, 3)
        counts = Counts(documents=len(documents), tokens=len(tokens), trained=int(trained.sum()))
        return cls(tokens, trained, np.cumsum(sizes, dtype=np.int64), origins_N3, files, counts)

    @classmethod
    def open(cls, folder: Path, files: Sequence[Path]) -> TokenStore:
        """Maps a folder into memory.

        Args:
            folder: That a :class:`StoreWriter` has finished.
            files: Those that it was made of.
        """
        found = unpack_sums((folder / SUMS).read_bytes(), folder / SUMS)
        algorithm, block = found["algorithm"], int(found["block"])
        sums = found["files"] if is_known(algorithm) else {}
        for name in ("counts.json", "ends.bin", "origins.bin"):
            if sums and _sums_of(folder / name, algorithm, block) != sums[name]:
                raise ValueError(f"{name} does not have its checksum")
        counts = Counts(**json.loads((folder / "counts.json").read_text(encoding="utf-8")))

        def checked(name: str, dtype: type) -> np.ndarray | CheckedArray:
            array = _map(folder / name, dtype)
            if sums and len(sums[name]) != -(-array.nbytes // block):
                raise ValueError(f"{name} is not complete")
            return CheckedArray(array, sums[name], algorithm, block, folder / name) if sums else array

        store = cls(
            checked("tokens.bin", np.int32),
            checked("trained.bin", np.bool_) if counts.trained < counts.tokens else None,
            _map(folder / "ends.bin", np.int64),
            _map(folder / "origins.bin", np.int64).reshape(-1, 3),
            files,
            counts,
        )
        if len(store) != counts.documents or len(store.tokens_T) != counts.tokens:
            raise ValueError("a file is not complete")
        return store


def write_sums(folder: Path) -> None:
    """Writes the checksums of the files of a folder, and waits until all of them are on disk."""
    names = ("counts.json", "ends.bin", "origins.bin", "tokens.bin", "trained.bin")
    packed = pack_sums({"files": {name: _sums_of(folder / name, ALGORITHM, BLOCK) for name in names}, "block": BLOCK})
    (folder / SUMS).write_bytes(packed)
    for name in (*names, SUMS):
        sync_file(folder / name)


def _sums_of(path: Path, algorithm: str, block: int) -> list[str]:
    found = []
    with path.open("rb") as file:
        while content := file.read(block):
            found.append(sum_of(content, algorithm))
    return found


def _map(path: Path, dtype: type) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")


class StoreWriter:
    """Writes documents as they come.

    Args:
        folder: Where; made if it is not there.
    """

    _FILES = (("tokens", np.int32), ("trained", np.bool_), ("ends", np.int64), ("origins", np.int64))

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.counts = folder, Counts()
        self._files = {name: (folder / f"{name}.bin").open("wb") for name, _ in self._FILES}

    def add(self, documents: Sequence[Document], file: int, number: int, chat: bool) -> None:
        """Adds the documents of a row.

        Args:
            documents: Of the row.
            file: Number of its file.
            number: Of the row.
            chat: Whether it is a conversation.
        """
        kept = [d for d in documents if d.trained is None or any(d.trained)]
        for document in kept:
            size = len(document.tokens)
            trained = np.ones(size, np.bool_) if document.trained is None else np.array(document.trained, np.bool_)
            self.counts.add(Counts(documents=1, tokens=size, trained=int(trained.sum()), largest=max(document.tokens)))
            self._write("tokens", np.array(document.tokens, np.int32))
            self._write("trained", trained)
            self._write("ends", np.array([self.counts.tokens], np.int64))
            self._write("origins", np.array([file, number, document.kind], np.int64))
        self.counts.add(
            Counts(rows=1, chats=int(chat), unlabelled=int(chat and not kept), empty=int(not chat and not kept))
        )

    def append(self, part: Path, counts: Counts, documents: slice, tokens: slice) -> None:
        """Adds some of the documents that another writer has written.

        Args:
            part: Its folder.
            counts: Of these documents.
            documents: Which they are.
            tokens: Which tokens they have.
        """
        for name, dtype in self._FILES:
            array = _map(part / f"{name}.bin", dtype)
            if name == "ends":
                array = array[documents] + (self.counts.tokens - tokens.start)
            elif name == "origins":
                array = array.reshape(-1, 3)[documents]
            else:
                array = array[tokens]
            self._write(name, array)
        self.counts.add(counts)

    def _write(self, name: str, array: np.ndarray) -> None:
        self._files[name].write(array.tobytes())

    def close(self) -> None:
        """Ends the files; what was written counts as whole from here on."""
        for file in self._files.values():
            file.close()
        (self.folder / "counts.json").write_text(json.dumps(asdict(self.counts)), encoding="utf-8")
