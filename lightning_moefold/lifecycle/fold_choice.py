# SPDX-License-Identifier: Apache-2.0
"""``MoEFoldStrategy(fold="auto")``: what the planner must know, read from the module, the data and the devices at hand.

One rank plans and the others hear of it, so that all have the same fold whatever they see.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from lightning_moefold.dispatch.config import DispatchConfig, DispatcherName
from lightning_moefold.errors import PlanError
from lightning_moefold.models import MoECausalLM, MoEConfig
from lightning_moefold.modules.base import ParallelRoot, parallel_roots
from lightning_moefold.modules.recompute import Recompute
from lightning_moefold.parallel import PipelinePlan, Settings
from lightning_moefold.planner.cost.routing import find_routing
from lightning_moefold.planner.machine.hardware import Hardware, find_hardware
from lightning_moefold.planner.search.auto import AutoFold, Choice, choose, machine_for
from lightning_moefold.planner.search.job import RECOMPUTES, SCHEDULES, Job
from lightning_moefold.planner.search.models_zoo import find_model
from lightning_moefold.planner.search.search import Space

Answer = TypeVar("Answer")
#: What a checkpoint holds of a choice.
RECORD = "moefold_auto"


@dataclass(frozen=True)
class Fixed:
    """What the strategy's arguments leave to no choice.

    Args:
        world_size: Ranks.
        ranks_per_node: Ranks on a node.
        precision: The Trainer's.
        settings: Of the strategy; a plan or a recomputation other than the default one is given.
        num_microbatches: None to choose them for a pipeline.
    """

    world_size: int
    ranks_per_node: int
    precision: str
    settings: Settings
    num_microbatches: int | None

    def space(self, dispatchers: tuple[str, ...]) -> Space:
        """What is left to choose from: what the strategy runs in one call of the model.

        Args:
            dispatchers: Those that can do what is asked for.
        """
        plan, recompute, dispatcher = self.settings.plan, self.settings.recompute, self.settings.dispatch.dispatcher
        looped = plan.schedule.startswith("interleaved")
        return Space(
            schedules=tuple(s for s in SCHEDULES if s != "gpipe") if plan == PipelinePlan() else (plan.schedule,),
            recomputes=RECOMPUTES if recompute is None else (recompute,),
            dispatchers=dispatchers if dispatcher == "auto" else (dispatcher,),
            num_microbatches=self.num_microbatches,
            num_stages_per_rank=plan.stages_per_rank if looped else None,
            accumulates=False,
        ).free

    def taking(self, choice: Choice) -> Settings:
        """The settings with what a choice settles."""
        chosen, given = choice.estimate.plan, self.settings
        plan, microbatches = given.plan, given.num_microbatches
        if chosen.fold.pp > 1:
            plan = PipelinePlan(chosen.schedule, chosen.num_stages_per_rank)
            microbatches = choice.estimate.microbatches
        recompute = None if chosen.recompute == "none" else cast(Recompute, chosen.recompute)
        dispatch = _with_dispatcher(given.dispatch, chosen.dispatcher)
        return replace(given, plan=plan, num_microbatches=microbatches, recompute=recompute, dispatch=dispatch)

    def going_on(self, earlier: Settings) -> Settings:
        """The settings with those of an earlier Trainer where a choice would have been free."""
        given = self.settings
        return replace(
            given,
            plan=earlier.plan if given.plan == PipelinePlan() else given.plan,
            num_microbatches=self.num_microbatches or earlier.num_microbatches,
            recompute=given.recompute or earlier.recompute,
            dispatch=_with_dispatcher(given.dispatch, earlier.dispatch.dispatcher),
        )


def _with_dispatcher(config: DispatchConfig, name: str) -> DispatchConfig:
    """With a dispatcher in place of ``"auto"``."""
    return config if config.dispatcher != "auto" else replace(config, dispatcher=cast(DispatcherName, name))


def known_model(auto: AutoFold, module: pl.LightningModule) -> MoEConfig | None:
    """The model to plan for, or None where ``configure_model`` has yet to make it.

    Raises:
        PlanError: For a module whose blocks are in a network of its own.
    """
    if auto.model is not None:
        return find_model(auto.model)
    roots = parallel_roots(module)
    models = [root for _, root in roots if isinstance(root, MoECausalLM)]
    if roots and not models:
        raise PlanError(
            f'fold="auto" plans language models, and {roots[0][0] or type(roots[0][1]).__name__} is in a network of your own; '
            "give the fold, or AutoFold(model=...) of a language model that is as large."
        )
    # The largest, if there are several: a teacher is planned for with its student.
    return max((model.config for model in models), key=lambda config: config.num_parameters(), default=None)


def earlier_root(module: pl.LightningModule) -> ParallelRoot | None:
    """What an earlier Trainer has spread over the ranks of this one, which has to go on with that."""
    spread = [root for _, root in parallel_roots(module) if root.mesh is not None and root.mesh.is_alive]
    return max(spread, key=lambda root: isinstance(root, MoECausalLM), default=None)


def choose_for(
    auto: AutoFold, fixed: Fixed, module: pl.LightningModule, device: torch.device, last_call: bool
) -> Choice | None:
    """The choice for a Trainer that is about to run ``module``; None where the model has yet to be made.

    Args:
        auto: What was said.
        fixed: What is left to no choice.
        module: The LightningModule, attached to its Trainer.
        device: Of this rank.
        last_call: Whether the model has to be known by now.

    Raises:
        PlanError: If the model or the batch is not known, or nothing fits.
    """
    model = known_model(auto, module)
    if model is None:
        if last_call:
            raise PlanError(
                f'fold="auto" plans for a MoECausalLM, and {type(module).__name__} holds none after configure_model; give the '
                "fold, or auto=AutoFold(model=...)."
            )
        return None
    rows, total, length = _batch(auto, module.trainer)
    dispatch = fixed.settings.dispatch
    hardware = machine(auto, fixed.ranks_per_node, device, dispatch.node_size)
    job = Job(
        model, fixed.world_size, hardware, total or rows or 1, length,
        fixed.precision, fixed.settings.sharding.mode, dispatch.capacity_factor, find_routing(auto.routing),
        dispatch.drop_scope, dispatch.pad_to_capacity, dispatch.chunks,
        dispatch.copies.max_copies_per_rank if dispatch.copies else 0,
    )  # fmt: skip
    return choose(job, fixed.space(job.dispatchers), rows_per_rank=None if total else rows)


def difference(meta: Mapping[str, Any], choice: Mapping[str, Any]) -> str | None:
    """What is to be said where a resumed run is not laid out as the one that wrote the checkpoint; None for nothing.

    Args:
        meta: Of the checkpoint.
        choice: The record of this run's choice.
    """
    before = meta.get("fold")
    if before == choice["fold"] or before is None:
        return None
    text = (
        f'the checkpoint was saved under {before}; fold="auto" goes on under {choice["fold"]}, which changes no result'
    )
    earlier, now = meta.get(RECORD, choice)["num_microbatches"], choice["num_microbatches"]
    if earlier != now:
        text += (
            f", except that the auxiliary loss is taken over {now} micro-batches instead of {earlier}: give "
            f"num_microbatches={earlier} to keep that"
        )
    return text + "."


def machine(auto: AutoFold, ranks_per_node: int, device: torch.device, node_size: int | None = None) -> Hardware:
    """The machine at hand, or the one that was named, with as many ranks on a node as share fast links.

    Args:
        auto: What was said.
        ranks_per_node: Ranks of a machine, which share its memory.
        device: Of this rank.
        node_size: Ranks that share fast links, where those are not the ranks of a machine.
    """
    near = node_size or ranks_per_node
    if auto.hardware is not None:
        return replace(find_hardware(auto.hardware), gpus_per_node=near)
    if device.type == "cuda":
        seen = torch.cuda.get_device_properties(device)
        return machine_for(seen.name, near, float(seen.total_memory))
    return machine_for(None, near, _host_memory() / ranks_per_node)


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _batch(auto: AutoFold, trainer: pl.Trainer) -> tuple[int | None, int | None, int]:
    """Rows of a batch on each data rank, or on all together; and tokens of a row."""
    data, loader = getattr(trainer, "datamodule", None), _given_loader(trainer)
    rows, total, length = auto.batch_size, auto.global_batch_size, auto.sequence_length
    if rows is None and total is None:
        total = getattr(data, "global_batch_size", None)
        rows = loader.batch_size if loader is not None else None
    if length is None:
        length = getattr(data, "sequence_length", None) or (None if loader is None else _row_length(loader))
    missing = [
        name for name, known in (("global_batch_size", rows or total), ("sequence_length", length)) if known is None
    ]
    if missing or length is None:
        raise PlanError(
            f'fold="auto" cannot see {" and ".join(missing)} before the data is loaded, which itself needs the fold; give '
            f'MoEFoldStrategy(fold="auto", auto=AutoFold({", ".join(f"{name}=..." for name in missing)})), or a data module '
            f"with {'these attributes' if len(missing) > 1 else 'this attribute'}."
        )
    return rows, total, length


def _given_loader(trainer: pl.Trainer) -> DataLoader[Any] | None:
    """A ``DataLoader`` that was given to the entry point; what a hook makes may depend on the fold."""
    loops: dict[TrainerFn | None, Any] = {
        TrainerFn.FITTING: trainer.fit_loop, TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop, TrainerFn.PREDICTING: trainer.predict_loop,
    }  # fmt: skip
    loop = loops.get(trainer.state.fn)
    source = None if loop is None else loop._data_source.instance
    return source if isinstance(source, DataLoader) and source.batch_size is not None else None


def _row_length(loader: DataLoader[Any]) -> int | None:
    """Tokens of the first row of a data set of dictionaries or tensors."""
    try:
        row = loader.dataset[0]
    except (TypeError, NotImplementedError):  # iterable data sets have no first row
        return None
    ids: Any = row.get("input_ids") if isinstance(row, dict) else row
    return len(ids) if hasattr(ids, "__len__") else None


@rank_zero_only
def announce(text: str) -> None:
    """What a run should show even where Lightning's own remarks are silenced."""
    print(text, flush=True)


def agreed(answer: Callable[[], Answer], broadcast: Callable[[Any], Any], rank: int) -> Answer:
    """``answer()`` of rank 0, on every rank; its ``ValueError`` is raised on every rank too. Collective.

    Args:
        answer: What rank 0 does.
        broadcast: From rank 0 to all.
        rank: This one.

    Raises:
        ValueError: What rank 0 met.
    """
    told: tuple[Any, ValueError | None] = (None, None)
    if rank == 0:
        try:
            told = answer(), None
        except ValueError as error:
            told = None, error
    value, refusal = broadcast(told)
    if refusal is not None:
        raise refusal
    return value
