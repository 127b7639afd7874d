# SPDX-License-Identifier: Apache-2.0
"""The part of the strategy that knows the ranks: their fold, their groups, how they start, and what they say to each other."""

from __future__ import annotations

from abc import abstractmethod
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _distributed_is_initialized,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utils_rank_zero_only
from torch import Tensor
from typing_extensions import override

from lightning_moefold import comm
from lightning_moefold.diagnostics.liveness import RollCall
from lightning_moefold.fold import Fold
from lightning_moefold.lifecycle import fold_choice
from lightning_moefold.lifecycle.precision import MoEFoldPrecision
from lightning_moefold.lifecycle.processes import connect_processes
from lightning_moefold.mesh import Axis, FoldedMesh
from lightning_moefold.parallel import Settings
from lightning_moefold.parallel.apply import parts_of
from lightning_moefold.planner.search.auto import AutoFold


class FoldedRanks(ParallelStrategy):
    """A strategy whose ranks form a fold."""

    #: What modules are told; without what only a run knows: the precision, and which ranks share a machine.
    settings: Settings
    #: Sizes of tp, cp, pp, ep and etp, if there is no text.
    _sizes: tuple[int, int, int, int, int]
    #: The fold as it was given: a text, ``"auto"``, or several in order of preference.
    _fold_text: str | tuple[str, ...] | None
    _microbatches_given: bool
    _auto: AutoFold
    _timeout: timedelta | None
    _process_group_backend: str | None
    _mesh: FoldedMesh | None = None
    _roll_call: RollCall | None = None
    #: The choice of ``fold="auto"``, as it is stored in checkpoints.
    _choice: dict[str, Any] | None = None
    num_nodes: int = 1

    @property
    @abstractmethod
    def _precision(self) -> MoEFoldPrecision:
        """The precision plugin."""

    @property
    def fold(self) -> Fold:
        """The fold. Known once the world size is: before the processes start, from the Trainer's devices and nodes.

        Raises:
            RuntimeError: Outside a Trainer, and with ``fold="auto"`` before the planner has chosen.
        """
        if self._mesh is None and self._fold_text != "auto" and self.parallel_devices:
            return self._make_fold()
        return self.mesh.fold

    @property
    def mesh(self) -> FoldedMesh:
        """Process groups and device meshes.

        Raises:
            RuntimeError: Before the processes have started.
        """
        if self._mesh is None and self._fold_text == "auto" and _distributed_is_initialized():
            raise RuntimeError(
                'fold="auto" is chosen once the model is there, after configure_model; ask later, make the model in __init__, or '
                "say what it is with auto=AutoFold(model=...)."
            )
        if self._mesh is None:
            raise RuntimeError(
                "the fold is known once the processes have started; ask for it inside a hook, not before fit."
            )
        return self._mesh

    @property
    def dp_rank(self) -> int:
        """Which part of the data this rank reads; the same on all ranks of a tp, cp or pp group."""
        return self.fold.coordinates(self.global_rank)["dp"]

    @property
    def dp_size(self) -> int:
        """Number of parts the data is split into."""
        return self.fold.dp

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices or ())

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.dp_size, "rank": self.dp_rank}

    # ---- start ---------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._fold_text != "auto":
            self._make_fold()  # an illegal fold is refused before any process is started
        # One process is here already, also in a notebook, where Lightning starts no script.
        if self.world_size > 1 and not self.cluster_environment.creates_processes_externally:
            self._launcher = _SubprocessScriptLauncher(self.cluster_environment, self.num_processes, self.num_nodes)

    def set_world_ranks(self) -> None:
        """Tells the cluster environment and Lightning's rank-zero helpers who we are."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = utils_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        reset_seed()
        self.set_world_ranks()
        if self._fold_text != "auto":
            self._make_fold()
        assert self.cluster_environment is not None
        connect_processes(self.cluster_environment, self.root_device, self._process_group_backend, self._timeout)
        self._join_roll_call()
        self._choose_fold(last_call=False)
        if self._fold_text != "auto":
            self._make_mesh()

    def _join_roll_call(self) -> None:
        """Lets peers see whether this process lives, should a collective fail."""
        if self.world_size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        if self._roll_call is None or self._roll_call.store is not store:  # the process group may be another by now
            self._roll_call = RollCall(store, self.global_rank)
        self._roll_call.announce()

    # ---- the choice of a fold ------------------------------------------------------------------------------------

    def _make_fold(self) -> Fold:
        text, world = self._fold_text, self.world_size
        if text is None:
            fold = Fold(world, *self._sizes)
        else:
            fold = Fold.parse(text, world) if isinstance(text, str) else Fold.first(text, world)
        if fold.pp > 1 and not self._microbatches_given:
            raise self.settings.plan.needs_microbatches(fold.pp)
        self.settings.check_pipeline(fold.pp)
        return fold

    def _choose_fold(self, last_call: bool) -> None:
        """Lets the planner choose, if it is to and the model is known. Collective.

        Args:
            last_call: Whether the model has to be known by now.
        """
        module = self.lightning_module
        if self._fold_text != "auto" or module is None:
            return
        fixed = fold_choice.Fixed(
            self.world_size, self.num_processes, str(self._precision.precision), self.settings,
            self.settings.num_microbatches if self._microbatches_given else None,
        )  # fmt: skip
        if (earlier := fold_choice.earlier_root(module)) is not None:
            self._fold_text, self._microbatches_given = str(earlier.fold), True
            self.settings = fixed.going_on(earlier.settings)
            return
        choice = fold_choice.agreed(
            lambda: fold_choice.choose_for(self._auto, fixed, module, self.root_device, last_call),
            self.broadcast,
            self.global_rank,
        )
        if choice is None:
            return
        self._fold_text, self.settings = str(choice.estimate.plan.fold), fixed.taking(choice)
        self._microbatches_given = self._microbatches_given or choice.estimate.plan.fold.pp > 1
        self._choice = {**choice.record, "num_microbatches": self.settings.num_microbatches}
        fold_choice.announce(choice.reason)

    def _make_mesh(self) -> None:
        fold = self._make_fold()
        if isinstance(self._fold_text, tuple) and self.is_global_zero:
            fold_choice.announce(
                f"fold {fold} is the first of {list(self._fold_text)} that {self.world_size} ranks can form."
            )
        if self._mesh is None or self._mesh.fold != fold:
            self._mesh = self._mesh_of_earlier_trainer(fold)
            if self._mesh is not None:
                self._mesh.set_timeout(self._timeout)
        if self._mesh is None:
            # FSDP2 casts the parameters in mixed precision, so there even a data axis of one rank is wrapped.
            mixed = self._precision.mixed_dtype is not None
            self._mesh = FoldedMesh(
                fold,
                self.root_device.type,
                timeout=self._timeout,
                wrap_single=mixed,
                replicated=self.settings.sharding.mode == "none",
            )

    def _mesh_of_earlier_trainer(self, fold: Fold) -> FoldedMesh | None:
        """The mesh on which another Trainer has parallelised the module's model, if its fold is ours."""
        meshes = [part.mesh for part in ([] if self.lightning_module is None else parts_of(self.lightning_module))]
        return next((mesh for mesh in meshes if mesh is not None and mesh.fold == fold and mesh.is_alive), None)

    # ---- communication -------------------------------------------------------------------------------------------

    @property
    def _has_started(self) -> bool:
        """Whether the processes run; a process group of another size is an earlier Trainer's."""
        return _distributed_is_initialized() and dist.get_world_size() == self.world_size

    @override
    def barrier(self, name: str | None = None) -> None:
        if _distributed_is_initialized():
            on_cuda = self.root_device.type == "cuda"
            dist.barrier(device_ids=[self.root_device.index] if on_cuda else None)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not _distributed_is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any = "mean") -> Any:
        """Reduces over the ranks that read different data (dp), unless a group is given.

        Ranks of a tp, cp or pp group hold the same values; counting them again would be wrong for sums.
        """
        if not isinstance(tensor, Tensor):
            return tensor
        if group is None:
            if self.fold.dp == 1 or not self._has_started:
                return tensor
            group = self.mesh.axis("dp").group
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Over the world, whatever reduce() does: every rank must take the same decision.
        # With fold="auto", data is set up before there is a mesh.
        if not self._has_started:
            return decision
        world = Axis("world", tuple(range(self.world_size)), self.global_rank, dist.group.WORLD)
        value = comm.all_reduce_raw(torch.tensor(int(decision), device=self.root_device), world)
        return bool(value == world.size) if all else bool(value)
