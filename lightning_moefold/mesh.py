# SPDX-License-Identifier: Apache-2.0
"""FoldedMesh: the process groups and device meshes of a Fold, as seen from this rank.

Two axes over the same ranks share one process group, and an axis of size one needs none. Groups are created in steps,
and each step partitions the world into groups. Every rank takes part in every step: if the default group is bound to a
device, NCCL creates a group by splitting the world's communicator, which waits for all ranks of the world, members or
not.
The device meshes on which parameters are stored are built from those very groups with DeviceMesh's public ``from_group``:

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
        group: The process group; None if the axis has one rank.
    """

    name: str
    ranks: tuple[int, ...] = (0,)
    index: int = 0
    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of ranks along the axis."""
        return len(self.ranks)


#: The axis of a module that has not been parallelised.
SINGLE = Axis("single")


#: Groups of ranks that together contain each rank of the world once.
Partition = tuple[tuple[int, ...], ...]

#: Axes over which Python objects and CPU tensors travel: random states (tp, cp, pp), names and settings (pp), metrics
#: and the user's own reductions (dp). Groups of other axes use only NCCL, since a gloo group beside it would connect
#: all pairs of its ranks.
_OBJECT_AXES = frozenset({"tp", "cp", "pp", "dp"})


@dataclass(frozen=True)
class _Made:
    """A group created in an earlier step, and whether it carries objects."""

    group: dist.ProcessGroup
    carries_objects: bool


#: Groups created here, kept for the meshes of later Trainers. A group costs connections and, on GPUs, memory. Also,
#: torch names a group by its ranks, so one created again after its predecessor was destroyed would find the addresses
#: of the old one. The key is the partition, so that all ranks agree on whether a step is repeated.
_made: dict[Partition, _Made] = {}


def _exists(group: dist.ProcessGroup) -> bool:
    return group in dist.distributed_c10d._world.pg_map


def _shared_group(name: str, partition: Partition, timeout: timedelta | None, device_type: str) -> dist.ProcessGroup:
    """Returns this rank's group of ``partition``; all ranks of the world create it on first use, in the same order.

    NCCL's watchdog ends a process without calling Python. Its message then holds ``name``, the operation and the rank.
    """
    if len(partition) == 1 and dist.group.WORLD is not None:
        return dist.group.WORLD
    for key in [key for key, made in _made.items() if not _exists(made.group)]:  # destroyed with the default group
        del _made[key]
    objects = name in _OBJECT_AXES
    made = _made.get(partition)
    if made is not None:
        set_timeout(made.group, timeout)
    if made is None or (objects and not made.carries_objects):
        mine = next(ranks for ranks in partition if dist.get_rank() in ranks)
        # Each rank waits only for its own group's members, and the name does not depend on groups created before.
        group = dist.new_group(
            list(mine), timeout=timeout, backend=None if objects else _backend_of(device_type),
            use_local_synchronization=True, group_desc=f"moefold {name}",
        )  # fmt: skip
        made = _made[partition] = _Made(group, objects)
    return made.group


def _second_group(world: int, timeout: timedelta | None) -> dist.ProcessGroup:
    """Returns a gloo group of all ranks besides those of the meshes; all ranks create it on first use."""
    key: Partition = (tuple(range(world)), ())
    if key not in _made or not _exists(_made[key].group):
        group = dist.new_group(timeout=timeout, backend="gloo", group_desc="moefold saves")
        _made[key] = _Made(group, True)
    set_timeout(_made[key].group, timeout)
    return _made[key].group


def _backend_of(device_type: str) -> str | None:
    """Returns the default group's backend for tensors on the device; None if the default group has only one."""
    backends = dict(part.split(":") for part in dist.get_backend_config().split(",") if ":" in part)
    return backends.get(device_type) if len(set(backends.values())) > 1 else None


def set_timeout(group: dist.ProcessGroup | None, timeout: timedelta | None) -> None:
    """Gives the collectives of a group another timeout; None leaves it as it is."""
    if timeout is not None:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def forget_groups() -> None:
    """Drops the groups kept for later meshes. Called at the end of a process."""
    _made.clear()


