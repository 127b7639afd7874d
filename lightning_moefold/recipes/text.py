# SPDX-License-Identifier: Apache-2.0
"""Text files as rows of tokens.

Documents (:mod:`.documents`) are tokenised, each begun as the tokenizer begins a text (with a begin-of-text token, say)
and closed by its end-of-text token, and laid into rows of L tokens in one of two ways:

    blocks      joined end to end and cut every L tokens; what is left over at the end is dropped
    documents   whole documents side by side, none cut unless it is longer than a row; the rest of a row is padding

Legend: N rows, L tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_moefold.checkpoint.tokenizers import load_tokenizer
from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.recipes.documents import read_documents

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


def tokenize(
    files: Sequence[Path],
    tokenizer: Path,
    length: int,
    packing: Packing,
    add_special_tokens: bool = True,
    trust_remote_code: bool = False,
) -> Rows:
    """Reads, tokenises and packs.

    Args:
        files: The text.
        tokenizer: Directory with a tokenizer of ``transformers``; if it holds a config.json as well, tokens are checked
            against its vocabulary.
        length: L.
        packing: How documents are laid into rows.
        add_special_tokens: Whether documents begin (and end) with the tokens that the tokenizer adds by itself.
        trust_remote_code: Whether Python code that comes with the tokenizer may be run.

    Raises:
        InputError: If files, tokenizer or text are not usable.
    """
    try:
        encode = load_tokenizer(tokenizer, trust_remote_code)
    except CheckpointError as error:
        raise InputError(str(error)) from error.__cause__
    added = list(encode("", add_special_tokens=add_special_tokens)["input_ids"])
    names, documents = [], []
    for name, text in read_documents(files):
        names.append(name)
        documents.append(_encode(encode, text, name, add_special_tokens, added))
    largest = max((max(tokens, default=0) for tokens in documents), default=0)
    size = _vocabulary(tokenizer / "config.json")
    if size is not None and largest >= size:
        raise InputError(
            f"the tokenizer of {tokenizer} gives token {largest}, but the model has only {size} tokens; enlarge it with "
            f"transformers: load it, resize_token_embeddings({largest + 1}) or more, save_pretrained to another directory."
        )
    return (cut_blocks if packing == "blocks" else pack_documents)(documents, names, length)


def _vocabulary(config: Path) -> int | None:
    """``vocab_size`` of a model of any kind; None where it is not known."""
    try:
        size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _encode(tokenizer: Any, text: str, name: str, add_special_tokens: bool, added: list[int]) -> list[int]:
    """The tokens of a document: begun as the tokenizer begins it, and closed by the end-of-text token, each once.

    Args:
        tokenizer: Of ``transformers``.
        text: The document.
        name: Where it was found.
        add_special_tokens: Whether the tokenizer adds what it adds by itself.
        added: What that is, for an empty text.
    """
    try:
        tokens = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    except (TypeError, UnicodeError):  # half of a surrogate pair, which JSON can spell
        raise InputError(f"{name} holds characters that are no Unicode text; remove them.") from None
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    if added[:1] == begin and tokens[:2] == begin * 2:
        del tokens[0]  # the text has its own
    if added[-1:] == end and tokens[-2:] == end * 2:
        del tokens[-1]
    return tokens if end == [None] or tokens[-1:] == end else tokens + end


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
