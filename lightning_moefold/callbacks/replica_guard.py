# SPDX-License-Identifier: Apache-2.0
"""ReplicaGuard: ranks that hold copies of a parameter compare checksums, so that silent divergence is noticed.

Legend: W ranks, P pieces of a rank that other ranks hold, too.
"""

from __future__ import annotations

import hashlib
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.agreement import PRIME, fingerprint
from lightning_moefold.callbacks.common import LogSchedule, fold_strategy
from lightning_moefold.diagnostics.first_bad import Place, family_of, layer_of
from lightning_moefold.errors import InputError, ReplicaError
from lightning_moefold.parallel import local_part
from lightning_moefold.parallel.parameters import ParameterRegistry
from lightning_moefold.strategy import MoEFoldStrategy

#: Elements that are hashed at once; a hash needs some 30 bytes for each.
_CHUNK = 1 << 22


class ReplicaGuard(pl.Callback):
    """Compares, every few steps, whatever several ranks hold in copies, bit by bit through checksums.

    The layout says what is replicated: norms and routers over tp, adapters over etp, everything over dp and edp with
    ``data_parallel_sharding="none"``, tied embeddings over two pipeline stages, the biases of routers, and parameters of
    your own over all ranks. Ranks gather the checksums in one collective. If copies differ, every rank raises
    :class:`~lightning_moefold.errors.ReplicaError`, which names the first such parameter on the way of the data, and the
    ranks that differ from most others.

    Args:
        every_n_steps: Number of optimizer steps between comparisons.

    Raises:
        InputError: If ``every_n_steps`` is not positive, and in a fit without ``MoEFoldStrategy``.
    """

    def __init__(self, every_n_steps: int = 1000) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise InputError(f"every_n_steps={every_n_steps} must be at least 1.")
        self.every_n_steps = every_n_steps
        self._schedule = LogSchedule(every_n_steps)
        self._replicas: Replicas | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy, MoEFoldStrategy):
            raise InputError(
                f"ReplicaGuard asks MoEFoldStrategy what is replicated, but the Trainer has {type(trainer.strategy).__name__}; "
                "use MoEFoldStrategy, or leave the guard out."
            )

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        strategy = fold_strategy(trainer)
        self._schedule.start(trainer)
        self._replicas = Replicas(strategy.registry, strategy.root_device)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if self._schedule.step_ended(trainer) and self._schedule.is_due(trainer) and self._replicas is not None:
            self._replicas.check(trainer.global_step)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._replicas = None


class Replicas:
    """Which pieces of this rank other ranks hold, too. Collective.

    Args:
        registry: Registry of the module's parameters.
        device: This rank's device.
    """

    def __init__(self, registry: ParameterRegistry, device: torch.device) -> None:
        self._world, self._device = registry.mesh.world, device
        self._columns = 0  # P, the same on all ranks, once it is known
        pieces = {_key(registry, name): (name, tensor) for name, tensor in _tensors(registry)}
        everyone = self._gather_all(sorted(pieces))
        keys, counts = np.unique(everyone[everyone != 0], return_counts=True)
        copied = set(keys[counts > 1].tolist())
        self._mine = [pieces[key] for key in sorted(pieces) if key in copied]
        self._keys_WP = self._gather_all([key for key in sorted(pieces) if key in copied])
        self._columns = self._keys_WP.shape[1]

    def check(self, step: int) -> None:
        """Compares the copies. One collective, unless they differ.

        Raises:
            ReplicaError: If copies of a piece differ; raised on all ranks.
        """
        hashes_WP = self._gather([_checksum(local_part(tensor)) for _, tensor in self._mine])
        keys, place = np.unique(self._keys_WP, return_inverse=True)
        least, most = np.full(len(keys), PRIME), np.full(len(keys), -1)
        np.minimum.at(least, place.ravel(), hashes_WP.ravel())
        np.maximum.at(most, place.ravel(), hashes_WP.ravel())
        different = set(keys[(least != most) & (keys != 0)].tolist())
        if different:
            self._refuse(step, different, hashes_WP)

    def _refuse(self, step: int, different: set[int], hashes_WP: np.ndarray) -> None:
        rank = self._world.index
        mine = {int(self._keys_WP[rank, i]): name for i, (name, _) in enumerate(self._mine)}
        told = comm.all_gather_objects({key: mine[key] for key in different & mine.keys()}, self._world)
        names = {key: name for part in told for key, name in part.items()}
        key = min(names, key=lambda key: (Place("weight", names[key]).key(staged=True), names[key]))
        hashes = {r: int(hashes_WP[r, i]) for r, i in zip(*np.nonzero(self._keys_WP == key), strict=True)}
        values = list(hashes.values())
        usual = max(values, key=values.count)
        odd = [int(r) for r, value in hashes.items() if value != usual]
        layer, holders = layer_of(names[key]), ", ".join(map(str, hashes))
        where = family_of(names[key]) if layer is None else f"layer {layer}, {family_of(names[key])}"
        raise ReplicaError(
            f"after step {step}, {names[key]} ({where}) is replicated on ranks {holders}, but its bits on rank"
            f"{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} differ from the others ({len(different)} such pieces in all); "
            "resume from a checkpoint before it, and suspect the hardware, or code of your own that changes weights on some "
            "ranks only."
        )

    def _gather_all(self, numbers: list[int]) -> np.ndarray:
        """Gathers lists of different lengths, ``[W, P]``, with zeros behind the shorter ones."""
        lengths = self._gather([len(numbers)])
        return self._gather(numbers + [0] * (int(lengths.max()) - len(numbers)))

    def _gather(self, numbers: list[int] | list[Tensor]) -> np.ndarray:
        mine_1P = torch.zeros(1, self._columns or len(numbers), dtype=torch.int64, device=self._device)
        if numbers:
            given = torch.stack(numbers) if isinstance(numbers[0], Tensor) else torch.tensor(numbers)
            mine_1P[0, : len(numbers)] = given.to(self._device)
        return comm.all_gather_raw(mine_1P, self._world).cpu().numpy()


def _tensors(registry: ParameterRegistry) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = list(registry.named_parameters())
    for prefix, root in registry.roots.items():
        found += [(f"{prefix}.{name}".lstrip("."), buffer) for name, buffer in root.stored_buffers()]
    return found


def _key(registry: ParameterRegistry, name: str) -> int:
    """Returns a number that two ranks have in common exactly if they hold the same piece of the same tensor."""
    boxes = registry.boxes(name) if name in registry.layouts else ()
    digest = hashlib.blake2b(f"{name} {boxes}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


def _checksum(piece: Tensor) -> Tensor:
    """Returns a number below PRIME that changes with any bit of the piece, a scalar int64 on its device."""
    total = torch.zeros((), dtype=torch.int64, device=piece.device)
    for number, chunk in enumerate(piece.detach().reshape(-1).split(_CHUNK), start=1):
        total = (total + fingerprint(chunk) * (number % 8191 + 1)) % PRIME
    return total
