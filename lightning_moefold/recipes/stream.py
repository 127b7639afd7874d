# SPDX-License-Identifier: Apache-2.0
"""StreamData: rows that are tokenised while the model trains, for text that is too much to tokenise before.

The stream is cut into blocks of ``buffer`` rows. The documents of a block are drawn in an order that depends on the seed, the epoch
and the number of the block, packed, and its rows are drawn likewise. So what is read is a function of the seed and of how far the
stream has been read, and a resumed run needs no more than its place: the block, and the rows read of it. Every rank reads the whole
stream and takes its own rows, so a run goes on under any number of data ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_moefold.errors import InputError
from lightning_moefold.recipes.conversation import Format
from lightning_moefold.recipes.data import Part, TextData, check_not_cut, collate
from lightning_moefold.recipes.documents import Raw, given_as_is, name_of, read_rows
from lightning_moefold.recipes.order import EMPTY, check_batch_size
from lightning_moefold.recipes.packing import Packing, Rows, Taken, plan_rows
from lightning_moefold.recipes.store import TokenStore
from lightning_moefold.recipes.template import Document, Kind, TrainOn
from lightning_moefold.recipes.tokenizing import Encoder, check_vocabulary


@dataclass(frozen=True)
class StreamPosition:
    """How far a stream has been read, over all ranks.

    Args:
        epoch: How often it has been read to its end.
        block: Blocks read to their end.
        rows: Rows read of the next one.
        batches: Global batches of this epoch.
    """

    epoch: int = 0
    block: int = 0
    rows: int = 0
    batches: int = 0


class StreamLoader:
    """Batches of one data rank. What Lightning asks of a dataloader without a length.

    It has no ``state_dict``, which Lightning would keep with the batch taken ahead; the data module keeps its position.

    Args:
        blocks: Gives the rows of the blocks of an epoch, in their order, from a block on.
        collate: Makes a batch of rows and of their numbers, -1 for an empty one.
        batch_size: Rows of a global batch.
        rank: This data rank, and how many there are.
    """

    def __init__(self, blocks: Any, collate: Any, batch_size: int, rank: tuple[int, int]) -> None:
        check_batch_size(batch_size, rank[1])
        self._blocks, self._collate, self._batch_size, self._rank = blocks, collate, batch_size, rank
        self._begin = StreamPosition()
        self._after = {0: self._begin}  # the latest positions, by the batches of the epoch before them

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        begin, held = self._begin, []
        batches = begin.batches
        for number, rows in enumerate(self._blocks(begin.epoch, begin.block), start=begin.block):
            first = begin.rows if number == begin.block else 0
            for row in range(first, len(rows)):
                held.append((rows, row))
                if len(held) == self._batch_size:
                    batches += 1
                    self._note(batches, StreamPosition(begin.epoch, number, row + 1, batches))
                    yield self._mine(held)
                    held = []
        if not batches and not held:
            raise InputError("the stream holds nothing that is trained on; give files with text.")
        self._begin = StreamPosition(begin.epoch + 1)
        if held:
            batches += 1
            self._note(batches, self._begin)
            yield self._mine(held)
        self._note(batches, self._begin)

    def _mine(self, held: list[tuple[Any, int]]) -> dict[str, Tensor]:
        rank, ranks = self._rank
        mine = held[rank::ranks]
        empty = [(held[0][0], EMPTY)] * (self._batch_size // ranks - len(mine))
        return self._collate([*mine, *empty])

    def _note(self, batches: int, position: StreamPosition) -> None:
        self._after.pop(batches - 3, None)
        self._after[batches] = position

    def position(self, batches: int | None = None) -> StreamPosition:
        """How far the stream has been read; the same on all ranks.

        Args:
            batches: Batches of the epoch that count: Lightning takes one ahead of that which it trains on.
        """
        return self._after[max(self._after) if batches is None else batches]

    def go_on(self, position: StreamPosition) -> None:
        """Goes on from a position, under any number of ranks and batch size."""
        self._begin, self._after = position, {position.batches: position}


class StreamData(TextData):
    """Texts and conversations that are tokenised while the model trains.

    Batches, spellings, templates and packing are those of :class:`~.data.TextData`, within blocks of ``buffer`` rows. The length is
    not known: give ``max_steps`` to the Trainer, and ``total_steps`` or a constant schedule to the module. Every rank tokenises the
    whole stream.

    Args:
        files: What to train on, as for :class:`~.data.TextData`.
        tokenizer: Directory with a tokenizer of ``transformers``, usually the checkpoint.
        buffer: Rows of the files among which the order is drawn. They are held in memory.
        source: Objects to train on in place of ``files``, such as an ``IterableDataset`` of ``datasets``; what can be iterated
            again and gives the same rows each time. Its ``skip`` is used to resume, if it has one.
        sequence_length: Tokens of a row.
        batch_size: Rows of a batch over all data ranks together; a multiple of their number.
        packing: See :class:`~.data.TextData`; by default documents.
        val_files: What to validate on; tokenised before.
        shuffle: Whether order is drawn anew for each block and epoch.
        seed: Of that order.
        cache_dir: For the tokens of ``val_files``.
        add_special_tokens: See :class:`~.data.TextData`.
        trust_remote_code: See :class:`~.data.TextData`.
        format: How rows are spelled; seen by their keys if not given.
        train_on: What of conversations is trained on.
        chat_template: A file of jinja in place of the tokenizer's own chat template.
        template_options: Further values that the template reads.

    Raises:
        InputError: For settings that cannot be.
    """

    def __init__(
        self,
        tokenizer: str,
        files: list[str] | None = None,
        buffer: int = 10_000,
        source: Any = None,
        sequence_length: int = 1024,
        batch_size: int = 8,
        packing: Packing = "documents",
        val_files: list[str] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        cache_dir: str = ".moefold_tokens",
        add_special_tokens: bool = True,
        trust_remote_code: bool = False,
        format: Format = "auto",
        train_on: TrainOn = "assistant",
        chat_template: str | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        if (files is None) == (source is None):
            raise InputError("a stream has either files or a source; give one of them.")
        if buffer < 1:
            raise InputError(f"buffer={buffer} must be at least 1.")
        if source is not None and iter(source) is source:
            raise InputError("source can be read only once; give something that begins anew each time it is iterated.")
        super().__init__(
            files if files is not None else ["source"], tokenizer, sequence_length, batch_size, packing, val_files, 0.0,
            shuffle=shuffle, seed=seed, cache_dir=cache_dir, add_special_tokens=add_special_tokens,
            trust_remote_code=trust_remote_code, format=format, train_on=train_on, chat_template=chat_template,
            template_options=template_options,
        )  # fmt: skip
        self._streamed = self._files.pop("train")
        self._source, self._buffer, self._laid = source, buffer, packing
        self._stream: StreamLoader | None = None
        self._place: StreamPosition | None = None

    # ---- rows --------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        self._agree()
        for file in self._streamed if self._source is None else ():
            if not file.exists():
                raise InputError(f"{file} is no file; give files with text.")
        parts = {name: Part(*self._rows(name)[:2]) for name in self._files}
        self._parts = (dict.fromkeys(("test", "predict"), parts["val"]) if "val" in parts else {}) | parts

    def blocks(self, epoch: int, first: int = 0) -> Iterator[Rows]:
        """The rows of each block of an epoch.

        Args:
            epoch: Its number.
            first: The block to begin with.
        """
        encoder = Encoder(self.cache.reading)
        raws = self._raws(first * self._buffer)
        for number in range(first, 1 << 62):
            block = list(islice(raws, self._buffer))
            if not block:
                return
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 1_000_003 + number)
            yield self._lay(encoder, block, generator if self.shuffle else None)

    def _raws(self, skipped: int) -> Iterator[Raw]:
        if self._source is None:
            return islice(read_rows(self._streamed), skipped, None)
        skip = getattr(self._source, "skip", None)
        rows: Iterable[Any] = skip(skipped) if skip else islice(self._source, skipped, None)
        return (
            Raw(0, number, f"source, row {number}", partial(given_as_is, row))
            for number, row in enumerate(rows, start=skipped + 1)
        )

    def _lay(self, encoder: Encoder, block: list[Raw], generator: torch.Generator | None) -> Rows:
        """Tokenises and packs a block; its rows come in the order in which they are read."""
        kept: list[tuple[Document, Raw]] = []
        for raw in block:
            name = name_of(self._streamed[raw.file], raw.number)
            documents = encoder.encode(raw.read(), name, raw.where)
            kept += [(d, raw) for d in documents if d.tokens and (d.trained is None or any(d.trained))]
        if generator is not None:
            kept = [kept[n] for n in torch.randperm(len(kept), generator=generator).tolist()]
        if any(d.kind != Kind.TEXT for d, _ in kept):
            check_not_cut(self._laid)
        check_vocabulary(encoder.reading, max((max(d.tokens) for d, _ in kept), default=0))
        store = TokenStore.of([d for d, _ in kept], [(raw.file, raw.number) for _, raw in kept], self._streamed)
        try:
            plan = plan_rows(store, self._laid, self.sequence_length)
        except InputError:  # too little for a row
            plan = plan_rows(
                TokenStore.of([Document([0, 0])], [(0, 0)], self._streamed), "documents", self.sequence_length
            )
            plan = replace(plan, last_N=plan.last_N[:0])
        if generator is not None and len(plan):
            plan = plan.reordered(torch.randperm(len(plan), generator=generator).numpy())
        return Rows(store, plan)

    # ---- batches -----------------------------------------------------------------------------------------------

    @override
    def train_dataloader(self) -> Any:
        self._name_tokenizer()
        self._stream = StreamLoader(self.blocks, self._collated, self.batch_size, self._data_rank())
        if self._place is not None:
            self._stream.go_on(self._place)
            self._place = None
        return self._stream

    def _collated(self, members: list[tuple[Rows, int]]) -> dict[str, Tensor]:
        taken = [rows.take([number]) for rows, number in members]
        return collate(Taken(*map(torch.cat, zip(*taken, strict=True))), self._laid == "documents")

    @override
    def val_dataloader(self) -> Any:
        return self._make_loader("val") if "val" in self._parts else []

    # ---- resuming ----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._stream is None:
            return {}
        done = None if self.trainer is None else self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return asdict(self._stream.position(done))

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._place = StreamPosition(**state)
            if self.trainer is not None:  # where somebody asked, it was made before the position was known
                self.trainer.fit_loop._combined_loader = None
