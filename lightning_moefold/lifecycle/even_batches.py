# SPDX-License-Identifier: Apache-2.0
"""Checks that all ranks have the same number of batches; if not, all of them report the difference at once.

Ranks of a fold compute every batch together, so a rank whose data ends would leave the loop and the others waiting. If
all dataloaders draw rows of a dataset by number, their numbers of batches are compared once, before the first batch.
Otherwise there is one small sum before each batch, in which every rank says that it has a batch and whether Lightning
knows it to be the last. A rank whose data ends unexpectedly takes part in one more sum after it has left the loop,
before validation, saving or teardown. In this sum it meets the other ranks' next sum, or the other ranks that have also
left the loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import sized_len
from torch.utils.data import DataLoader, IterableDataset

from lightning_moefold import comm
from lightning_moefold.errors import BatchError
from lightning_moefold.mesh import FoldedMesh


class UnevenBatches(BatchError):
    """Ranks have different numbers of batches. All ranks raise this error together."""


class _Said(NamedTuple):
    """A rank's contribution to the sum before a batch.

    Args:
        left: Whether the rank has left the loop.
        ends: Whether this is the rank's last batch.
        steps: Whether the optimizer steps with this batch.
        loader: Number of the dataloader that the batch comes from.
    """

    left: bool = False
    ends: bool = False
    steps: bool = False
    loader: int = 0


class EvenBatches(Callback):
    """Checks one entry point of a Trainer; until :meth:`finish`, this callback comes before all others.

    Args:
        trainer: The Trainer.
        mesh: The folded mesh.
        evaluation: Whether ranks also need each other in evaluation.
    """

    def __init__(self, trainer: pl.Trainer, mesh: FoldedMesh, *, evaluation: bool) -> None:
        self._trainer, self._mesh, self._evaluation = trainer, mesh, evaluation
        self._trains_on = self._evaluates_on = False  # what this rank last said in the loop
        self._asks_training = self._asks_evaluation = True  # whether there is a sum before each batch
        trainer.callbacks.insert(0, self)  # type: ignore[attr-defined]

    def finish(self) -> None:
        """Removes this callback from the Trainer."""
        self._trainer.callbacks.remove(self)  # type: ignore[attr-defined]

    # ---- before a loop -----------------------------------------------------------------------------------------

    def check_loader(self, dataloader: object) -> None:
        """Raises on all ranks if only some have a dataloader that is empty, or of unknown length. Collective."""
        length = sized_len(dataloader)
        everyone = comm.all_gather_objects(length, self._mesh.world)
        together = self._evaluation or self._trainer.training
        if len({n is None for n in everyone}) > 1 or (together and len({n == 0 for n in everyone}) > 1):
            self._refuse_numbers(everyone)

    def begin_training(self) -> None:
        """Raises on all ranks if their known numbers of training batches differ. Collective."""
        self._trains_on = True
        trainer, steps = self._trainer, self._trainer.max_steps - self._trainer.global_step
        number = trainer.num_training_batches
        enough = not trainer.enable_validation and 0 <= steps * trainer.accumulate_grad_batches <= number
        mine = number, enough, _are_counted(trainer.fit_loop._combined_loader)
        everyone = comm.all_gather_objects(mine, self._mesh.world)
        if len({n for n, *_ in everyone}) > 1 and not all(is_enough for _, is_enough, _ in everyone):
            self._refuse_numbers([n for n, *_ in everyone])
        self._asks_training = not all(are_counted for *_, are_counted in everyone)
        self._trains_on = self._asks_training

    def begin_evaluation(self, numbers: Sequence[float]) -> None:
        """Raises on all ranks if the known numbers of batches of their dataloaders differ. Collective."""
        if not self._evaluation:
            return
        mine = tuple(numbers), _are_counted(self._trainer._evaluation_loop._combined_loader)
        everyone = comm.all_gather_objects(mine, self._mesh.world)
        if len({n for n, _ in everyone}) > 1:
            self._refuse_numbers([n[0] if len(n) == 1 else list(n) for n, _ in everyone])
        self._asks_evaluation = not all(are_counted for _, are_counted in everyone)
        self._evaluates_on = self._asks_evaluation

    def _refuse_numbers(self, everyone: list[Any]) -> NoReturn:
        by_number: dict[str, set[int]] = {}
        for rank, number in enumerate(everyone):
            text = "an unknown number" if number in (None, float("inf")) else str(number)
            by_number.setdefault(text, set()).add(self._data_rank(rank))
        what = ", ".join(f"{number} on {_named(ranks)}" for number, ranks in by_number.items())
        raise UnevenBatches(f"{self._doing} has different numbers of batches, {what}; {self._advice()}.")

    # ---- batches -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs the check before a training batch. Collective if dataloaders may end at any batch."""
        if not self._asks_training:
            return
        trainer, loop = self._trainer, self._trainer.fit_loop.epoch_loop
        steps = trainer.lightning_module.automatic_optimization and not loop._should_accumulate()
        # Then no rank reads further batches, and Lightning runs no validation at the end of the epoch.
        finishes = steps and 0 < trainer.max_steps <= trainer.global_step + 1 and not trainer.enable_validation
        self._trains_on = self._say(_Said(ends=loop._num_ready_batches_reached() and not finishes, steps=steps))

    def evaluate(self, loader: int) -> None:
        """Runs the check before a batch of an evaluation's dataloader. Collective if dataloaders may end at any batch."""
        if self._evaluation and self._asks_evaluation:
            loop = self._trainer._evaluation_loop
            self._evaluates_on = self._say(_Said(ends=loop.batch_progress.is_last_batch, loader=loader))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Resets the state at the start of an epoch."""
        self._trains_on = self._asks_training

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Informs the other ranks if this rank's data ended unexpectedly."""
        if self._trains_on and not trainer.fit_loop.epoch_loop.done:
            self._trains_on = self._say(_Said(left=True))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Informs the other ranks if this rank's validation data ended unexpectedly."""
        if self._evaluates_on:
            self._evaluates_on = self._say(_Said(left=True))

    on_test_epoch_end = on_validation_epoch_end

    def _say(self, said: _Said) -> bool:
        """Sums the contributions of all ranks and raises if they contradict each other; returns whether to continue."""
        numbers = [said.left, said.ends, said.steps, said.loader, said.loader**2]
        votes = torch.tensor(numbers, dtype=torch.int64)  # on the host, so that nothing waits for the device
        left, ends, steps, loader, square = comm.all_reduce_raw(votes, self._mesh.world).tolist()
        size = self._mesh.world.size
        if any(n not in (0, size) for n in (left, ends, steps)) or size * square != loader * loader:
            trainer = self._trainer
            loop = trainer.fit_loop.epoch_loop if trainer.training else trainer._evaluation_loop
            number = loop.batch_progress.current.ready
            ended = said.left or said.ends
            raise UnevenBatches(self._sentence(comm.all_gather_objects((ended, number), self._mesh.world)))
        return not (said.ends or said.left)

    # ---- what is said ------------------------------------------------------------------------------------------

    def _sentence(self, everyone: list[tuple[bool, int]]) -> str:
        over = {self._data_rank(rank) for rank, (ended, _) in enumerate(everyone) if ended}
        others = {self._data_rank(rank) for rank, (ended, _) in enumerate(everyone) if not ended}
        if not over or not others:
            return (
                f"{self._doing} is at different places on the data ranks, because their dataloaders differ; give every data rank "
                "the same dataloaders, with equally many batches in each."
            )
        number = min(n for ended, n in everyone if ended)
        if over & others:
            return (
                f"{self._doing} has ended after {number} batches on some ranks of {_named(over & others)} and not on others, "
                "which compute one batch together; shard the data by strategy.dp_rank and strategy.dp_size."
            )
        return (
            f"{self._doing} has ended after {number} batches on {_named(over)}, and {_named(others)} had more; "
            f"{self._advice()}={number}."
        )

    def _advice(self) -> str:
        assert self._trainer.state.stage is not None
        return (
            "ranks compute every batch together, so give each data rank equally many, as Lightning's sampler does, or let all "
            f"end with the shortest by limit_{self._trainer.state.stage.dataloader_prefix}_batches"
        )

    @property
    def _doing(self) -> str:
        stage = self._trainer.state.stage
        return {RunningStage.TRAINING: "training", RunningStage.TESTING: "testing"}.get(stage, "validation")  # type: ignore[arg-type]

    def _data_rank(self, rank: int) -> int:
        return self._mesh.fold.coordinates(rank)["dp"]


def _are_counted(loader: CombinedLoader | None) -> bool:
    """Whether each dataloader's length is exact, because it draws rows by number with a sampler of PyTorch."""
    return loader is not None and all(map(_is_counted, loader.flattened))


def _is_counted(loader: Any) -> bool:
    if type(loader) is not DataLoader:
        return getattr(loader, "has_exact_length", False)
    samplers = [s for s in (loader.sampler, loader.batch_sampler) if s is not None]
    known = all(
        type(s).__module__.partition(".")[0] in ("torch", "lightning") or getattr(s, "has_exact_length", False)
        for s in samplers
    )
    return known and not isinstance(loader.dataset, IterableDataset)


def _named(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    few = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"data rank{'s' * (len(numbers) > 1)} {few}"
