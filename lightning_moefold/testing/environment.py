# SPDX-License-Identifier: Apache-2.0
"""The Lightning cluster environment of a rank that a :class:`~lightning_moefold.testing.pool.RankPool` runs."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import ClusterEnvironment
from typing_extensions import override

from lightning_moefold.errors import InputError


class PoolEnvironment(ClusterEnvironment):
    """Tells Lightning that the ranks already exist, and which rank this is.

    Inside a function run by a pool, where the process group is already initialised::

        trainer = L.Trainer(
            accelerator="cpu", devices=dist.get_world_size(), strategy="ddp", plugins=[PoolEnvironment()]
        )
    """

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    @override
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    @override
    def detect() -> bool:
        return False  # chosen by hand only

    @override
    def world_size(self) -> int:
        return int(os.environ["WORLD_SIZE"])

    @override
    def set_world_size(self, size: int) -> None:
        """Does nothing: the pool has set it."""

    @override
    def global_rank(self) -> int:
        return int(os.environ["RANK"])

    @override
    def set_global_rank(self, rank: int) -> None:
        """Does nothing: the pool has set it."""

    @override
    def local_rank(self) -> int:
        return int(os.environ["LOCAL_RANK"])

    @override
    def node_rank(self) -> int:
        return 0

    @override
    def validate_settings(self, num_devices: int, num_nodes: int) -> None:
        """Refuses a ``Trainer`` whose device count is not the number of ranks of the case.

        Raises:
            ValueError: If ``num_devices * num_nodes`` is not the world size.
        """
        if num_devices * num_nodes != self.world_size():
            raise InputError(
                f"devices={num_devices} times num_nodes={num_nodes} is not the number of ranks {self.world_size()}"
            )
