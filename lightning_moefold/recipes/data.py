# SPDX-License-Identifier: Apache-2.0
"""TextData: text files as the batches of a language model.

Legend: B rows of this rank's batch, L tokens of a row, N rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_moefold.checkpoint.stores import local_path
from lightning_moefold.checkpoint.tokenizers import tokenizer_files
from lightning_moefold.errors import InputError
from lightning_moefold.models import MoECausalLM
from lightning_moefold.models.batch import IGNORED
from lightning_moefold.recipes.documents import READABLE
from lightning_moefold.recipes.order import EMPTY, Position, RowLoader, RowOrder
from lightning_moefold.recipes.text import PADDING, Packing, Rows, tokenize

#: Of the rows in the cache; another number for rows that the same text would not make today.
_FORMAT = 2


class Part:
    """Some of the rows, left where they are.

    Args:
        rows: All of them.
        numbers: Which, in order; all if not given.
    """

    def __init__(self, rows: Rows, numbers: list[int] | None = None) -> None:
        self._rows = rows
        self.numbers = torch.arange(len(rows)) if numbers is None else torch.tensor(numbers, dtype=torch.int64)
        self.names = rows.names

    def __len__(self) -> int:
        return len(self.numbers)

    def take(self, index_B: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and documents of rows, ``[B, L]`` each; a row that is :data:`~.order.EMPTY` is all padding."""
        number_B = self.numbers[index_B.clamp(min=0)]
        empty_B1 = (index_B == EMPTY).unsqueeze(1)
        return self._rows.token_NL[number_B], self._rows.document_NL[number_B].masked_fill(empty_B1, PADDING)


