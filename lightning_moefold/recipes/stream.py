# SPDX-License-Identifier: Apache-2.0
"""StreamData: rows that are tokenised while the model trains, for text that is too much to tokenise before.

The stream is cut into blocks of ``buffer`` rows. The documents of a block are drawn in an order that depends on the seed, the epoch
and the number of the block, packed, and its rows are drawn likewise. So what is read is a function of the seed and of how far the
stream has been read, and a resumed run needs no more than its place: the block, and the rows read of it. Every rank reads the whole
stream and takes its own rows, so a run goes on under any number of data ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_moefold.errors import InputError
from lightning_moefold.recipes.conversation import Format
from lightning_moefold.recipes.data import Part, TextData, check_not_cut, collate
from lightning_moefold.recipes.documents import Raw, check_readable, given_as_is, name_of, read_rows
from lightning_moefold.recipes.order import EMPTY, check_batch_size, check_same_order
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
        batches: Global batches since the stream began again.
    """

    epoch: int = 0
    block: int = 0
    rows: int = 0
    batches: int = 0


class StreamLoader:
    """Batches of one data rank. What Lightning asks of a dataloader without a length.

    Each iteration begins after the last batch that was trained on, so epochs that are cut short do not begin at the same rows.

    It has no ``state_dict``, which Lightning would keep with the batch taken ahead; the data module keeps its position.

    Args:
        blocks: Gives the rows of the blocks of an epoch, in their order, from a block on.
        collate: Makes a batch of rows and of their numbers, -1 for an empty one.
        batch_size: Rows of a global batch.
        rank: This data rank, and how many there are.
        done: Counts the batches that were trained on, from any number: Lightning takes one ahead of that which it trains on.
            Without it, each is thought to be trained on when it is given.
    """

    def __init__(
        self, blocks: Any, collate: Any, batch_size: int, rank: tuple[int, int], done: Callable[[], int] | None = None
    ) -> None:
        check_batch_size(batch_size, rank[1])
        self._blocks, self._collate, self._batch_size, self._rank = blocks, collate, batch_size, rank
        self._done, self._done_before = done, 0
        self._after: dict[int, StreamPosition] = {}  # the latest ones, by the batches of this iteration before them
        self.go_on(StreamPosition())

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.go_on(self.position())
        return self._read()

    def _read(self) -> Iterator[dict[str, Tensor]]:
        begin, taken, held = self._after[0], 0, []
        for number, rows in enumerate(self._blocks(begin.epoch, begin.block), start=begin.block):
            first = begin.rows if number == begin.block else 0
            for row in range(first, len(rows)):
                held.append((rows, row))
                if len(held) == self._batch_size:
                    taken += 1
                    self._note(taken, StreamPosition(begin.epoch, number, row + 1, begin.batches + taken))
                    yield self._mine(held)
                    held = []
        following = StreamPosition(begin.epoch + 1)
        if held:
            taken += 1
            self._note(taken, following)
            yield self._mine(held)
        if taken:
            self._note(taken, following)
        elif begin == StreamPosition(begin.epoch):
            raise InputError("the stream holds nothing that is trained on; give files with text.")
        else:  # nothing was left of it
            self.go_on(following)
            yield from self._read()

    def _mine(self, held: list[tuple[Any, int]]) -> dict[str, Tensor]:
        rank, ranks = self._rank
        mine = held[rank::ranks]
        empty = [(held[0][0], EMPTY)] * (self._batch_size // ranks - len(mine))
        return self._collate([*mine, *empty])

    def _note(self, taken: int, position: StreamPosition) -> None:
        self._after[taken] = position
        trained = self._trained()
        self._after = {number: one for number, one in self._after.items() if number >= trained}

    def _trained(self) -> int:
        """Batches of this iteration that were trained on."""
        last = max(self._after)
        return last if self._done is None else min(self._done() - self._done_before, last)

    def position(self) -> StreamPosition:
        """How far the stream has been trained on; the same on all ranks."""
        return self._after[self._trained()]

    def go_on(self, position: StreamPosition) -> None:
        """Goes on from a position, under any number of ranks and batch size."""
        self._after = {0: position}
        self._done_before = 0 if self._done is None else self._done()


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
        self._saved: dict[str, Any] | None = None
        self._told: set[str] = set()
        self._empty: InputError | None = None  # why the last block without a row has none

    # ---- rows --------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        self._agree()
        for file in self._streamed if self._source is None else ():
            check_readable(file)
        reading = self.cache.reading
        if reading.chat_template is not None or reading.form not in ("auto", "text"):
            _ = Encoder(reading).template  # so that a missing one is told before the first step
        parts = {name: Part(*self._rows(name)[:2]) for name in self._files}
        self._parts = (dict.fromkeys(("test", "predict"), parts["val"]) if "val" in parts else {}) | parts

    def blocks(self, epoch: int, first: int = 0) -> Iterator[Rows]:
        """The rows of each block of an epoch.

        Args:
            epoch: Its number.
            first: The block to begin with.

        Raises:
            InputError: If rows cannot be read, or nothing of any of them is left.
        """
        encoder, found = Encoder(self.cache.reading), first > 0
        self._empty = None
        raws = self._raws(first * self._buffer)
        for number in range(first, 1 << 62):
            block = list(islice(raws, self._buffer))
            if not block:
                break
            seed = ((self.seed * 1_000_003 + epoch) * 1_000_003 + number) % 2**63
            generator = torch.Generator().manual_seed(seed) if self.shuffle else None
            rows = self._lay(encoder, block, generator, f"block {number} of the stream")
            found = found or len(rows) > 0
            yield rows
        if not found and self._empty is not None:
            raise InputError(
                f"no block of buffer={self._buffer} rows fills a row of {self.sequence_length} tokens; give a larger buffer, more "
                "text, shorter rows, or packing='documents'."
                if self._laid == "blocks"
                else str(self._empty)
            )

    def _raws(self, skipped: int) -> Iterator[Raw]:
        if self._source is None:
            return islice(read_rows(self._streamed), skipped, None)
        skip = getattr(self._source, "skip", None)
        rows: Iterable[Any] = skip(skipped) if skip else islice(self._source, skipped, None)
        return (
            Raw(0, number, f"source, row {number}", partial(given_as_is, row))
            for number, row in enumerate(rows, start=skipped + 1)
        )

    def _lay(self, encoder: Encoder, block: list[Raw], generator: torch.Generator | None, where: str) -> Rows:
        """Tokenises and packs a block; its rows come in the order in which they are read."""
        kept: list[tuple[Document, Raw]] = []
        chats = unlabelled = 0
        for raw in block:
            name = name_of(self._streamed[raw.file], raw.number)
            documents = encoder.encode(raw.read(), name, raw.where)
            some = [(d, raw) for d in documents if d.tokens and (d.trained is None or any(d.trained))]
            chats += not documents or documents[0].kind != Kind.TEXT
            unlabelled += not some
            kept += some
        if generator is not None:
            kept = [kept[n] for n in torch.randperm(len(kept), generator=generator).tolist()]
        if any(d.kind != Kind.TEXT for d, _ in kept):
            check_not_cut(self._laid)
        check_vocabulary(encoder.reading, max((max(d.tokens) for d, _ in kept), default=0))
        store = TokenStore.of([d for d, _ in kept], [(raw.file, raw.number) for _, raw in kept], self._streamed)
        store.counts.chats, store.counts.unlabelled = chats, unlabelled
        try:
            plan = plan_rows(store, self._laid, self.sequence_length)
        except InputError as error:  # too little for a row
            self._empty = error
            self._tell_once("empty", f"{where} is left out: {error}")
            plan = plan_rows(
                TokenStore.of([Document([0, 0])], [(0, 0)], self._streamed), "documents", self.sequence_length
            )
            plan = replace(plan, last_N=plan.last_N[:0])
        if generator is not None and len(plan):
            plan = plan.reordered(torch.randperm(len(plan), generator=generator).numpy())
        rows = Rows(store, plan)
        of, said = self._changed(rows)
        if told := [f"{count} {what}" for count, what in said if count]:
            self._tell_once("changed", f"{where}: of {of}, {'; '.join(told)}.")
        return rows

    def _tell_once(self, what: str, message: str) -> None:
        """Says what is lost where it first happens; a stream has many blocks, and most are alike."""
        if what not in self._told:
            self._told.add(what)
            rank_zero_warn(f"{message} Later blocks of which this holds are not named.")

    # ---- batches -----------------------------------------------------------------------------------------------

    @override
    def train_dataloader(self) -> Any:
        self._name_tokenizer()
        before, done = self._stream, self._done()
        self._stream = StreamLoader(self.blocks, self._collated, self.batch_size, self._data_rank(), done)
        if self._place is not None:
            if self._place.block or self._place.rows:
                check_same_order(self._saved, self._decided_by)
            self._stream.go_on(self._place)
            self._place = None
        elif before is not None and done is not None and done():  # Lightning has the loader made anew
            self._stream.go_on(before.position())
        return self._stream

    def _done(self) -> Callable[[], int] | None:
        """Counts the batches trained on."""
        loop = getattr(self.trainer, "fit_loop", None)
        if loop is None:
            return None
        if self.trainer.overfit_batches:  # type: ignore[union-attr]
            return lambda: 0  # the same batches again and again
        return lambda: loop.epoch_loop.batch_progress.total.processed

    @property
    def _decided_by(self) -> dict[str, Any]:
        """What the order depends on: a position says nothing about another one."""
        return {
            "shuffle": self.shuffle, "seed": self.seed, "buffer": self._buffer, "packing": self._laid,
            "sequence_length": self.sequence_length,
        }  # fmt: skip

    def _collated(self, members: list[tuple[Rows, int]]) -> dict[str, Tensor]:
        taken = [rows.take([number]) for rows, number in members]
        return collate(Taken(*map(torch.cat, zip(*taken, strict=True))), self._laid == "documents")

    @override
    def val_dataloader(self) -> Any:
        return self._make_loader("val") if self._must_validate() or "val" in self._parts else []

    @override
    def part(self, name: str) -> Part:
        what = "validate" if name == "val" else name
        if name not in self._parts:
            raise InputError(
                "the rows of a stream are made while it is trained on, and cannot be shown before; name its files in TextData."
                if name == "train"
                else f"there is no text to {what} on, as a stream has no rows of its own for that; give val_files."
            )
        return self._parts[name]

    # ---- resuming ----------------------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._stream is None else asdict(self._stream.position()) | {"order": self._decided_by}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._saved = state.get("order")
            self._place = StreamPosition(**{name: value for name, value in state.items() if name != "order"})
            if self.trainer is not None:  # where somebody asked, it was made before the position was known
                self.trainer.fit_loop._combined_loader = None
