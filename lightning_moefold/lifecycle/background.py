# SPDX-License-Identifier: Apache-2.0
"""Saves in the background: training goes on while a thread writes a copy of the state.

The thread's messages travel over a group of their own; in training's groups they would mix with those of training. At most
one save is under way. What is to be removed meanwhile (the checkpoint that ``save_top_k`` no longer wants) is removed once the
save is complete, and kept if it fails.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_moefold.checkpoint.chunks import TensorPiece
from lightning_moefold.checkpoint.sharded import Packed, save_sharded
from lightning_moefold.errors import UnsupportedFeature
from lightning_moefold.mesh import Axis


class BackgroundSaves:
    """Saves of one run, over a group of all ranks that nobody else uses (:attr:`~.mesh.FoldedMesh.saves`)."""

    def __init__(self, world: Axis) -> None:
        self._world = world
        self._copies: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self._removals: list[Callable[[], None]] = []
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, packed: Packed, tensors: Mapping[str, Tensor | TensorPiece]) -> None:
        """Copies the tensors, which may change once this returns, and begins to write them. Collective.

        The save before must be finished.
        """
        copies = self._copy(tensors)
        self._thread = threading.Thread(target=self._save, args=(packed, copies), name="moefold save")
        self._thread.start()

    def _copy(self, tensors: Mapping[str, Tensor | TensorPiece]) -> dict[str, TensorPiece]:
        """Copies what this rank writes to memory of the host, which is kept for the next save."""
        pieces = {name: piece for name, tensor in tensors.items() if (piece := TensorPiece.of(tensor)).writes}
        kept, self._copies = self._copies, {}
        copied = {}
        for name, piece in pieces.items():
            source = piece.piece.detach()
            target = kept.get(name)
            if target is None or target.shape != source.shape or target.dtype != source.dtype:
                target = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            target.copy_(source, non_blocking=True)
            self._copies[name] = target
            copied[name] = TensorPiece(target, piece.boxes, piece.shape, True, piece.stacked)
        if any(piece.piece.is_cuda for piece in pieces.values()):
            torch.cuda.synchronize()
        return copied

    def _save(self, packed: Packed, tensors: Mapping[str, TensorPiece]) -> None:
        try:
            save_sharded(packed, tensors, self._world)
        except BaseException as error:
            self._error = error
        while True:
            with self._lock:
                if not self._removals or self._error is not None:
                    self._removals.clear()
                    self._thread = None  # from here on, removals are not ours
                    return
                action = self._removals.pop(0)
            try:
                action()
            except Exception as error:
                self._error = error

    def remove(self, action: Callable[[], None]) -> None:
        """Removes something, after the save that is under way; not at all if that fails."""
        with self._lock:
            if self._thread is not None:
                self._removals.append(action)
                return
        if self._error is None:
            action()

    def finish(self) -> None:
        """Waits for the save that is under way.

        Raises:
            CheckpointError: If it has failed on this rank; PeerError if on another.
        """
        thread = self._thread
        if thread is not None:
            thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


def check_background(trainer: pl.Trainer, sharded: bool) -> None:
    """Refuses what cannot be done with saves in the background.

    Raises:
        UnsupportedFeature: If a link would point to a checkpoint that is not complete, or Lightning writes the checkpoints.
    """
    if not sharded:
        raise UnsupportedFeature(
            "async_save is for models with MoE blocks, and this module has none; leave it out, or use AsyncCheckpointIO."
        )
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
            raise UnsupportedFeature(
                'save_last="link" would link to a checkpoint that async_save has not yet written; use save_last=True.'
            )
