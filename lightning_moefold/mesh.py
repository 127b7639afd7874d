# SPDX-License-Identifier: Apache-2.0
"""FoldedMesh: a Fold made into process groups and device meshes, as seen from this rank.

Two axes over the same ranks share one process group, and a group of one rank is not created. The device meshes on which
parameters are stored are built from those very groups with DeviceMesh's public ``from_group``:

    dense    ("dp_cp", "tp")       attention, norms, router, shared expert, embedding, head
    experts  ("edp", "ep", "etp")  routed experts

Axes of size one are left out of a mesh. The two meshes never meet in one operation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lightning_moefold.fold import Fold
from lightning_moefold.layout import Family

_GROUP_AXES = ("tp", "cp", "dp", "ep", "etp", "edp", "dp_cp", "etp_ep", "pp")
_MESH_AXES = {Family.DENSE: ("dp_cp", "tp"), Family.EXPERT: ("edp", "ep", "etp")}
_DATA_AXIS = {Family.DENSE: "dp_cp", Family.EXPERT: "edp"}
_TENSOR_GROUP = {Family.DENSE: "tp", Family.EXPERT: "etp_ep"}


@dataclass(frozen=True)
class Axis:
    """One axis of the fold on this rank.

    Args:
        name: Name of the axis.
        ranks: Global ranks of this rank's group, in the order of their coordinates.
        index: This rank's position in ``ranks``.
        group: The process group; None where the axis has one rank.
    """

    name: str
    ranks: tuple[int, ...] = (0,)
    index: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks along the axis."""
        return len(self.ranks)


#: The axis of a module that nobody has parallelised.
SINGLE = Axis("single")


#: Groups made here, for the meshes of later Trainers: a group costs connections and, on GPUs, memory, and torch names
#: it by its ranks, so that one made anew after its predecessor was destroyed would find the addresses of the dead one.
_made: dict[tuple[tuple[int, ...], timedelta | None], dist.ProcessGroup] = {}


def _exists(group: dist.ProcessGroup) -> bool:
    return group in dist.distributed_c10d._world.pg_map


def _shared_group(name: str, ranks: tuple[int, ...], timeout: timedelta | None) -> dist.ProcessGroup:
    """The group of ``ranks``, made on first use. Its members call this in the same order.

    NCCL's watchdog ends a process without asking Python; what it prints then has ``name``, the operation and the rank.
    """
    if len(ranks) == dist.get_world_size() and dist.group.WORLD is not None:
        return dist.group.WORLD
    for key in [key for key, group in _made.items() if not _exists(group)]:  # went with the default group
        del _made[key]
    if (ranks, timeout) not in _made:
        # Only its members take part in making a group: a thousand ranks need not wait for each other's.
        _made[ranks, timeout] = dist.new_group(
            list(ranks), timeout=timeout, use_local_synchronization=True, group_desc=f"moefold {name}"
        )
    return _made[ranks, timeout]


def forget_groups() -> None:
    """Drops the groups kept for later meshes; for the end of a process."""
    _made.clear()