class TextData(pl.LightningDataModule):
    """Text files as rows of tokens for :class:`~.module.FineTuneModule`, or for any module that takes such batches.

    A batch is ``{"input_ids", "labels"}``, ``[B, L]`` each, with ``document_ids`` where documents are packed, and with
    ``attention_mask`` where it holds padding. Labels stand at the positions of their inputs; -100 where no loss is
    wanted. One rank tokenises, once for the same files and settings; the others map its file into memory.

    The order of the rows depends on the seed alone, and a resumed run goes on with the first row not yet read, under
    any fold. Validation reads every row exactly once.

    Args:
        files: Text to train on: .txt files (one document each), or .jsonl and .json files of objects with a string
            ``text``; each may be a .gz file.
        tokenizer: Directory with a tokenizer of ``transformers``, usually the checkpoint.
        sequence_length: L.
        batch_size: Rows of a batch over all data ranks together; a multiple of their number.
        packing: ``"blocks"`` joins the documents and cuts every L tokens; ``"documents"`` lays whole documents side by
            side, so that attention and positions begin anew at each, and cuts only what is longer than L.
        val_files: Text to validate on. Without it, every 1/``val_fraction``-th row of ``files`` is for validation.
        val_fraction: Share of the rows kept for validation where there are no ``val_files``; 0 for none.
        test_files: Text to test on; that for validation if not given.
        predict_files: Text to predict; that for validation if not given.
        shuffle: Whether the order of training rows is drawn anew in each epoch.
        seed: Of that order.
        cache_dir: Where rows are kept for the other ranks and for the next time; all ranks must see it.
        add_special_tokens: Whether a document has the tokens that the tokenizer adds to a text by itself, such as a
            begin-of-text token. The end-of-text token closes every document either way. None is doubled that the text
            has already.
        trust_remote_code: Whether Python code that comes with the tokenizer may be run.

    Raises:
        InputError: For settings that cannot be.
    """

    def __init__(
        self,
        files: list[str],
        tokenizer: str,
        sequence_length: int = 1024,
        batch_size: int = 8,
        packing: Packing = "blocks",
        val_files: list[str] | None = None,
        val_fraction: float = 0.1,
        test_files: list[str] | None = None,
        predict_files: list[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str = ".moefold_tokens",
        add_special_tokens: bool = True,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        given = {"train": files, "val": val_files, "test": test_files, "predict": predict_files}
        for name, some in given.items():
            if isinstance(some, (str, Path)) or (name == "train" and not some):
                key = "files" if name == "train" else f"{name}_files"
                raise InputError(f"{key}={some!r} must be a list of at least one file.")
        if packing not in ("blocks", "documents"):
            raise InputError(f"packing={packing!r} is not known; use 'blocks' or 'documents'.")
        if sequence_length < 2:
            raise InputError(f"sequence_length={sequence_length} must be at least 2.")
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction={val_fraction} must be at least 0 and less than 1.")
        self.tokenizer, self.length, self.packing = local_path(tokenizer, "tokenizer"), sequence_length, packing
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.add_special_tokens, self.trust_remote_code = add_special_tokens, trust_remote_code
        self.val_fraction, self.cache_dir = (0.0 if val_files else val_fraction), local_path(cache_dir, "cache_dir")
        self._files = {name: [local_path(f, "the text file") for f in some] for name, some in given.items() if some}
        self._parts: dict[str, Part] = {}
        self._error: Exception | None = None
        self._loader: RowLoader | None = None
        self._position: Position | None = None

    @property
    def global_batch_size(self) -> int:
        """Rows of a batch over all data ranks together, for ``fold="auto"``."""
        return self.batch_size

    @property
    def sequence_length(self) -> int:
        """Tokens of a row, for ``fold="auto"``."""
        return self.length

    # ---- rows --------------------------------------------------------------------------------------------------

    @override
    def prepare_data(self) -> None:
        """Tokenises what has not been; an error is kept for :meth:`setup`, where all ranks hear of it."""
        try:
            self.tokenize()
        except Exception as error:
            self._error = error

    def tokenize(self) -> None:
        """Tokenises what has not been, on this process alone.

        Raises:
            InputError: If files, tokenizer or text are not usable.
        """
        for files in self._files.values():
            path = self._path(files)
            if path.exists():
                continue
            rows = tokenize(
                files, self.tokenizer, self.length, self.packing, self.add_special_tokens, self.trust_remote_code
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}")
            torch.save(asdict(rows), draft)
            draft.replace(path)
        self._check_split(len(self._load(self._files["train"])))

    def _check_split(self, count: int) -> None:
        if not all(map(len, self._split(count)[: 2 if self.val_fraction else 1])):
            raise InputError(
                f"the text makes {count} rows of {self.length} tokens, too few to train and validate on with "
                f"val_fraction={self.val_fraction}; give more text or shorter rows."
            )

    @override
    def setup(self, stage: str) -> None:
        self._agree()
        train = self._load(self._files["train"])
        parts = dict(zip(("train", "val"), (Part(train, numbers) for numbers in self._split(len(train))), strict=True))
        parts |= {name: Part(self._load(files)) for name, files in self._files.items() if name != "train"}
        self._parts = {"test": parts["val"], "predict": parts["val"]} | parts

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

    def _load(self, files: list[Path]) -> Rows:
        path = self._path(files)
        if not path.exists():
            raise InputError(f"cache_dir {self.cache_dir} is not seen by all ranks; choose a directory that is shared.")
        try:
            return Rows(**torch.load(path, mmap=True, weights_only=True))
        except Exception as error:
            raise InputError(
                f"{path} holds no rows that can be read ({type(error).__name__}); delete it, and the text is tokenised again."
            ) from None

    def _split(self, count: int) -> tuple[list[int], list[int]]:
        f = self.val_fraction
        val = [int((i + 1) * f) > int(i * f) for i in range(count)]
        return [i for i in range(count) if not val[i]], [i for i in range(count) if val[i]]

    def _path(self, files: list[Path]) -> Path:
        """Named for what the rows depend on."""
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is no file; give {READABLE}.")
        config = self.tokenizer / "config.json"  # may name the tokenizer's class, and has the size of the vocabulary
        beside = [
            *tokenizer_files(self.tokenizer),
            *self.tokenizer.glob("*.py"),
            *([config] if config.is_file() else []),
        ]
        seen = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in [*files, *sorted(set(beside))]]
        settings = [_FORMAT, self.length, self.packing, self.add_special_tokens, self.trust_remote_code]
        key = hashlib.sha256(json.dumps([seen, settings]).encode()).hexdigest()
        return self.cache_dir / f"{key[:16]}.pt"

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
            self._loader.load_state_dict(asdict(self._position))
            self._position = None
        if self.trainer is not None and len(self._loader) != usual:
            # Resumed in the middle of an epoch with another batch size: later epochs have another number of batches.
            self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        return self._loader

    @override
    def val_dataloader(self) -> RowLoader | list[RowLoader]:
        return self._make_loader("val") if len(self.part("val")) else []

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
            raise InputError(
                f"there is no text to {name} on; give {name}_files or val_files, or a val_fraction above 0."
            )
        place = {"rank": 0, "num_replicas": 1}
        if self.trainer is not None:
            place |= self.trainer.distributed_sampler_kwargs or {}
        order = RowOrder(
            len(part), self.batch_size, place["rank"], place["num_replicas"], shuffle=shuffle, seed=self.seed
        )
        return RowLoader(order, lambda index_B: self._collate(*part.take(index_B), sources=name == "predict"))

    def _name_tokenizer(self) -> None:
        """Has exports and checkpoints of the models name this tokenizer; loaders are made when the models are there."""
        if self.trainer is not None:
            for model in self.trainer.lightning_module.modules():
                if isinstance(model, MoECausalLM):
                    model.tokenizer_path = self.tokenizer

    def _collate(self, token_BL: Tensor, document_BL: Tensor, sources: bool) -> dict[str, Tensor]:
        real_BL = document_BL != PADDING
        batch = {"input_ids": token_BL, "labels": token_BL.masked_fill(~real_BL, IGNORED)}
        if self.packing == "documents":
            batch["document_ids"] = document_BL.long()
        if not bool(real_BL.all()):
            batch["attention_mask"] = real_BL.long()
        return batch | ({"source_ids": document_BL.long()} if sources else {})

    # ---- resuming ----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._loader is None else self._loader.state_dict()

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._position = Position(**state)
        # A module that asks for trainer.estimated_stepping_batches has had the loader made, and its batches counted,
        # before the position was known.
        self.trainer.fit_loop._combined_loader = None
