# SPDX-License-Identifier: Apache-2.0
"""Finds the collective in which an error was raised from its traceback, so nothing is recorded in a healthy run."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch.distributed as dist

from lightning_moefold.mesh import Axis, FoldedMesh

_KINDS = {
    "all_reduce": "all-reduce",
    "all_gather": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_single": "all-gather",
    "all_gather_object": "all-gather of objects",
    "reduce_scatter_tensor": "reduce-scatter",
    "reduce_scatter_single": "reduce-scatter",
    "all_to_all_single": "all-to-all",
    "broadcast": "broadcast",
    "broadcast_object_list": "broadcast of objects",
    "batch_isend_irecv": "exchange",
    "barrier": "barrier",
    "send": "send",
    "isend": "send",
    "recv": "receive",
    "irecv": "receive",
}
_C10D = "torch.distributed.distributed_c10d"
_FSDP = "torch.distributed.fsdp._fully_shard."
_PIPELINING = "torch.distributed.pipelining."
_COLLECTIVES = "lightning_moefold.comm", "lightning_moefold.async_comm", "lightning_moefold.agreement"
#: Functions of FSDP2 that reduce gradients; all others of it that communicate gather weights.
_REDUCING = ("foreach_reduce", "post_backward", "finalize_backward")


@dataclass(frozen=True)
class Collective:
    """A description of a collective, for a person.

    Args:
        kind: Kind of collective, such as ``"all-to-all"``.
        purpose: The function that called it; may be empty.
        axis: Name of the fold's axis; empty if unknown.
        ranks: Ranks of its group; empty if unknown.
    """

    kind: str
    purpose: str = ""
    axis: str = ""
    ranks: tuple[int, ...] = ()

    def __str__(self) -> str:
        text = f"the {self.kind}" + (f" of {self.purpose}" if self.purpose else "")
        return text + (f" over {self.axis or 'ranks'} {_shorten(self.ranks)}" if self.ranks else "")


def _shorten(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 16:
        return str(list(ranks))
    return f"[{', '.join(map(str, ranks[:4]))}, ..., {ranks[-1]}] ({len(ranks)} ranks)"


def find_collective(error: BaseException, mesh: FoldedMesh | None = None) -> Collective | None:
    """Finds the collective in which ``error`` was raised, or None if its traceback shows none; the mesh names its group."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][::-1]
    for index, frame in enumerate(frames):
        module = frame.f_globals.get("__name__", "")
        if module == _C10D:
            return _called(frames[index:], mesh)
        if module.startswith(_FSDP):
            return _fsdp(frames[index:], mesh)
        if module.startswith(_PIPELINING):
            return _of_axis("exchange", "pipeline stages", None if mesh is None else mesh.axis("pp"))
        if module.startswith("lightning_moefold."):  # waits for a collective that was started earlier
            return _waiting(frames[index:], mesh)
    return None


def _called(frames: list[FrameType], mesh: FoldedMesh | None) -> Collective:
    """Describes a function of torch.distributed; ``frames`` begin with the innermost frame of its module."""
    outermost = 0
    for index, frame in enumerate(frames):
        if not frame.f_globals.get("__name__", "").startswith("torch.distributed.") or _is(frame, _FSDP, _PIPELINING):
            break
        if _is(frame, _C10D):
            outermost = index
    call = frames[outermost]
    callers = [frame for frame in frames[outermost + 1 :] if not _is(frame, "torch.distributed.c10d_logger")]
    kind = _KINDS.get(call.f_code.co_name, call.f_code.co_name.strip("_"))
    caller = callers[0] if callers else call
    if _is(caller, _FSDP):
        return _fsdp(callers, mesh)
    if _is(caller, _PIPELINING):
        return _of_axis("exchange", "pipeline stages", None if mesh is None else mesh.axis("pp"))
    purpose = _purpose(callers) if _is(caller, "lightning_moefold.") else ""  # else the line of the user's code says it
    group = _group_in(call.f_locals)
    # A function may hold several axes, or that of an earlier call, so the group of this call decides.
    axes = _axes_in(caller.f_locals) if _is(caller, *_COLLECTIVES) else []
    axis = next((axis for axis in axes if axis.group is group is not None), None)
    return _of_group(kind, purpose, group, mesh) if axis is None else _of_axis(kind, purpose, axis)


