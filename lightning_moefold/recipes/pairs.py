# SPDX-License-Identifier: Apache-2.0
"""PreferenceData: answers that people prefer to others, or have judged, as batches for :class:`~.preference.PreferenceModule`.

Legend: P pairs of a rank's batch, R = 2 P rows, L tokens of a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_moefold.errors import InputError
from lightning_moefold.models.batch import IGNORED
from lightning_moefold.recipes.cache import TokenCache
from lightning_moefold.recipes.data import Part, TextData
from lightning_moefold.recipes.order import EMPTY, RowLoader
from lightning_moefold.recipes.packing import PADDING, Packing, Taken
from lightning_moefold.recipes.store import TokenStore
from lightning_moefold.recipes.template import Kind

Judged = Literal["preference", "feedback"]


class PairRows:
    """Two rows for each example.

    Preferences: the chosen and the rejected answer. Feedback: the answer, and the same prompt with the answer of the next
    example, by which the reference point of KTO is measured.

    Args:
        store: The documents: two for each preference, one for each example of feedback.
        length: L; of a longer row the first L tokens are kept, and an example without a label among them is left out.
        kind: Which it is.

    Attributes:
        cut: Examples that were shortened.
        dropped: Examples that were left out.
    """

    def __init__(self, store: TokenStore, length: int, kind: Judged) -> None:
        self.store, self.length, self.kind = store, length, kind
        each = 2 if kind == "preference" else 1
        lengths_N = store.lengths_N
        long_N, bad_N = lengths_N > length, np.zeros(len(store), np.bool_)
        for n in np.flatnonzero(long_N).tolist():
            begin = int(store.ends_N[n] - lengths_N[n])
            bad_N[n] = store.trained_T is None or not bool(store.trained_T[begin + 1 : begin + length].any())
        bad_E, long_E = (x.reshape(-1, each).any(1) for x in (bad_N, long_N))
        self.dropped, self.cut = int(bad_E.sum()), int((long_E & ~bad_E).sum())
        self._first_E = np.flatnonzero(~bad_E) * each

    def __len__(self) -> int:
        return len(self._first_E)

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same rows in the same order."""
        digest = hashlib.blake2b(f"{self.kind} {self.length}".encode(), digest_size=16)
        store = self.store
        arrays: list[Any] = [self._first_E, store.ends_N, store.origins_N3[:, 2], store.tokens_T]
        for array in arrays if store.trained_T is None else [*arrays, store.trained_T]:
            for begin in range(0, len(array), 1 << 20):
                digest.update(array[begin : begin + (1 << 20)].tobytes())
        return digest.hexdigest()

    def desired(self, number: int) -> bool:
        """Whether the answer of an example is one that people want."""
        return int(self.store.origins_N3[self._first_E[number], 2]) != Kind.UNDESIRED

    def take(self, numbers: Sequence[int]) -> Taken:
        """Rows ``2 p`` and ``2 p + 1`` of each example by number; those of a negative one are all padding."""
        shape = 2 * len(numbers), self.length
        token_RL, trained_RL = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        document_RL = np.full(shape, PADDING, np.int32)
        for p, number in enumerate(numbers):
            for r, (tokens, trained) in enumerate(self._two(number) if number >= 0 else ()):
                size = min(len(tokens), self.length)
                token_RL[2 * p + r, :size], trained_RL[2 * p + r, :size] = tokens[:size], trained[:size]
                document_RL[2 * p + r, :size] = number
        return Taken(*(torch.from_numpy(x) for x in (token_RL, document_RL, trained_RL)))

    def _two(self, number: int) -> list[tuple[list[int], list[bool]]]:
        first = int(self._first_E[number])
        tokens, trained = self._document(first)
        if self.kind == "preference":
            return [(tokens, trained), self._document(first + 1)]
        others, said = self._document(int(self._first_E[(number + 1) % len(self)]))
        asked, begin = trained.index(True), said.index(True)
        mixed = [False] * asked + said[begin:]
        return [(tokens, trained), (tokens[:asked] + others[begin:], mixed)]

    def _document(self, number: int) -> tuple[list[int], list[bool]]:
        tokens, trained, _ = self.store.document(number)
        return tokens, [True] * len(tokens) if trained is None else trained


