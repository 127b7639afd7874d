# SPDX-License-Identifier: Apache-2.0
"""Goes on with the first row not yet read: places of :class:`ResumableSampler` in checkpoints, and what cannot be resumed.

A loader that keeps no place begins its epoch again when a run is resumed, as under any strategy, and Lightning warns. Under
another number of data ranks its first batches would also be others than those that were trained on, so this is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from lightning_moefold.errors import CheckpointError, UnsupportedFeature
from lightning_moefold.lifecycle.data_positions import data_module_state
from lightning_moefold.sampler import ResumableSampler

#: Key in a checkpoint: the number of data ranks, and the place of each training loader's sampler, None where there is none.
ORDER = "moefold_data_order"


class DataOrder:
    """Deals the samplers of an entry point, and takes their places to checkpoints and back."""

    def __init__(self) -> None:
        self._places: list[Any] = []
        self._path, self._keeps_place, self._loaded = "", True, False
        self._ranks_before: int | None = None
        self._fresh: list[ResumableSampler] = []
        self._early: list[object] = []  # training loaders that were made before a checkpoint was loaded

    def save(self, checkpoint: dict[str, Any], trainer: pl.Trainer, ranks: int) -> None:
        """Adds the places to Lightning's checkpoint, the same on all ranks.

        Args:
            checkpoint: The checkpoint.
            trainer: The Trainer.
            ranks: Number of data ranks.
        """
        loop = trainer.fit_loop
        if "loops" not in checkpoint or loop._combined_loader is None:
            return
        samplers = map(_sampler, loop._combined_loader.flattened)
        places = [None if sampler is None else sampler.place() for sampler in samplers]
        checkpoint[ORDER] = {"dp": ranks, "places": places}

    def load(self, checkpoint: Mapping[str, Any], path: Any, trainer: pl.Trainer) -> None:
        """Takes the places from a checkpoint, before the training loaders are made.

        Args:
            checkpoint: The checkpoint.
            path: Its path, for errors.
            trainer: The Trainer.
        """
        order = checkpoint.get(ORDER, {"dp": None, "places": []})
        self._path, self._ranks_before, self._places = str(path), order["dp"], list(order["places"])
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        within = progress is not None and progress["current"]["ready"] > 0 and not progress["is_last_batch"]
        self._keeps_place = bool(data_module_state(checkpoint, trainer)) or not within
        self._loaded = True

    def prepare(self, dataloader: object, trainer: pl.Trainer, rank: int, ranks: int) -> None:
        """Deals the sampler of a loader that Lightning is about to read.

        Args:
            dataloader: The loader.
            trainer: The Trainer.
            rank: This data rank.
            ranks: Number of data ranks.

        Raises:
            UnsupportedFeature: If the sampler cannot be honoured there.
            CheckpointError: If the run cannot go on with this loader.
        """
        sampler = _sampler(dataloader)
        if trainer.state.stage != RunningStage.TRAINING:
            if sampler is not None:
                raise UnsupportedFeature(
                    "ResumableSampler reads whole batches only and is for training; leave it out of other dataloaders, so that "
                    "every row is evaluated."
                )
            return
        if not self._loaded:
            self._early.append(dataloader)
        if sampler is None:
            self._go_on(dataloader, ranks)
            return
        if isinstance(dataloader, _Stateful):
            raise UnsupportedFeature(
                f"{type(dataloader).__name__} keeps a place of its own besides that of ResumableSampler; use torch's DataLoader."
            )
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            raise UnsupportedFeature(
                "reload_dataloaders_every_n_epochs makes new dataloaders, which do not know what was read from those before; leave "
                "it out with ResumableSampler."
            )
        assert isinstance(dataloader, DataLoader)
        batches: Any = dataloader.batch_sampler
        progress: Any = (
            trainer.fit_loop.epoch_loop.batch_progress
        )  # of all epochs, not of this one, which may be cut short
        sampler.deal(rank, ranks, 1 if batches is None else batches.batch_size, lambda: progress.total.processed)
        self._fresh.append(sampler)
        self._go_on(dataloader, ranks)

    def _go_on(self, dataloader: object, ranks: int) -> None:
        """Puts a loader where the checkpoint says; refuses one of which nothing is known."""
        place, sampler = self._places.pop(0) if self._places else None, _sampler(dataloader)
        if sampler is not None and place is not None:
            sampler.go_on(place)
        if sampler is not None or self._keeps_place or self._ranks_before in (None, ranks):
            return
        name, stateful = type(dataloader).__name__, isinstance(dataloader, _Stateful)
        # Workers of torchdata's loader, and its samplers, count the rows of one rank.
        if (
            stateful
            and not isinstance(dataloader, DataLoader)
            and not type(dataloader).__module__.startswith("torchdata")
        ):
            return
        raise CheckpointError(
            f"{self._path} was saved in the middle of an epoch on {self._ranks_before} data ranks, and {name} "
            f"{'counts the rows of one of them' if stateful else 'does not know what was read'}, so on {ranks} data ranks rows "
            "would be repeated or skipped; give the DataLoader sampler=lightning_moefold.ResumableSampler(dataset) from the "
            "beginning, or resume at the end of an epoch."
        )

    def begin(self, trainer: pl.Trainer, ranks: int) -> None:
        """Finishes what the loaders need before the first batch.

        Args:
            trainer: The Trainer, about to train.
            ranks: Number of data ranks.

        Raises:
            UnsupportedFeature: If loaders of different lengths are read together.
            CheckpointError: If the run cannot go on with a loader.
        """
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:
            # Lightning 2.6 takes an epoch that has ended for one in the middle if max_steps is given, and reads one batch more.
            loop.epoch_progress.increment_completed()
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
            loop.reset_restart_stage()
            loop.epoch_loop.reset_restart_stage()
        early, self._early = self._early if self._loaded else [], []
        for dataloader in early:  # estimated_stepping_batches asks for them before
            self._go_on(dataloader, ranks)
        if any(map(_sampler, early)) and loop._data_fetcher is not None:
            iter(loop._data_fetcher)  # again, as workers may have read ahead
        fresh, self._fresh = self._fresh, []
        for sampler in fresh:  # whatever was counted when they were dealt, perhaps before the loops were restored
            sampler.count_from_here()
        loaders = loop._combined_loader
        ours = [] if loaders is None else [one for one in loaders.flattened if _sampler(one) is not None]
        lengths = {len(one) for one in (loaders.flattened if ours and loaders is not None else [])}
        if len(lengths) > 1:
            raise UnsupportedFeature(
                f"training dataloaders with ResumableSampler have {sorted(lengths)} batches, and the place in one that is read "
                "again or cut short is not kept; give them equally many rows, or use one dataloader."
            )


def _sampler(dataloader: object) -> ResumableSampler | None:
    """Returns the sampler of a loader, given as ``sampler`` or in a ``BatchSampler``."""
    if not isinstance(dataloader, DataLoader):
        return None
    batches = getattr(dataloader.batch_sampler, "sampler", None)
    return next((s for s in (dataloader.sampler, batches) if isinstance(s, ResumableSampler)), None)
