# SPDX-License-Identifier: Apache-2.0
"""The Lightning cluster environment of a rank that a :class:`~lightning_moefold.testing.pool.RankPool` runs."""

from __future__ import annotations

from lightning.fabric.plugins.environments import TorchElasticEnvironment
from typing_extensions import override

from lightning_moefold.errors import InputError


class PoolEnvironment(TorchElasticEnvironment):
    """Tells Lightning that the ranks already exist, and which rank this is: the pool sets the variables of torchrun.

    Inside a function run by a pool, where the process group is already initialised::

        trainer = L.Trainer(
            accelerator="cpu", devices=dist.get_world_size(), strategy="ddp", plugins=[PoolEnvironment()]
        )
    """

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
