# SPDX-License-Identifier: Apache-2.0
"""Tokenised files, found again by their content: the same text under another name or date is not tokenised twice."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_moefold.checkpoint.drafts import draft_of, publish, sync_file
from lightning_moefold.checkpoint.reasons import reason_of
from lightning_moefold.checkpoint.sums import check_archive
from lightning_moefold.checkpoint.tokenizers import tokenizer_files
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import SINGLE
from lightning_moefold.recipes.documents import READABLE, dataset_files
from lightning_moefold.recipes.packing import Packing, Plan, Rows, plan_rows
from lightning_moefold.recipes.store import TokenStore, write_sums
from lightning_moefold.recipes.tokenizing import Reading, tokenize

#: Of what is kept; another number for tokens that the same text would not make today.
_FORMAT = 5


class TokenCache:
    """A folder of tokenised files.

    Args:
        folder: Where; all ranks of a node must see it.
        reading: How files are read.
    """

    def __init__(self, folder: Path, reading: Reading) -> None:
        self.folder, self.reading = folder, reading

    def path(self, files: Sequence[Path]) -> Path:
        """Where the tokens of files are, or will be: named for what they depend on.

        Raises:
            InputError: If a file is not there.
        """
        for file in files:
            if not file.exists():
                raise InputError(f"{file} is no file; give {READABLE}, or a directory of datasets.")
        tokenizer = Path(self.reading.tokenizer)
        config = tokenizer / "config.json"  # may name the tokenizer's class, and has the size of the vocabulary
        beside = [
            *tokenizer_files(tokenizer), *tokenizer.glob("*.jinja"), *tokenizer.glob("additional_chat_templates/*"),
            *tokenizer.glob("*.py"), *([config] if config.is_file() else []),
        ]  # fmt: skip
        # Names say what a file is: how text is read and what its documents are called, or what a tokenizer takes it for.
        seen = [(file.name, [(part.name, self._digest(part)) for part in dataset_files(file)]) for file in files]
        owned = [(str(f.relative_to(tokenizer)), self._digest(f)) for f in sorted({f for f in beside if f.is_file()})]
        template = None if self.reading.chat_template is None else Path(self.reading.chat_template)
        settings = asdict(self.reading) | {
            "tokenizer": owned, "chat_template": self._digest(template) if template and template.is_file() else str(template),
        }  # fmt: skip
        key = hashlib.sha256(json.dumps([_FORMAT, seen, settings], sort_keys=True).encode()).hexdigest()
        return self.folder / key[:16]

    def _digest(self, file: Path) -> str:
        """Of the content of a file. A file of the same name, size and date is not read again."""
        status = file.stat()
        name = hashlib.sha256(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:24]
        known = self.folder / "digests" / name
        if status.st_size >= 1 << 24 and known.is_file():
            return known.read_text()
        digest = hashlib.blake2b(digest_size=16)
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if status.st_size >= 1 << 24:
            known.parent.mkdir(parents=True, exist_ok=True)
            _write(known, lambda draft: draft.write_text(digest.hexdigest()))
        return digest.hexdigest()

    def prepare(self, files: Sequence[Path], processes: int | None = None) -> Path:
        """Tokenises files unless that has been done; returns where the tokens are.

        Args:
            files: What is read.
            processes: See :func:`~.tokenizing.tokenize`.

        Raises:
            InputError: If files, tokenizer or rows are not usable.
        """
        path = self.path(files)
        if path.exists():
            return path
        try:
            with draft_of(path, SINGLE) as draft:
                tokenize(files, self.reading, draft, processes)
                write_sums(draft)
                if not path.exists():  # another process may have been faster
                    publish(draft, path)
        except OSError as error:
            raise InputError(f"{self.folder} cannot keep what is tokenised: {reason_of(error)}.") from error
        return path

    def open(self, files: Sequence[Path]) -> TokenStore:
        """Maps the tokens of files into memory.

        Raises:
            InputError: If they are not there, or cannot be read.
        """
        path = self.path(files)
        if not path.exists():
            raise InputError(f"cache_dir {self.folder} is not seen by all ranks; choose a directory that is shared.")
        try:
            return TokenStore.open(path, files)
        except Exception as error:
            raise _unreadable(path, error) from None

    def rows(self, files: Sequence[Path], packing: Packing, length: int, apart: bool) -> tuple[Rows, list[int]]:
        """The rows of files, planned once.

        Args:
            files: What was read.
            packing: How documents are laid into rows.
            length: Tokens of a row.
            apart: Whether each file has rows of its own.

        Returns:
            The rows, and how many of them are of each file, or of all.

        Raises:
            InputError: If there are none.
        """
        store, path = self.open(files), self.path(files) / f"{packing}-{length}{'-apart' * apart}.pt"
        if not path.exists():
            file_N = np.asarray(store.origins_N3[:, 0])
            parts = [np.flatnonzero(file_N == number) for number in range(len(store.files))] if apart else [None]
            plans = [plan_rows(store, packing, length, chosen) for chosen in parts]
            _write(path, lambda draft: torch.save(_packed(plans), draft))
        try:
            check_archive(path)
            saved = torch.load(path, mmap=True, weights_only=True)
            return Rows(store, _unpacked(saved, length)), saved["sizes"]
        except Exception as error:
            raise _unreadable(path, error) from None


def _packed(plans: Sequence[Plan]) -> dict[str, Any]:
    """Plans one after another, as what ``torch.save`` keeps and maps."""
    offsets = np.cumsum([0, *(len(plan.size_P) for plan in plans)])
    joined = {
        name: torch.from_numpy(np.concatenate([getattr(plan, name) for plan in plans]))
        for name in ("begin_P", "size_P", "document_P")
    }
    ends = [plan.last_N + offset for plan, offset in zip(plans, offsets, strict=False)]
    counts = {name: sum(getattr(plan, name) for plan in plans) for name in ("cut", "dropped")}
    return joined | {"last_N": torch.from_numpy(np.concatenate(ends)), "sizes": [len(p) for p in plans]} | counts


def _unpacked(saved: dict[str, Any], length: int) -> Plan:
    arrays = {name: saved[name].numpy() for name in ("begin_P", "size_P", "document_P", "last_N")}
    return Plan(**arrays, length=length, cut=saved["cut"], dropped=saved["dropped"])


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """Complete or not at all."""
    draft = path.with_suffix(f".{secrets.token_hex(4)}")
    write(draft)
    sync_file(draft)
    draft.replace(path)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} holds no rows that can be read ({type(error).__name__}); delete it, and the text is tokenised again."
    )
