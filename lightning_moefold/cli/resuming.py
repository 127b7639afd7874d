# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint ``--ckpt_path last`` means, why a fit ended, and what remains of a fit that never began."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason

from lightning_moefold.checkpoint import stores
from lightning_moefold.checkpoint.sharded import META
from lightning_moefold.errors import CheckpointError
from lightning_moefold.lifecycle.fold_choice import agreed, announce
from lightning_moefold.lifecycle.processes import connect_processes
from lightning_moefold.strategy import MoEFoldStrategy

#: Variable in which the first process hands the checkpoint that it has found to those that it starts.
_DECIDED = "MOEFOLD_LAST_CHECKPOINT"
#: What the folder of a run holds before its first step; event files are TensorBoard's.
_OF_A_START = ("config.yaml", "hparams.yaml", "metrics.csv", "events.out.tfevents.*")


def agreed_last_checkpoint(trainer: pl.Trainer) -> str | None:
    """Returns what :func:`last_checkpoint` finds on the first rank, on all ranks: another run may save between two looks.

    Ranks that a launcher has started connect for it. The processes that this one will start inherit it in their environment.

    Raises:
        CheckpointError: On all ranks, if there is none.
    """
    strategy, environment = trainer.strategy, getattr(trainer.strategy, "cluster_environment", None)
    writer, _, decided = os.environ.get(_DECIDED, "").partition(" ")
    if writer == str(os.getppid()) and trainer.local_rank > 0 and not dist.is_initialized():
        return decided or None  # by the process that has just started this one
    external = environment is not None and (environment.creates_processes_externally or dist.is_initialized())
    if isinstance(strategy, MoEFoldStrategy) and environment is not None and external:
        assert strategy.accelerator is not None
        strategy.accelerator.setup_device(strategy.root_device)
        connect_processes(environment, strategy.root_device, strategy._process_group_backend, strategy._timeout)
        return agreed(lambda: last_checkpoint(trainer), strategy.broadcast, trainer.global_rank)
    found = last_checkpoint(trainer)
    os.environ[_DECIDED] = f"{os.getpid()} {found or ''}"
    return found


def last_checkpoint(trainer: pl.Trainer) -> str | None:
    """Returns the newest complete checkpoint of all runs in the Trainer's directory, because each start has its own folder.

    Returns:
        Its absolute path; None before the first checkpoint of a run that its launcher restarts.

    Raises:
        CheckpointError: If there is none, and no launcher restarts the run.
    """
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is not None]
    places = [stores.parse_path(place) for place in (*(str(c.dirpath) for c in savers), trainer.default_root_dir)]
    folders = [place for place in places if isinstance(place, Path)]
    found = {_written(path): path for folder in folders for path in folder.glob("**/*.ckpt") if _written(path)}
    if found:
        return str(found[max(found)].absolute())
    looked = " and ".join(dict.fromkeys(str(place) for place in folders or places))
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 or "SLURM_JOB_ID" in os.environ:
        announce(f"no checkpoint in {looked} yet, so --ckpt_path last begins from the model")
        return None
    where = "" if folders else "; checkpoints in a store are given by their address"
    raise CheckpointError(
        f"--ckpt_path last finds no complete checkpoint in {looked}{where}; leave it out to begin from the model."
    )


def _written(path: Path) -> int:
    """Returns the time at which a checkpoint was completed, in nanoseconds; 0 for one that is not."""
    file = path / META if path.is_dir() else path
    return file.stat().st_mtime_ns if file.is_file() else 0


def endings(trainer: pl.Trainer) -> list[str]:
    """Returns lines that say why a fit made no step, or ended before its last one."""
    steps = trainer.global_step
    if getattr(trainer.strategy, "resumed_step", None) == steps:
        limits = {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
        given = " and ".join(f"{name}={limit}" for name, limit in limits.items() if limit not in (None, -1))
        return [
            f"finished            the checkpoint is of step {steps}, and {given or 'the data'} leaves no step to make"
        ]
    if not trainer.should_stop or steps >= trainer.estimated_stepping_batches:
        return []
    reasons = [why for callback in trainer.callbacks if (why := _reason(callback))]  # type: ignore[attr-defined]
    why = "; ".join(reasons) or "a callback or the module has set trainer.should_stop"
    return [f"stopped early       after step {steps}: {why}"]


def _reason(callback: pl.Callback) -> str | None:
    """Returns why a callback has stopped the run, or None if it has not."""
    if isinstance(callback, Timer):
        remaining = callback.time_remaining()
        return "max_time has passed" if remaining is not None and remaining <= 0 else None
    if not isinstance(callback, EarlyStopping):
        return None
    name, best = callback.monitor, f"{float(callback.best_score):.4g}"
    return {
        EarlyStoppingReason.PATIENCE_EXHAUSTED: f"{name} has not improved on {best} in {callback.wait_count} validations",
        EarlyStoppingReason.STOPPING_THRESHOLD: f"{name} has reached stopping_threshold={callback.stopping_threshold}",
        EarlyStoppingReason.DIVERGENCE_THRESHOLD: f"{name} has reached divergence_threshold={callback.divergence_threshold}",
        EarlyStoppingReason.NON_FINITE_METRIC: f"{name} is NaN or infinite",
    }.get(callback.stopping_reason)


def remove_empty_start(trainer: pl.Trainer, since: float) -> None:
    """Removes the log folders of a fit that made no step, if they hold nothing but its configuration.

    Args:
        trainer: The Trainer of the fit.
        since: When the command began, in seconds since the epoch; folders with older files are left alone.
    """
    if not trainer.is_global_zero or trainer.global_step != (getattr(trainer.strategy, "resumed_step", None) or 0):
        return
    for logger in trainer.loggers:
        place = getattr(logger, "log_dir", None)
        if place is None or not isinstance(folder := stores.parse_path(place), Path) or not folder.is_dir():
            continue
        files = [path for path in folder.rglob("*") if not path.is_dir()]
        known = all(any(path.match(name) for name in _OF_A_START) for path in files)
        if known and all(path.stat().st_mtime >= since - 1 for path in files):
            shutil.rmtree(folder, ignore_errors=True)
