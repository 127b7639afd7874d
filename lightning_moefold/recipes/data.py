# SPDX-License-Identifier: Apache-2.0
"""TextData: texts and conversations as the batches of a language model.

Legend: B rows of this rank's batch, L tokens of a row, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_moefold.checkpoint.hub import local_directory
from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import IGNORED
from lightning_moefold.recipes.cache import TokenCache
from lightning_moefold.recipes.conversation import Format
from lightning_moefold.recipes.mixture import Mixture, check_weights
from lightning_moefold.recipes.order import EMPTY, RowLoader, RowOrder
from lightning_moefold.recipes.packing import PADDING, Packing, Rows, Taken
from lightning_moefold.recipes.template import TrainOn
from lightning_moefold.recipes.tokenizing import Reading


class Part:
    """Some of the rows, left where they are.

    Args:
        rows: All of them.
        packing: How documents were laid into them.
        numbers: Which, in order; all if not given.
        mixture: How often each is read in an epoch; once if not given.
    """

    def __init__(
        self, rows: Rows, packing: Packing, numbers: np.ndarray | None = None, mixture: Mixture | None = None
    ) -> None:
        self.rows, self.packing, self.mixture = rows, packing, mixture
        self.numbers = torch.arange(len(rows)) if numbers is None else torch.from_numpy(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, index_B: Tensor) -> Taken:
        """Rows, ``[B, L]`` each; a row that is :data:`~.order.EMPTY` is all padding."""
        number_B = self.numbers[index_B.clamp(min=0)].masked_fill(index_B == EMPTY, EMPTY)
        return self.rows.take(number_B.tolist())


class TextData(pl.LightningDataModule):
    """Texts and conversations as rows of tokens for :class:`~.module.FineTuneModule`, or for any module that takes such batches.

    A batch is ``{"input_ids", "labels"}``, ``[B, L]`` each, with ``document_ids`` where documents are packed, and with
    ``attention_mask`` where it holds padding. Labels stand at the positions of their inputs; -100 where no loss is
    wanted. One process of a node has the files tokenised, once for the same content and settings; all ranks map the result
    into memory.

    The order of the rows depends on the seed alone, and a resumed run goes on with the first row not yet read, under
    any fold. Validation reads every row exactly once.

    Args:
        files: What to train on, a path or a list of them: .txt files (one document each); .jsonl, .json and .parquet files of
            rows, each of which may be a .gz file; or directories that ``datasets`` has written with ``save_to_disk``. A row is
            a text or a conversation (:mod:`.conversation`).
        tokenizer: Directory with a tokenizer of ``transformers``, usually the checkpoint.
        sequence_length: L.
        batch_size: Rows of a batch over all data ranks together; a multiple of their number.
        packing: ``"blocks"`` joins the documents and cuts every L tokens; ``"documents"`` lays whole documents side by
            side, so that attention and positions begin anew at each (:mod:`.packing`). By default blocks for texts, and
            documents where there is a conversation.
        val_files: What to validate on. Without it, every 1/``val_fraction``-th row of ``files`` is for validation.
        val_fraction: Share of the rows kept for validation where there are no ``val_files``; 0 for none.
        test_files: What to test on; that for validation if not given.
        predict_files: What to predict; that for validation if not given.
        shuffle: Whether the order of training rows is drawn anew in each epoch.
        seed: Of that order.
        cache_dir: Where tokens are kept for the other ranks and for the next time; all ranks must see it.
        add_special_tokens: Whether a text has the tokens that the tokenizer adds to it by itself, such as a
            begin-of-text token. The end-of-text token closes every text either way. None is doubled that the text
            has already. Conversations have what their template writes.
        trust_remote_code: Whether Python code that comes with the tokenizer may be run.
        format: How rows are spelled; seen by their keys if not given.
        train_on: What of conversations is trained on: every turn of an ``"assistant"``, the ``"last"`` one, or ``"all"``; never
            prompts and messages with ``"weight": 0``.
        chat_template: A file of jinja in place of the tokenizer's own chat template.
        template_options: Further values that the template reads, such as ``{"enable_thinking": False}``.
        weights: How often the rows of each of ``files`` are read in an epoch: 2 for twice, 0.5 for half of them, drawn anew
            each time. Rows then hold documents of one file only. By default once.
        processes: How many processes tokenise; by default one for every processor and 16 MB of text.

    Raises:
        InputError: For settings that cannot be.
    """

    def __init__(
        self,
        files: list[str] | str,
        tokenizer: str,
        sequence_length: int = 1024,
        batch_size: int = 8,
        packing: Packing | None = None,
        val_files: list[str] | str | None = None,
        val_fraction: float = 0.1,
        test_files: list[str] | str | None = None,
        predict_files: list[str] | str | None = None,
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str = ".moefold_tokens",
        add_special_tokens: bool = True,
        trust_remote_code: bool = False,
        format: Format = "auto",
        train_on: TrainOn = "assistant",
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
        weights: list[float] | None = None,
        processes: int | None = None,
    ) -> None:
        super().__init__()
        given: dict[str, Any] = {"train": files, "val": val_files, "test": test_files, "predict": predict_files}
        for name, some in given.items():
            if isinstance(some, (str, Path)) and str(some):
                given[name] = [some]
            elif isinstance(some, str) or (name == "train" and not some):
                key = "files" if name == "train" else f"{name}_files"
                raise InputError(f"{key}={some!r} must be a file or a list of at least one file.")
        _choose("packing", packing, (None, "blocks", "documents"))
        _choose("format", format, ("auto", "text", "messages", "sharegpt", "alpaca", "prompt_completion"))
        _choose("train_on", train_on, ("assistant", "last", "all"))
        if sequence_length < 2:
            raise InputError(f"sequence_length={sequence_length} must be at least 2.")
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction={val_fraction} must be at least 0 and less than 1.")
        if processes is not None and processes < 1:
            raise InputError(f"processes={processes} must be at least 1.")
        if weights is not None:
            check_weights(weights, len(given["train"]))
        self.tokenizer = local_path(local_directory(tokenizer, "tokenizer"), "tokenizer")
        self.sequence_length, self.packing = sequence_length, packing
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.weights, self.processes = weights, processes
        self.val_fraction = 0.0 if val_files else val_fraction
        template = None if chat_template is None else str(local_path(chat_template, "chat_template"))
        reading = Reading(
            str(self.tokenizer),
            add_special_tokens,
            trust_remote_code,
            format,
            train_on,
            template,
            template_options or {},
        )
        self.cache = TokenCache(local_path(cache_dir, "cache_dir"), reading)
        self._files = {name: [local_path(f, "the text file") for f in some] for name, some in given.items() if some}
        self._parts: dict[str, Part] = {}
        self._error: Exception | None = None
        self._loader: RowLoader | None = None
        self._position: dict[str, Any] | None = None

    @property
    def global_batch_size(self) -> int:
        """Rows of a batch over all data ranks together, for ``fold="auto"``."""
        return self.batch_size

    # ---- rows --------------------------------------------------------------------------------------------------

    @override
    def prepare_data(self) -> None:
        """Tokenises what has not been; an error is kept for :meth:`setup`, where all ranks hear of it."""
        try:
            self.tokenize()
        except Exception as error:
            self._error = error

    def tokenize(self) -> None:
        """Tokenises what has not been, from this process alone.

        Raises:
            InputError: If files, tokenizer or text are not usable.
        """
        for name, files in self._files.items():
            self.cache.prepare(files, self.processes)
            rows, _, _ = self._rows(name)
            if name == "train":
                self._check_split(len(rows))

    def _check_split(self, count: int) -> None:
        if not all(map(len, self._split(count)[: 2 if self.val_fraction else 1])):
            raise InputError(
                f"the text makes {count} rows of {self.sequence_length} tokens, too few to train and validate on with "
                f"val_fraction={self.val_fraction}; give more text or shorter rows."
            )

    @override
    def setup(self, stage: str) -> None:
        self._agree()
        parts = {}
        for name in self._files:
            rows, packing, sizes = self._rows(name)
            if name == "train":
                train, val = self._split(len(rows))
                parts["val"] = Part(rows, packing, val)
                parts["train"] = Part(rows, packing, train, self._mix(train, sizes))
            else:
                parts[name] = Part(rows, packing)
            self._tell(name, rows)
        self._parts = {"test": parts["val"], "predict": parts["val"]} | parts

    def _rows(self, name: str) -> tuple[Rows, Packing, list[int]]:
        """Rows of files, how they are packed, and how many there are of each file where they have weights."""
        files = self._files[name]
        chats = self.cache.open(files).counts.chats
        if chats:
            check_not_cut(self.packing)
        packing = self.packing or ("documents" if chats else "blocks")
        apart = name == "train" and self.weights is not None
        rows, sizes = self.cache.rows(files, packing, self.sequence_length, apart)
        return rows, packing, sizes

    def _mix(self, train: np.ndarray, sizes: list[int]) -> Mixture | None:
        if self.weights is None:
            return None
        borders = np.searchsorted(train, np.cumsum([0, *sizes]))
        return Mixture(np.diff(borders).tolist(), self.weights)

    def _tell(self, name: str, rows: Rows) -> None:
        """Says what is not trained on as it was given."""
        of, said = self._changed(rows)
        if told := [f"{count} {what}" for count, what in said if count]:
            rank_zero_warn(f"{name}: of {of}, {'; '.join(told)}.")
        if empty := rows.store.counts.empty:
            rank_zero_warn(f"{name}: of {rows.store.counts.rows} rows, {empty} left out, as their text is empty.")

    def _changed(self, rows: Rows) -> tuple[str, list[tuple[int, str]]]:
        """Of what there are how many, and how many of these are left out or cut."""
        return f"{rows.store.counts.chats} conversations", [
            (rows.store.counts.unlabelled, "left out, as nothing of them is trained on"),
            (rows.plan.cut, f"cut to their first {self.sequence_length} tokens"),
            (rows.plan.dropped, f"left out, as nothing of their first {self.sequence_length} tokens is trained on"),
        ]

    def _agree(self) -> None:
        error, self._error = self._error, None
        if self.trainer is None:
            if error is not None:
                raise error
            return
        strategy = self.trainer.strategy
        fine = strategy.reduce_boolean_decision(error is None, all=True)
        message = strategy.broadcast(str(error) if error is not None else None)
        if error is not None:
            raise error
        if not fine:
            raise InputError(message or "the text could not be prepared on another node; see its output.")

    def _split(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        place = np.arange(count + 1)
        val = np.diff((place * self.val_fraction).astype(np.int64)) > 0
        return np.flatnonzero(~val), np.flatnonzero(val)

    def part(self, name: str) -> Part:
        """The rows for ``"train"``, ``"val"``, ``"test"`` or ``"predict"``, once :meth:`setup` has run."""
        return self._parts[name]

    # ---- batches -----------------------------------------------------------------------------------------------

    @override
    def train_dataloader(self) -> RowLoader:
        # overfit_batches asks for the same batches again and again.
        overfit = self.trainer is not None and self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        self._loader = self._make_loader("train", shuffle=self.shuffle and not overfit)
        usual = len(self._loader)
        if self._position is not None:
            self._loader.load_state_dict(self._position)
            self._position = None
        if self.trainer is not None and len(self._loader) != usual:
            # Resumed in the middle of an epoch with another batch size: later epochs have another number of batches.
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        return self._loader

    @override
    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        return self._make_loader("val") if self._must_validate() or len(self.part("val")) else []

    def _must_validate(self) -> bool:
        """Whether somebody asked for validation alone, which is then not left out without a word."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.VALIDATING

    @override
    def test_dataloader(self) -> RowLoader:
        return self._make_loader("test")

    @override
    def predict_dataloader(self) -> RowLoader:
        return self._make_loader("predict")

    def _make_loader(self, name: str, *, shuffle: bool = False) -> RowLoader:
        self._name_tokenizer()
        part = self.part(name)
        if not len(part):
            what, files = ("validate", "") if name == "val" else (name, f"{name}_files or ")
            raise InputError(f"there is no text to {what} on; give {files}val_files, or a val_fraction above 0.")
        order = RowOrder(
            len(part), self.batch_size, *self._data_rank(), shuffle=shuffle, seed=self.seed, mixture=part.mixture
        )
        laid = {"packing": part.packing, "sequence_length": self.sequence_length}
        return RowLoader(order, lambda index_B: self._batch(part, index_B, name), laid)

    def _data_rank(self) -> tuple[int, int]:
        """This data rank, and how many there are."""
        place = (None if self.trainer is None else self.trainer.distributed_sampler_kwargs) or {}
        return place.get("rank", 0), place.get("num_replicas", 1)

    def _batch(self, part: Part, index_B: Tensor, name: str) -> dict[str, Tensor]:
        """A batch of rows by their number in a part; -1 for an empty one."""
        return collate(part.take(index_B), part.packing == "documents", sources=name == "predict")

    def _name_tokenizer(self) -> None:
        """Has exports and checkpoints of the models name this tokenizer; loaders are made when the models are there."""
        if self.trainer is not None:
            for model in self.trainer.lightning_module.modules():
                if isinstance(model, MoECausalLM):
                    model.tokenizer_path = self.tokenizer

    # ---- resuming ----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._loader is None else self._loader.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._position = state
        # A module that asks for trainer.estimated_stepping_batches has had the loader made, and its batches counted,
        # before the position was known.
        self.trainer.fit_loop._combined_loader = None


def check_not_cut(packing: Packing | None) -> None:
    """Refuses to lay conversations into rows that cut them.

    Raises:
        InputError: For ``"blocks"``.
    """
    if packing == "blocks":
        raise InputError(
            "packing='blocks' cuts conversations anywhere, so that answers lose their questions; use 'documents'."
        )


def collate(taken: Taken, packed: bool, sources: bool = False) -> dict[str, Tensor]:
    """Makes a batch of rows, with ``document_ids`` where they are packed, and ``source_ids`` where they are asked for."""
    real_BL = taken.document_BL != PADDING
    batch = {"input_ids": taken.token_BL, "labels": taken.token_BL.masked_fill(~taken.trained_BL, IGNORED)}
    if packed:
        batch["document_ids"] = taken.document_BL.long()
    if not bool(real_BL.all()):
        batch["attention_mask"] = real_BL.long()
    return batch | ({"source_ids": taken.document_BL.long()} if sources else {})


def _choose(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        known = " or ".join(repr(choice) for choice in choices if choice is not None)
        raise InputError(f"{name}={value!r} is not known; use {known}.")