class FoldedMesh:
    """Process groups and device meshes of a fold on this rank. Collective: every rank of the world constructs it.

    Args:
        fold: The fold; its world size must equal that of the default process group (1 if there is none).
        device_type: ``"cpu"`` or ``"cuda"``.
        timeout: Timeout of collectives in the groups created here.
        wrap_single: Whether the meshes include a data axis of one rank. In mixed precision ``fully_shard`` casts the
            parameters, so it must wrap even a single rank (and that rank's group is then created).
        replicated: Whether parameters are replicated over data ranks; the data axes of the meshes then hold this rank
            only.

    Attributes:
        tp, ep, etp: Tensor parallel, expert parallel and expert tensor parallel axis.
        dp_cp: Ranks that hold different tokens of the global batch (and the same tensor parallel shard).
        stage: All ranks of this pipeline stage.
        world: All ranks.

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
        self._groups: list[dist.ProcessGroup] = []
        self._axes = {name: self._make_axis(name, fold.groups(name)) for name in _GROUP_AXES}
        stage = fold.world_size // fold.pp
        stages = [list(range(first, first + stage)) for first in range(0, world, stage)]
        self._axes["stage"] = self._make_axis("stage", stages)
        self._axes["world"] = self._make_axis("world", [list(range(world))])
        self.tp, self.ep, self.etp, self.dp_cp, self.stage, self.world = (
            self._axes[name] for name in ("tp", "ep", "etp", "dp_cp", "stage", "world")
        )
        self._cuts: dict[tuple[str, int], tuple[Axis, Axis] | None] = {}
        self._meshes = {family: self._make_mesh(family, wrap_single, replicated) for family in Family}

    def set_timeout(self, timeout: timedelta | None) -> None:
        """Gives all groups of the mesh another timeout, that of a later Trainer."""
        self._timeout = timeout
        for group in self._groups:
            if group is not dist.group.WORLD:
                set_timeout(group, timeout)

    # ---- axes --------------------------------------------------------------------------------------------------

    def axes(self) -> list[Axis]:
        """All axes on this rank."""
        return list(self._axes.values())

    def axis(self, name: str) -> Axis:
        """The axis ``name`` on this rank: ``tp cp dp pp ep etp edp dp_cp etp_ep``, ``stage`` or ``world``."""
        return self._axes[name]

    @property
    def ends(self) -> Axis:
        """The first and the last rank of this pipeline; each other rank by itself. All ranks create it on first use."""
        if "ends" not in self._axes:
            pipelines = self.fold.groups("pp")
            ends = [[ranks[0], ranks[-1]] if len(ranks) > 1 else ranks for ranks in pipelines]
            self._axes["ends"] = self._make_axis("ends", ends + [[r] for ranks in pipelines for r in ranks[1:-1]])
        return self._axes["ends"]

    @property
    def saves(self) -> Axis:
        """All ranks, with a gloo group that only saves in the background use. All ranks create it on first use."""
        if "saves" not in self._axes:
            world = self.world
            group = _second_group(len(world.ranks), self._timeout) if world.size > 1 else None
            self._groups += [] if group is None else [group]
            self._axes["saves"] = Axis("saves", world.ranks, world.index, group)
        return self._axes["saves"]

    def cut_by_node(self, name: str, node_size: int) -> tuple[Axis, Axis] | None:
        """Splits an axis in two: its ranks in this rank's node, and the ranks with the same local index in each node.

        All ranks create both on first use, including ranks whose part of the axis is not split.

        Args:
            name: Name of the axis.
            node_size: Number of ranks in a node; nodes are runs of consecutive ranks.

        Returns:
            None if the axis lies within one node, has one rank in each node, or different numbers of ranks in the
            nodes.
        """
        if (name, node_size) not in self._cuts:
            within: list[list[int]] = []
            across: list[list[int]] = []
            cut = False
            for ranks in self.fold.groups(name):
                nodes = [list(group) for _, group in itertools.groupby(ranks, lambda rank: rank // node_size)]
                if len({len(node) for node in nodes}) != 1 or 1 in (len(nodes), len(nodes[0])):
                    nodes = [[rank] for rank in ranks]
                    across += nodes
                else:
                    across += [list(place) for place in zip(*nodes, strict=True)]
                    cut = cut or self.rank in ranks
                within += nodes
            axes = self._make_axis(f"{name}_within_node", within), self._make_axis(f"{name}_across_nodes", across)
            self._cuts[name, node_size] = axes if cut else None
        return self._cuts[name, node_size]

    def _make_axis(self, name: str, groups: list[list[int]]) -> Axis:
        """Creates an axis with these groups, which partition the world. Collective over the world."""
        ranks = next(ranks for ranks in groups if self.rank in ranks)
        group = self._group(name, groups) if any(len(ranks) > 1 for ranks in groups) else None
        return Axis(name, tuple(ranks), ranks.index(self.rank), group if len(ranks) > 1 else None)

    def _group(self, name: str, groups: list[list[int]]) -> dist.ProcessGroup:
        partition = tuple(sorted(tuple(ranks) for ranks in groups))
        group = _shared_group(name, partition, self._timeout, self.device_type)
        self._groups.append(group)
        return group

    # ---- storage meshes ----------------------------------------------------------------------------------------

    def _make_mesh(self, family: Family, wrap_single: bool, replicated: bool) -> DeviceMesh | None:
        data, *tensor = (self._axes[name] for name in _MESH_AXES[family])
        if replicated:
            data = Axis(data.name, (self.rank,))
        wraps = data.size > 1 or (wrap_single and dist.is_initialized())
        axes = [data] * wraps + [axis for axis in tensor if axis.size > 1]
        if not axes:
            return None
        alone = [[rank] for rank in range(self.fold.world_size)]
        groups = [axis.group or self._group(axis.name, alone) for axis in axes]
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
        """Returns the device mesh of ``family`` restricted to ``axes``; None if none of them has more than one rank."""
        mesh = self._meshes[family]
        if mesh is None or mesh.mesh_dim_names is None:
            return None
        names = tuple(name for name in mesh.mesh_dim_names if name in axes)
        if not names:
            return None
        return mesh if names == mesh.mesh_dim_names else mesh[names]

    def data_mesh(self, family: Family) -> DeviceMesh | None:
        """Returns the one-dimensional mesh over which ``fully_shard`` cuts the family; None if nothing need be wrapped."""
        return self.storage_mesh(family, _DATA_AXIS[family])

    @property
    def is_alive(self) -> bool:
        """Whether its process groups still exist. Destroying the default group destroys them all."""
        return all(_exists(group) for group in self._groups)