class PreferenceData(TextData):
    """Preferences or feedback as pairs of rows, which no batch is cut through.

    A batch is ``{"input_ids", "labels", "attention_mask"}``, ``[2 P, L]`` each, and ``{"pair", "desired"}``, ``[P]`` each: rows
    ``2 p`` and ``2 p + 1`` are of example ``pair[p]``, -1 where there is none.

    Args:
        files: As for :class:`~.data.TextData`. Rows of preferences are ``{"prompt", "chosen", "rejected"}``, strings or lists
            of messages, or ``{"chosen", "rejected"}`` that begin with the same messages; of feedback
            ``{"prompt", "completion", "label"}`` with true for a desired answer.
        tokenizer: Directory with a tokenizer of ``transformers``, usually the checkpoint.
        kind: ``"preference"`` for DPO and IPO, ``"feedback"`` for KTO.
        sequence_length: L. Of a longer row the first L tokens are kept.
        batch_size: Examples of a batch over all data ranks together; a multiple of their number.
        val_files: What to validate on. Without it, every 1/``val_fraction``-th example is for validation.
        val_fraction: Share of the examples kept for validation; 0 for none.
        shuffle: Whether the order of training examples is drawn anew in each epoch.
        seed: Of that order.
        cache_dir: Where tokens are kept; all ranks must see it.
        trust_remote_code: Whether Python code that comes with the tokenizer may be run.
        chat_template: A file of jinja in place of the tokenizer's own chat template.
        template_options: Further values that the template reads.
        processes: How many processes tokenise.

    Raises:
        InputError: For settings that cannot be.
    """

    def __init__(
        self,
        files: list[str],
        tokenizer: str,
        kind: Judged = "preference",
        sequence_length: int = 1024,
        batch_size: int = 8,
        val_files: list[str] | None = None,
        val_fraction: float = 0.1,
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str = ".moefold_tokens",
        trust_remote_code: bool = False,
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        processes: int | None = None,
    ) -> None:
        super().__init__(
            files, tokenizer, sequence_length, batch_size, "documents", val_files, val_fraction, shuffle=shuffle, seed=seed,
            cache_dir=cache_dir, trust_remote_code=trust_remote_code, chat_template=chat_template,
            template_options=template_options, processes=processes,
        )  # fmt: skip
        if kind not in ("preference", "feedback"):
            raise InputError(f"kind={kind!r} is not known; use 'preference' or 'feedback'.")
        self.kind = kind
        self.cache = TokenCache(self.cache.folder, replace(self.cache.reading, form=kind))

    @property
    def global_batch_size(self) -> int:
        """Rows that a step trains on over all data ranks together, for ``fold="auto"``."""
        return self.batch_size * (2 if self.kind == "preference" else 1)

    @override
    def _rows(self, name: str) -> tuple[Any, Packing, list[int]]:
        rows = PairRows(self.cache.open(self._files[name]), self.sequence_length, self.kind)
        if len(rows) < (2 if self.kind == "feedback" else 1):
            raise InputError(
                f"{name}: of {rows.store.counts.rows} examples {len(rows)} have an answer within {self.sequence_length} tokens; "
                "give more of them, or longer rows."
            )
        return rows, "documents", []

    @override
    def _changed(self, rows: Any) -> tuple[str, list[tuple[int, str]]]:
        return f"{rows.store.counts.rows} examples", [
            (rows.store.counts.unlabelled, "left out, as nothing of an answer is trained on"),
            (rows.cut, f"cut to their first {self.sequence_length} tokens"),
            (rows.dropped, f"left out, as nothing of an answer is in their first {self.sequence_length} tokens"),
        ]

    @override
    def _batch(self, part: Part, index_B: Tensor, name: str) -> dict[str, Tensor]:
        taken = part.take(index_B)
        numbers = part.numbers[index_B.clamp(min=0)].tolist()
        desired = [part.rows.desired(number) for number in numbers]  # type: ignore[attr-defined]
        return {
            "input_ids": taken.token_BL,
            "labels": taken.token_BL.masked_fill(~taken.trained_BL, IGNORED),
            "attention_mask": (taken.document_BL != PADDING).long(),
            "pair": index_B.clone(),
            "desired": torch.tensor(desired) & (index_B != EMPTY),
        }

    def fingerprint(self, name: str) -> str:
        """Tells the examples of a part, and their order, from all others."""
        part = self.part(name)
        numbers = part.numbers.numpy().tobytes()
        return hashlib.blake2b(part.rows.fingerprint.encode() + numbers, digest_size=16).hexdigest()  # type: ignore[attr-defined]

    def in_order(self, name: str) -> RowLoader:
        """Every example of ``"train"`` or ``"val"`` once, dealt to the data ranks."""
        return self._make_loader(name)


def placed(batch: Mapping[str, Tensor]) -> Tensor:
    """The number of each row's example, ``[R]``; -1 where there is none."""
    return batch["pair"].repeat_interleave(2)