class FoldedMesh:
    """Process groups and device meshes of a fold on this rank. Collective: every rank of the world builds it.

    Args:
        fold: The fold; its world size must be that of the default process group (1 where there is none).
        device_type: ``"cpu"`` or ``"cuda"``.
        timeout: For the collectives of the groups made here.
        wrap_single: Make a data axis of one rank part of the meshes as well. ``fully_shard`` is what casts parameters
            in mixed precision, so there it wraps even a single rank (and such a group is then created).
        replicated: Spread nothing over data ranks: the data axes of the meshes hold this rank alone.

    Raises:
        RuntimeError: If the fold's world size is not that of the default process group.
    """

    def __init__(
        self,
        fold: Fold,
        device_type: str,
        *,
        timeout: timedelta | None = None,
        wrap_single: bool = False,
        replicated: bool = False,
    ) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != fold.world_size:
            raise RuntimeError(
                f"fold {fold} is for {fold.world_size} ranks, but {world} are running; make a fold of {world}."
            )
        self.fold = fold
        self.device_type = device_type
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.place = fold.coordinates(self.rank)
        self._timeout = timeout
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._axes = {name: self._make_axis(name) for name in _GROUP_AXES}
        stage = fold.world_size // fold.pp
        first = self.rank // stage * stage
        self._axes["stage"] = self._axis_of("stage", list(range(first, first + stage)))
        self._axes["world"] = self._axis_of("world", list(range(world)))
        self._meshes = {family: self._make_mesh(family, wrap_single, replicated) for family in Family}

    # ---- axes --------------------------------------------------------------------------------------------------

    def axes(self) -> list[Axis]:
        """All axes on this rank."""
        return list(self._axes.values())

    def axis(self, name: str) -> Axis:
        """The axis ``name`` on this rank: ``tp cp dp pp ep etp edp dp_cp etp_ep``, ``stage`` or ``world``."""
        return self._axes[name]

    @property
    def tp(self) -> Axis:
        """Tensor parallel axis."""
        return self._axes["tp"]

    @property
    def ep(self) -> Axis:
        """Expert parallel axis."""
        return self._axes["ep"]

    @property
    def etp(self) -> Axis:
        """Expert tensor parallel axis."""
        return self._axes["etp"]

    @property
    def dp_cp(self) -> Axis:
        """Ranks that hold different tokens of the global batch (and the same tensor parallel shard)."""
        return self._axes["dp_cp"]

    @property
    def stage(self) -> Axis:
        """All ranks of this pipeline stage."""
        return self._axes["stage"]

    @property
    def world(self) -> Axis:
        """All ranks."""
        return self._axes["world"]

    @property
    def ends(self) -> Axis:
        """The first and the last rank of this pipeline, where this is one of them; made on first use, by both."""
        if "ends" not in self._axes:
            ranks = self._axes["pp"].ranks
            self._axes["ends"] = self._axis_of("ends", [ranks[0], ranks[-1]])
        return self._axes["ends"]

    def cut_by_node(self, name: str, node_size: int) -> tuple[Axis, Axis] | None:
        """An axis as two: its ranks in this rank's node, and those of the same place in each node.

        Made on first use, by all ranks of the axis.

        Args:
            name: Of the axis.
            node_size: Ranks of a node; nodes are runs of consecutive ranks.

        Returns:
            None where the axis does not span nodes, has one rank in each, or not the same number in each.
        """
        ranks = self._axes[name].ranks
        nodes = [list(group) for _, group in itertools.groupby(ranks, lambda rank: rank // node_size)]
        if len({len(node) for node in nodes}) != 1 or 1 in (len(nodes), len(nodes[0])):
            return None
        mine = next(node for node in nodes if self.rank in node)
        place = mine.index(self.rank)
        within, across = f"{name}_within_node", f"{name}_across_nodes"
        if within not in self._axes:
            self._axes[within] = self._axis_of(within, mine)
            self._axes[across] = self._axis_of(across, [node[place] for node in nodes])
        return self._axes[within], self._axes[across]

    def _make_axis(self, name: str) -> Axis:
        return self._axis_of(name, next(group for group in self.fold.groups(name) if self.rank in group))

    def _axis_of(self, name: str, ranks: list[int]) -> Axis:
        group = self._group(name, tuple(ranks)) if len(ranks) > 1 else None
        return Axis(name, tuple(ranks), ranks.index(self.rank), group)

    def _group(self, name: str, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        if ranks not in self._groups:
            self._groups[ranks] = _shared_group(name, ranks, self._timeout)
        return self._groups[ranks]

    # ---- storage meshes ----------------------------------------------------------------------------------------

    def _make_mesh(self, family: Family, wrap_single: bool, replicated: bool) -> DeviceMesh | None:
        data, *tensor = (self._axes[name] for name in _MESH_AXES[family])
        if replicated:
            data = Axis(data.name, (self.rank,))
        wraps = data.size > 1 or (wrap_single and dist.is_initialized())
        axes = [data] * wraps + [axis for axis in tensor if axis.size > 1]
        if not axes:
            return None
        groups = [axis.group or self._group(axis.name, (self.rank,)) for axis in axes]
        if len(axes) == 1:
            return DeviceMesh.from_group(groups[0], self.device_type, mesh_dim_names=(axes[0].name,))
        # The axes left out have one rank each, so the others span the ranks of the stage, or of a replica of the family.
        ranks = self._axes[_TENSOR_GROUP[family]].ranks if replicated else self.stage.ranks
        return DeviceMesh.from_group(
            groups,
            self.device_type,
            mesh=torch.tensor(ranks).view([axis.size for axis in axes]),
            mesh_dim_names=tuple(a.name for a in axes),
        )

    def storage_mesh(self, family: Family, *axes: str) -> DeviceMesh | None:
        """The device mesh of ``family`` restricted to ``axes``; None where none of them has more than one rank."""
        mesh = self._meshes[family]
        if mesh is None or mesh.mesh_dim_names is None:
            return None
        names = tuple(name for name in mesh.mesh_dim_names if name in axes)
        if not names:
            return None
        return mesh if names == mesh.mesh_dim_names else mesh[names]

    def data_mesh(self, family: Family) -> DeviceMesh | None:
        """The one-dimensional mesh over which ``fully_shard`` cuts the family; None where it need not wrap."""
        return self.storage_mesh(family, _DATA_AXIS[family])

    @property
    def is_alive(self) -> bool:
        """Whether its process groups still exist (whoever destroys the default group destroys them all)."""
        return all(_exists(group) for group in self._groups.values())
