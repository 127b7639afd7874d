# SPDX-License-Identifier: Apache-2.0
"""Documents laid into rows of L tokens. What lies where is planned here; a row's tokens are fetched when it is read.

    blocks      joined end to end and cut every L tokens; what is left over at the end is dropped
    documents   whole documents side by side; the rest of a row is padding. A text longer than a row is cut into pieces, each in
                a row of its own; of a conversation longer than a row the first L tokens are kept, and if none of these is
                trained on, it is left out

Legend: N rows, L tokens of a row, P pieces, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_moefold.errors import InputError
from lightning_moefold.recipes.store import TokenStore
from lightning_moefold.recipes.template import Kind

Packing = Literal["blocks", "documents"]
#: The document of a position that holds none.
PADDING = -1


class Taken(NamedTuple):
    """Rows of a batch.

    Args:
        token_BL: Ids, int64; 0 at padding.
        document_BL: Which document each token is of, int32, or :data:`PADDING`.
        trained_BL: Whether it is trained on.
    """

    token_BL: Tensor
    document_BL: Tensor
    trained_BL: Tensor


@dataclass
class Plan:
    """Which tokens are in which row.

    Args:
        begin_P: Where each piece begins among all tokens, int64.
        size_P: Its tokens, int32.
        document_P: Its document, int64.
        last_N: Where the pieces of each row end among all pieces, int64.
        length: L.
        cut: Conversations that were shortened.
        dropped: Conversations that were left out, as no token that is trained on fits into a row.
    """

    begin_P: np.ndarray
    size_P: np.ndarray
    document_P: np.ndarray
    last_N: np.ndarray
    length: int
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.last_N)

    def reordered(self, order_N: np.ndarray) -> Plan:
        """The same rows in another order."""
        pieces = [np.array(self.pieces(row)) for row in order_N.tolist()]
        order_P = np.concatenate(pieces)
        arrays = (self.begin_P[order_P], self.size_P[order_P], self.document_P[order_P])
        return Plan(*arrays, np.cumsum([len(part) for part in pieces]), self.length, self.cut, self.dropped)

    def pieces(self, row: int) -> range:
        """Those of a row."""
        return range(int(self.last_N[row - 1]) if row else 0, int(self.last_N[row]))


class Rows:
    """Tokenised text, ready to be dealt out.

    Args:
        store: The documents.
        plan: Where they lie.
    """

    def __init__(self, store: TokenStore, plan: Plan) -> None:
        self.store, self.plan = store, plan

    def __len__(self) -> int:
        return len(self.plan)

    def take(self, numbers: Sequence[int]) -> Taken:
        """Rows by number; one that is negative is all padding."""
        shape = len(numbers), self.plan.length
        token_BL, trained_BL = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        document_BL = np.full(shape, PADDING, np.int32)
        plan, store = self.plan, self.store
        for b, number in enumerate(numbers):
            at = 0
            for piece in plan.pieces(number) if number >= 0 else ():
                begin, size = int(plan.begin_P[piece]), int(plan.size_P[piece])
                token_BL[b, at : at + size] = store.tokens_T[begin : begin + size]
                trained = True if store.trained_T is None else store.trained_T[begin : begin + size]
                trained_BL[b, at : at + size] = trained
                document_BL[b, at : at + size] = plan.document_P[piece]
                at += size
        return Taken(torch.from_numpy(token_BL), torch.from_numpy(document_BL), torch.from_numpy(trained_BL))


def plan_rows(store: TokenStore, packing: Packing, length: int, documents: np.ndarray | None = None) -> Plan:
    """Lays documents into rows.

    Args:
        store: The documents.
        packing: How.
        length: L.
        documents: Which of them; all if not given.

    Raises:
        InputError: If they do not fill one row.
    """
    chosen = np.arange(len(store)) if documents is None else documents
    return (_cut_blocks if packing == "blocks" else _pack_documents)(store, chosen, length)


def _cut_blocks(store: TokenStore, chosen: np.ndarray, length: int) -> Plan:
    lengths_N = store.lengths_N[chosen].astype(np.int64)
    ends = np.cumsum(lengths_N)
    total = int(ends[-1]) if len(ends) else 0
    if total < length:
        raise InputError(
            f"the text has {total} tokens, fewer than one row of {length}; give more text or shorter rows."
        )
    rows = np.arange(1, total // length + 1) * length
    # Pieces end where a document ends or a row does.
    ends = ends[ends < rows[-1]]
    last_P = np.union1d(ends, rows)
    first_P = np.concatenate([[0], last_P[:-1]])
    holder_P = np.searchsorted(np.cumsum(lengths_N), first_P, side="right")
    begins = store.ends_N[chosen] - lengths_N
    inside_P = first_P - (np.cumsum(lengths_N) - lengths_N)[holder_P]
    return Plan(
        (begins[holder_P] + inside_P).astype(np.int64), (last_P - first_P).astype(np.int32), chosen[holder_P],
        np.searchsorted(last_P, rows) + 1, length,
    )  # fmt: skip


def _pack_documents(store: TokenStore, chosen: np.ndarray, length: int) -> Plan:
    """The longest go first, each into the fullest row that still has room for it."""
    begin_P, size_P, owner_P, cut, dropped = _pieces(store, chosen, length)
    if not len(size_P) and dropped:
        raise InputError(
            f"none of the {dropped} conversations has anything that is trained on in its first {length} tokens; use longer rows."
        )
    if not len(size_P):
        raise InputError("the text holds no document of at least two tokens; give files with text.")
    row_P = _best_fit(size_P, length)
    # The longest documents came first; rows in the order of the text are what a reader without shuffling expects.
    first_N = np.full(int(row_P.max()) + 1, len(size_P), np.int64)
    np.minimum.at(first_N, row_P, np.arange(len(row_P)))
    rank_N = np.empty_like(first_N)
    rank_N[np.argsort(first_N)] = np.arange(len(first_N))
    row_P = rank_N[row_P]
    order_P = np.argsort(row_P, kind="stable")
    last_N = np.cumsum(np.bincount(row_P, minlength=len(first_N)))
    return Plan(begin_P[order_P], size_P[order_P], owner_P[order_P], last_N, length, cut, dropped)


def _pieces(store: TokenStore, chosen: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Begin, size and document of each piece, and how many conversations were cut and left out."""
    lengths_N = store.lengths_N[chosen]
    begins_N, dropped = store.ends_N[chosen] - lengths_N, 0
    chat_N = store.origins_N3[chosen, 2] != Kind.TEXT
    keep_N = lengths_N > 1  # one token predicts nothing
    if store.trained_T is not None:
        for n in np.flatnonzero(chat_N & (lengths_N > length)).tolist():
            begin = int(begins_N[n])
            if not bool(store.trained_T[begin + 1 : begin + length].any()):
                keep_N[n], dropped = False, dropped + 1
    cut = int((chat_N & keep_N & (lengths_N > length)).sum())
    lengths_N = np.where(chat_N, np.minimum(lengths_N, length), lengths_N)[keep_N]
    begins_N, owners_N = begins_N[keep_N], chosen[keep_N]
    counts_N = -(-lengths_N // length)
    number_P = np.arange(counts_N.sum()) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    begin_P = np.repeat(begins_N, counts_N) + number_P * length
    size_P = np.minimum(np.repeat(lengths_N, counts_N) - number_P * length, length)
    use_P = size_P > 1
    return begin_P[use_P], size_P[use_P].astype(np.int32), np.repeat(owners_N, counts_N)[use_P], cut, dropped


def _best_fit(size_P: np.ndarray, length: int) -> np.ndarray:
    """The row of each piece."""
    row_P = np.empty(len(size_P), np.int64)
    room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the number of tokens that still fit
    available, count = 0, 0  # bit r is set where room[r] is not empty
    for piece in np.argsort(-size_P, kind="stable"):
        size = int(size_P[piece])
        fitting = available >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                available &= ~(1 << left)
        else:
            left, row = length, count
            count += 1
        row_P[piece] = row
        room[left - size].append(row)
        available |= 1 << (left - size)
    return row_P
