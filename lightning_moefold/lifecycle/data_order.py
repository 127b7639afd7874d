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
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from lightning_moefold.errors import CheckpointError, InputError, UnsupportedFeature
from lightning_moefold.lifecycle.data_positions import data_module_state
from lightning_moefold.sampler import ResumableSampler

#: Key in a checkpoint: the number of data ranks, and the place of each training loader's sampler, None where there is none.
ORDER = "moefold_data_order"


class DataOrder:
    """Deals the samplers of an entry point, and takes their places to checkpoints and back.

    Args:
        earlier: That of the Trainer's entry point before this one; a second fit goes on where the first has stopped.
    """

    def __init__(self, earlier: DataOrder | None = None) -> None:
        self._samplers: list[ResumableSampler | None] = []  # of the training loaders
        self._before: list[ResumableSampler | None] = [] if earlier is None else earlier._samplers or earlier._before
        self._places: list[Any] = []
        self._orders: list[Any] = []
        self._path, self._keeps_place, self._loaded = "", True, False
        self._ranks_before: int | None = None
        self._fresh: list[ResumableSampler] = []
        self._early: list[object] = []  # training loaders that were made before a checkpoint was loaded

    def save(self, checkpoint: dict[str, Any], trainer: pl.Trainer, ranks: int) -> None:
        """Adds the places to Lightning's checkpoint, the same on all ranks."""
        loop = trainer.fit_loop
        if "loops" not in checkpoint or loop._combined_loader is None:
            return
        samplers = [_sampler(loader) for loader in loop._combined_loader.flattened]
        places = [None if sampler is None else sampler.place() for sampler in samplers]
        orders = [None if sampler is None else list(sampler.order) for sampler in samplers]
        checkpoint[ORDER] = {"dp": ranks, "places": places, "orders": orders}

    def load(self, checkpoint: Mapping[str, Any], path: Any, trainer: pl.Trainer) -> None:
        """Takes the places from a checkpoint, before the training loaders are made."""
        order = checkpoint.get(ORDER, {"dp": None, "places": []})
        self._path, self._ranks_before, self._places = str(path), order["dp"], list(order["places"])
        self._orders = list(order.get("orders", [None] * len(self._places)))
        progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress")
        within = progress is not None and progress["current"]["ready"] > 0 and not progress["is_last_batch"]
        self._keeps_place = bool(data_module_state(checkpoint, trainer)) or not within
        self._loaded = True

    def prepare(self, dataloader: object, trainer: pl.Trainer, rank: int, ranks: int) -> None:
        """Deals the rows of a loader's sampler to the data ranks, before Lightning reads the loader.

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
        before = dict(enumerate(self._before)).get(len(self._samplers))
        self._samplers.append(sampler)
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
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress  # of all epochs, not of one that may be cut short
        follows = before is not None and before.order == sampler.order and progress.total.processed > 0
        place = before.place() if before is not None and follows else None
        sampler.deal(rank, ranks, 1 if batches is None else batches.batch_size, lambda: progress.total.processed)
        if place is not None:
            sampler.begin_after(place)
        self._fresh.append(sampler)
        self._go_on(dataloader, ranks)

    def _go_on(self, dataloader: object, ranks: int) -> None:
        """Puts a loader where the checkpoint says; refuses one of which nothing is known."""
        place, sampler = self._places.pop(0) if self._places else None, _sampler(dataloader)
        order = self._orders.pop(0) if self._orders else None
        if sampler is not None and place is not None:
            within = place["batches"] > 0 and place["row"] < place["end"]
            if within and order is not None and tuple(order) != sampler.order:
                there, here = (
                    f"{n} rows, shuffle={shuffle} and seed={seed}" for n, shuffle, seed in (order, sampler.order)
                )
                raise CheckpointError(
                    f"{self._path} was saved in the middle of an epoch with a ResumableSampler of {there}, and this one has "
                    f"{here}, so rows would be repeated or skipped; give it those, or resume at the end of an epoch."
                )
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
        """Finishes what the loaders need before the first training batch.

        Raises:
            UnsupportedFeature: If loaders of different lengths are read together.
            InputError: If later epochs would have too few batches to be validated.
            CheckpointError: If the run cannot go on with a loader.
        """
        loop = trainer.fit_loop
        if loop.restarted_on_epoch_end:
            # Lightning 2.6 takes an epoch that has ended for one in the middle if max_steps is given, and reads one batch more.
            loop.epoch_progress.increment_completed()
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
            loop.reset_restart_stage()
            loop.epoch_loop.reset_restart_stage()
        if self._loaded:
            others = [c for c in trainer.callbacks if not isinstance(c, BatchesOfEpoch)]  # type: ignore[attr-defined]
            trainer.callbacks = [BatchesOfEpoch(), *others]  # type: ignore[attr-defined]
        early, self._early = self._early if self._loaded else [], []
        for dataloader in early:  # estimated_stepping_batches asks for them before
            self._go_on(dataloader, ranks)
        if any(map(_sampler, early)) and loop._data_fetcher is not None:
            count_batches(trainer)
            iter(loop._data_fetcher)  # again, as workers may have read ahead
        fresh, self._fresh = self._fresh, []
        for sampler in fresh:  # whatever was counted when they were dealt, perhaps before the loops were restored
            sampler.count_from_here()
        loaders = loop._combined_loader
        ours = [] if loaders is None else [one for one in loaders.flattened if _sampler(one) is not None]
        lengths = {len(one) for one in (loaders.flattened if ours and loaders is not None else [])}
        every: Any = trainer.val_check_interval
        later = [found.batches_per_epoch for one in ours if (found := _sampler(one)) is not None]
        validates = trainer.enable_validation and trainer.check_val_every_n_epoch is not None
        if self._loaded and validates and isinstance(every, int) and later and every > min(later):
            raise InputError(
                f"val_check_interval={every} is more than the {min(later)} training batches of the epochs after this one, "
                "which would not be validated; lower it."
            )
        if len(lengths) > 1:
            raise UnsupportedFeature(
                f"training dataloaders with ResumableSampler have {sorted(lengths)} batches, and the place in one that is read "
                "again or cut short is not kept; give them equally many rows, or use one dataloader."
            )


class BatchesOfEpoch(Callback):
    """Counts the batches of each epoch of a resumed run.

    Under another number of rows the epoch in which it goes on has not as many batches as those after it, which Lightning takes for
    equal: it would then find no end of an epoch at which to validate.
    """

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts before Lightning begins to read."""
        count_batches(trainer)


def count_batches(trainer: pl.Trainer) -> None:
    """Sets the number of batches of the epoch that begins, and of those between validations, as Lightning does for the first."""
    loaders: Any = trainer.fit_loop._combined_loader
    if not any(map(_sampler, loaders.flattened)):
        return
    part: Any = trainer.limit_train_batches
    loaders.limits = [_parse_num_batches(RunningStage.TRAINING, len(loader), part) for loader in loaders.flattened]
    trainer.fit_loop.max_batches = number = loaders.limits[0]  # the others have as many
    if isinstance(trainer.val_check_interval, float):
        trainer.val_check_batch = max(1, int(number * trainer.val_check_interval))


def _sampler(dataloader: object) -> ResumableSampler | None:
    """Returns the sampler of a loader, given as ``sampler`` or, where Lightning does not replace it, in a ``BatchSampler``."""
    if not isinstance(dataloader, DataLoader):
        return None
    batches = getattr(dataloader.batch_sampler, "sampler", None)
    return next((s for s in (dataloader.sampler, batches) if isinstance(s, ResumableSampler)), None)
