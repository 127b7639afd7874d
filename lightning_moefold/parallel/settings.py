# SPDX-License-Identifier: Apache-2.0
"""What a strategy is told about how modules run under a fold, and which of it can change once a module has been cut.

:func:`~.apply.parallelize` applies the settings and records them; no setting reaches a module in another way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_moefold.arguments import check_choice, check_count
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.errors import InputError, UnsupportedFeature
from lightning_moefold.layout import Family
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.attention.exchanges import EXCHANGES, Exchange
from lightning_moefold.modules.experts.kernels import EXPERT_KERNELS, ExpertKernel
from lightning_moefold.modules.recompute_parts import Recompute, recompute_parts
from lightning_moefold.parallel.pipeline.plan import SPLIT_BACKWARD, PipelinePlan

ShardingMode = Literal["optimizer", "full", "none"]


@dataclass(frozen=True)
class Sharding:
    """How data parallelism stores and computes.

    Args:
        mode: ``"optimizer"`` shards and keeps gathered weights between forward and backward, ``"full"`` lets go of
            them, ``"none"`` replicates (gradients are then summed like those of a user's own modules; where
            ``fully_shard`` casts, it wraps each rank alone, on a mesh made with ``replicated``).
        mixed_dtype: Compute in this dtype and reduce gradients in float32; None to compute as stored.
    """

    mode: ShardingMode = "optimizer"
    mixed_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_choice("data_parallel_sharding", self.mode, ("optimizer", "full", "none"))

    def data_mesh(self, mesh: FoldedMesh, family: Family) -> DeviceMesh | None:
        """The mesh over which ``fully_shard`` cuts a family; None where it does not wrap."""
        return None if self.mode == "none" and self.mixed_dtype is None else mesh.data_mesh(family)

    def policy(self, storage: torch.dtype, *, cast: bool = True) -> MixedPrecisionPolicy:
        """FSDP2's policy; gradients of 16-bit weights are reduced in float32."""
        compute = self.mixed_dtype if cast else None
        narrow = (compute or storage) in (torch.bfloat16, torch.float16)
        return MixedPrecisionPolicy(compute, torch.float32 if narrow else None, cast_forward_inputs=False)


def splits_backward() -> bool:
    """Whether this release of torch computes a backward in two parts.

    Before 2.12 it adds the gradients of all outputs of a function to that of the first, and frees functions of Python in between.
    """
    return tuple(int(number) for number in torch.__version__.split(".")[:2]) >= (2, 12)


@dataclass(frozen=True)
class Settings:
    """How modules are cut and how they run: those arguments of :class:`~.strategy.MoEFoldStrategy` that ``parallelize`` applies.

    Args:
        sharding: Data-parallel storage and the dtype of computation.
        plan: Schedule and cut of a pipeline (``pipeline_schedule``, ``pipeline_split``).
        num_microbatches: Micro-batches of a batch, M.
        dispatch: How tokens travel (``dispatcher``, ``expert_copies`` and others), of MoE layers that were not made with a choice
            of their own; ``node_size`` is also that of layers that give none.
        expert_kernel: How gated experts compute.
        recompute: What decoder layers compute again in backward: None, ``"selective"``, ``"full"``, or a list of parts.
        exchange: How attention works over cp (``context_parallel_exchange``).
        compiler: Back end of :func:`torch.compile` for decoder layers (``compile``); None to leave them as they are.
        offload: Whether (``offload_activations``) what decoder layers keep for backward goes to host memory.

    Raises:
        InputError: For a value that is not known.
    """

    sharding: Sharding = Sharding()
    plan: PipelinePlan = PipelinePlan()
    num_microbatches: int = 1
    dispatch: DispatchConfig = DispatchConfig()
    expert_kernel: ExpertKernel = "auto"
    recompute: Recompute | None = None
    exchange: Exchange = "auto"
    compiler: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        check_count("num_microbatches", self.num_microbatches)
        check_choice("expert_kernel", self.expert_kernel, EXPERT_KERNELS)
        if "norm" in recompute_parts(self.recompute) and self.compiles:
            raise InputError(
                "recompute names 'norm', which a compiled layer cannot drop by itself; leave it out, or use compile=False."
            )
        check_choice("offload_activations", self.offload, (False, True))
        check_choice("context_parallel_exchange", self.exchange, EXCHANGES)

    @property
    def compiles(self) -> bool:
        """Whether decoder layers are compiled."""
        return self.compiler is not None

    @property
    def one_backward(self) -> str | None:
        """The setting under which layers compute their gradients in one piece, so that no schedule can split them; or None."""
        if self.compiles:
            return "compile=True"
        return f"expert_kernel={self.expert_kernel!r}" if self.expert_kernel == "transformer_engine" else None

    def check_pipeline(self, pp: int) -> None:
        """Raises unless ``pp`` pipeline ranks can run so; see :meth:`~.pipeline.plan.PipelinePlan.check`.

        Raises:
            UnsupportedFeature: For a schedule that this release of torch computes wrongly.
            InputError: For a schedule that splits backward, where layers compute their gradients in one piece.
        """
        if pp > 1 and self.plan.schedule in SPLIT_BACKWARD and self.one_backward is not None:
            raise InputError(
                f"pipeline_schedule={self.plan.schedule!r} splits backward, and with {self.one_backward} a layer computes its "
                f"gradients in one piece; leave {self.one_backward.partition('=')[0]} out, or use 'interleaved_1f1b'."
            )
        if pp > 1 and self.plan.schedule in SPLIT_BACKWARD and not splits_backward():
            raise UnsupportedFeature(
                f"pipeline_schedule={self.plan.schedule!r} splits backward, in which torch {torch.__version__} loses gradients; "
                "use torch 2.12 or newer, or 'interleaved_1f1b'."
            )
        self.plan.check(pp, self.num_microbatches, self.sharding.mode, self.recompute)

    def check_successor(self, later: Settings, pp: int) -> None:
        """Raises unless a module that was cut under these settings can go on under later ones, with ``pp`` pipeline ranks.

        Raises:
            InputError: Naming the first setting that decided how the module was cut.
        """
        earlier, plan = self.sharding, later.plan
        if earlier.mode != later.sharding.mode:
            raise _kept(f"data_parallel_sharding={earlier.mode!r}", repr(later.sharding.mode))
        if earlier.mixed_dtype != later.sharding.mixed_dtype:
            names = (
                "mixed precision" if s.mixed_dtype else "precision that is not mixed" for s in (earlier, later.sharding)
            )
            raise _kept(*names)
        if pp == 1:
            return
        if not self.plan.places_like(plan, pp):
            named = (f"pipeline_schedule={p.schedule!r} with num_stages_per_rank={p.chunks}" for p in (self.plan, plan))
            raise _kept(*named)
        if self.plan.split != plan.split:
            raise _kept(*(f"pipeline_split={None if p.split is None else list(p.split)}" for p in (self.plan, plan)))

    def with_node_size(self, ranks: int) -> Settings:
        """With ``ranks`` as the ranks that share fast links, where nothing else was said."""
        return replace(self, dispatch=replace(self.dispatch, node_size=self.dispatch.node_size or ranks))


def _kept(before: str, after: str) -> InputError:
    return InputError(
        f"an earlier Trainer has cut this module under {before}, which cannot change to {after} any more; give the same again, or "
        "make a new model."
    )
