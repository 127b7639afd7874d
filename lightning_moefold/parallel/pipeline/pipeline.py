# SPDX-License-Identifier: Apache-2.0
"""A network in a pipeline: one call runs the whole schedule, forward and backward, over the micro-batches.

    read      the arguments become micro-batches; errors in them are kept                  (:class:`~.stage.Staged`)
    agree     one sum over all ranks: errors in the data, equal batches within a replica, numbers that all ranks need
    schedule  torch's schedule calls every stage, forward and backward, for each micro-batch
    found     one sum over all ranks: losses and weights, and whether the user's code has failed
    finish    the result, through which backward returns the gradients that the schedule made     (:mod:`.engine`)

Errors are agreed on, before the schedule and after it: a rank that raised alone would leave the others waiting.

If a loss needs numbers of all micro-batches, they run forward once before the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_moefold import comm
from lightning_moefold.agreement import check_readable, check_same_batch, same_batch_slots
from lightning_moefold.errors import PeerError
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.parallel.pipeline.engine import Kept, ScheduleRunner
from lightning_moefold.parallel.pipeline.plan import PipelinePlan
from lightning_moefold.parallel.pipeline.stage import Call, Stage, Staged


class Pipeline:
    """Runs a network that is spread over pipeline ranks.

    Args:
        network: Cut down to what this rank holds.
        mesh: The folded mesh.
        plan: Schedule and cut.
        layers: Names of the layers of each stage of this rank, by its number, in the order of the network.
    """

    def __init__(
        self, network: Staged[Any], mesh: FoldedMesh, plan: PipelinePlan, layers: Mapping[int, Sequence[str]]
    ) -> None:
        count = mesh.fold.pp * plan.chunks
        self.network, self.mesh = network, mesh
        self.stages = [Stage(network, index, count, names) for index, names in layers.items()]
        self.runner = ScheduleRunner(network.module, mesh, plan, self.stages)

    def __call__(self, *arguments: Any) -> Any:
        """A call of the network. Collective over all ranks.

        Raises:
            BatchError: On every rank, if the data of one is at fault, or other data than that of the rest of its replica.
            Exception: What code of the user's raised; on other ranks a PeerError that says so.
        """
        call = self.network.read(*arguments)
        self._agree(call)
        if call.looks_ahead:
            with self.runner.counters_kept():
                self.schedule(call, training=False)
            self.network.looked(call, self._found(call))
        kept = self.schedule(call, training=call.training)
        return self.network.finish(call, self._found(call), kept, self.runner)

    def schedule(self, call: Call, *, training: bool) -> Kept:
        """Runs the stages, forward and backward or forward alone, and returns the gradients that they made."""
        run = self.runner.train if training else self.runner.evaluate
        # Backward runs inside, where the user's autocast must not reach it; stages turn it on for the user's code.
        with torch.autocast(call.device.type, enabled=False):
            kept = run(call, len(call.batches), call.wires, call.device)
        if not training:
            self.network.evaluated(call)
        return kept

    def _agree(self, call: Call) -> None:
        fault = torch.full((1,), float(call.fault is not None), dtype=torch.float64, device=call.number.device)
        same = same_batch_slots(call.number, self.mesh).flatten()
        mine = torch.cat([fault, same, self.network.numbers(call)])
        faults, same, totals = comm.all_reduce_raw(mine, self.mesh.world).cpu().tensor_split([1, 1 + len(same)])
        check_readable(bool(faults), call.fault, self.mesh.world)
        check_same_batch(same, self.mesh.world.size // self.mesh.fold.dp)
        self.network.agree(call, totals)

    def _found(self, call: Call) -> torch.Tensor:
        found = self.network.found(call)
        failed = torch.full((1,), float(call.error is not None), dtype=torch.float64, device=found.device)
        failures, totals = comm.all_reduce_raw(torch.cat([failed, found]), self.mesh.world).tensor_split([1])
        if call.error is not None:
            raise call.error
        if call.may_fail and bool(failures):  # asked only then, since the device is waited for
            raise PeerError(f"{self.network.users_code} failed on another rank, whose own error says why.")
        return totals