def _fsdp(frames: list[FrameType], mesh: FoldedMesh | None) -> Collective:
    names = {frame.f_code.co_name for frame in frames if _is(frame, _FSDP)}
    reducing = not names.isdisjoint(_REDUCING)
    held = [getattr(f.f_locals.get("self"), "_module_fqn", None) for f in frames if _is(f, _FSDP)]
    module = next((name for name in held if name), "")
    what = ("gradients" if reducing else "weights") + (f" of {module}" if module else "")
    kind = "reduce-scatter" if reducing else "all-gather"
    owner = next((o for f in frames if hasattr(o := f.f_locals.get("self"), "_all_gather_process_group")), None)
    axis = None if mesh is None else mesh.axis("edp" if module.endswith(".experts") else "dp_cp")
    if axis is None and owner is not None:
        return _of_group(kind, what, owner._all_gather_process_group, None)
    return _of_axis(kind, what, axis)


def _waiting(frames: list[FrameType], mesh: FoldedMesh | None) -> Collective | None:
    """Describes a method ``wait`` of an object with an axis; axes of other functions may have no collective running."""
    frame = frames[0]
    axis = getattr(frame.f_locals.get("self"), "axis", None)
    if frame.f_code.co_name == "wait" and isinstance(axis, Axis):
        kind = getattr(frame.f_locals.get("way"), "kind", "exchange")  # a route of async_comm
        return _of_axis(kind, _purpose(frames[1:]), axis)
    if _is(frame, "lightning_moefold.parallel.pipeline.") and mesh is not None:
        return _of_axis("exchange", "pipeline stages", mesh.axis("pp"))
    return None


def _of_axis(kind: str, purpose: str, axis: Axis | None) -> Collective:
    return Collective(kind, purpose) if axis is None else Collective(kind, purpose, axis.name, axis.ranks)


def _of_group(kind: str, purpose: str, group: Any, mesh: FoldedMesh | None) -> Collective:
    ranks: tuple[int, ...] = ()
    if dist.is_initialized():
        try:
            ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        except (KeyError, RuntimeError, ValueError):  # the group no longer exists
            return Collective(kind, purpose)
    name = "world"
    if mesh is not None and ranks != mesh.world.ranks:
        name = next((axis.name for axis in mesh.axes() if axis.ranks == ranks), "")
    return Collective(kind, purpose, name, ranks)


def _is(frame: FrameType, *modules: str) -> bool:
    return frame.f_globals.get("__name__", "").startswith(modules)


def _axes_in(values: Mapping[str, Any]) -> list[Axis]:
    found = [value for value in values.values() if isinstance(value, Axis)]
    return found + [axis for value in values.values() if isinstance(axis := getattr(value, "axis", None), Axis)]


def _group_in(values: Mapping[str, Any]) -> Any:
    if values.get("group") is not None:
        return values["group"]
    operations = values.get("p2p_op_list")
    return operations[0].group if operations else None


def _purpose(frames: list[FrameType]) -> str:
    """Returns the function of this package, outside the modules of collectives, that called the collective."""
    for frame in frames:
        if _is(frame, *_COLLECTIVES):
            if frame.f_code.co_name == "backward":
                return "a backward pass"
        elif _is(frame, "lightning_moefold."):
            name: str = getattr(
                frame.f_code, "co_qualname", frame.f_code.co_name
            )  # Python 3.10 has only the short name
            return name.partition(".<locals>")[0]
    return ""
