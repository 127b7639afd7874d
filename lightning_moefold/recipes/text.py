# SPDX-License-Identifier: Apache-2.0
"""Text files as rows of tokens.

Documents are the .txt files, and the strings ``text`` of the lines of .jsonl files. They are tokenised, each closed by
the tokenizer's end-of-text token, and laid into rows of L tokens in one of two ways:

    blocks      joined end to end and cut every L tokens; what is left over at the end is dropped
    documents   whole documents side by side, none cut unless it is longer than a row; the rest of a row is padding

Legend: N rows, L tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_moefold.models import MoEConfig
from lightning_moefold.recipes.errors import InputError

Packing = Literal["blocks", "documents"]
#: The document of a position that holds none.
PADDING = -1


@dataclass
class Rows:
    """Tokenised text, ready to be dealt out.

    Args:
        token_NL: Token ids, int64; 0 at padding.
        document_NL: Which document each token is of, int32, or :data:`PADDING`.
        names: Where each document was found, such as ``"b.jsonl:3"``.
    """

    token_NL: Tensor
    document_NL: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.token_NL)


def read_documents(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Name and text of every document.

    Raises:
        InputError: For a file that does not exist or is not UTF-8, or a line that is not JSON with a ``text``.
    """
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); give files with text.") from None
        if path.suffix != ".jsonl":
            yield path.name, text
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield f"{path.name}:{number}", json.loads(line)["text"] + ""
                except (ValueError, TypeError, KeyError):
                    raise InputError(f'{path}, line {number} is not a JSON object with a string "text".') from None


def tokenize(files: Sequence[Path], tokenizer: Path, length: int, packing: Packing) -> Rows:
    """Reads, tokenises and packs.

    Args:
        files: The text.
        tokenizer: Directory with a tokenizer of ``transformers``; if it holds a config.json as well, tokens are checked
            against its vocabulary.
        length: L.
        packing: How documents are laid into rows.

    Raises:
        InputError: If files, tokenizer or text are not usable.
    """
    names, documents = _tokenize(files, tokenizer)
    largest = max((max(tokens, default=0) for tokens in documents), default=0)
    if (tokenizer / "config.json").is_file():
        size = MoEConfig.from_pretrained(tokenizer).vocab_size
        if largest >= size:
            raise InputError(
                f"the tokenizer of {tokenizer} gives token {largest}, but the model has only {size} tokens; enlarge it with "
                f"transformers: load it, resize_token_embeddings({largest + 1}) or more, save_pretrained to another directory."
            )
    return (cut_blocks if packing == "blocks" else pack_documents)(documents, names, length)


def _tokenize(files: Sequence[Path], tokenizer: Path) -> tuple[list[str], list[list[int]]]:
    try:
        from transformers import AutoTokenizer  # here, as one rank needs it
    except ImportError:
        raise InputError(
            "text is tokenised by transformers, which is not installed; pip install transformers."
        ) from None
    try:
        if not tokenizer_files(tokenizer):
            raise OSError  # for a directory with a model alone, transformers makes up a tokenizer without any token
        encode = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    except (OSError, ValueError):
        raise InputError(f"{tokenizer} holds no tokenizer that transformers can load.") from None
    end = [] if encode.eos_token_id is None else [encode.eos_token_id]
    names, documents = [], []
    for name, text in read_documents(files):
        names.append(name)
        documents.append(encode(text, add_special_tokens=False, verbose=False)["input_ids"] + end)
    return names, documents


def tokenizer_files(directory: Path) -> list[Path]:
    """The files of a tokenizer, of whatever kind."""
    return sorted({path for pattern in ("*token*", "vocab*", "*.model") for path in directory.glob(pattern)})


def cut_blocks(documents: Sequence[Sequence[int]], names: list[str], length: int) -> Rows:
    """Documents joined end to end, as blocks of ``length`` tokens; tokens after the last whole block are left out.

    Raises:
        InputError: If there is not one whole block.
    """
    total = sum(map(len, documents))
    count = total // length
    if count == 0:
        raise InputError(
            f"the text has {total} tokens, fewer than one row of {length}; give more text or shorter rows."
        )
    tokens = torch.tensor([token for document in documents for token in document])
    sizes = torch.tensor([len(document) for document in documents])
    owners = torch.arange(len(documents), dtype=torch.int32).repeat_interleave(sizes)
    return Rows(tokens[: count * length].view(count, length), owners[: count * length].view(count, length), names)


def pack_documents(documents: Sequence[Sequence[int]], names: list[str], length: int) -> Rows:
    """Whole documents in rows of ``length`` tokens; one that is longer is cut into pieces, each in a row of its own.

    The longest go first, each into the fullest row that still has room for it.

    Raises:
        InputError: If there is no document of two tokens or more.
    """
    pieces = [
        (owner, document[start : start + length])
        for owner, document in enumerate(documents)
        for start in range(0, len(document), length)
        if len(document) - start > 1  # one token predicts nothing
    ]
    if not pieces:
        raise InputError("the text holds no document of at least two tokens; give files with text.")
    rows: list[list[tuple[int, Sequence[int]]]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the number of tokens that still fit
    available = 0  # bit r is set where room[r] is not empty
    for owner, tokens in sorted(pieces, key=lambda piece: -len(piece[1])):
        fitting = available >> len(tokens)
        if fitting:
            left = len(tokens) + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            available &= ~(1 << left) if not room[left] else -1
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append((owner, tokens))
        room[left - len(tokens)].append(row)
        available |= 1 << (left - len(tokens))
    token_NL = torch.zeros(len(rows), length, dtype=torch.int64)
    document_NL = torch.full((len(rows), length), PADDING, dtype=torch.int32)
    # The longest documents came first; rows in the order of the text are what a reader without shuffling expects.
    for row, members in enumerate(sorted(rows, key=lambda members: min(owner for owner, _ in members))):
        start = 0
        for owner, tokens in sorted(members, key=lambda member: member[0]):
            token_NL[row, start : start + len(tokens)] = torch.tensor(tokens)
            document_NL[row, start : start + len(tokens)] = owner
            start += len(tokens)
    return Rows(token_NL, document_NL, names)
