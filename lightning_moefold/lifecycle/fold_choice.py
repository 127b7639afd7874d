# SPDX-License-Identifier: Apache-2.0
"""``MoEFoldStrategy(fold="auto")``: reads what the planner must know from the module, the data and the devices.

One rank plans and sends the result to the others, so that all have the same fold even if their data or devices differ.
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
from lightning_moefold.modules.recompute_parts import parse_recompute, recompute_text
from lightning_moefold.parallel import PipelinePlan, Settings
from lightning_moefold.parallel.pipeline.plan import SPLIT_BACKWARD
from lightning_moefold.parallel.settings import splits_backward
from lightning_moefold.planner.cost.routing import find_routing
from lightning_moefold.planner.machine.hardware import Hardware, find_hardware
from lightning_moefold.planner.search.auto import AutoFold, Choice, choose, machine_for
from lightning_moefold.planner.search.job import RECOMPUTES, SCHEDULES, Job
from lightning_moefold.planner.search.models_zoo import find_model
from lightning_moefold.planner.search.space import Space

Answer = TypeVar("Answer")
#: Key of the choice in checkpoints.
RECORD = "moefold_auto"


@dataclass(frozen=True)
class Fixed:
    """The settings that the strategy's arguments fix.

    Args:
        world_size: Number of ranks.
        ranks_per_node: Number of ranks on a node.
        precision: Precision of the Trainer.
        settings: Settings of the strategy; a plan or a recomputation that differs from the default is fixed.
        num_microbatches: Number of micro-batches; None to choose it for a pipeline.
    """

    world_size: int
    ranks_per_node: int
    precision: str
    settings: Settings
    num_microbatches: int | None

    def space(self, dispatchers: tuple[str, ...], offloads: bool = False) -> Space:
        """Returns the settings that are left to choose, among those that the strategy runs in one call of the model."""
        plan, recompute, dispatcher = self.settings.plan, self.settings.recompute, self.settings.dispatch.dispatcher
        looped = plan.schedule.startswith("interleaved")
        split = splits_backward() and not self.settings.one_backward
        run_here = [s for s in SCHEDULES if s != "gpipe" and (split or s not in SPLIT_BACKWARD)]
        return Space(
            schedules=tuple(run_here) if plan == PipelinePlan() else (plan.schedule,),
            recomputes=RECOMPUTES if recompute is None else (recompute_text(recompute),),
            dispatchers=dispatchers if dispatcher == "auto" else (dispatcher,),
            num_microbatches=self.num_microbatches,
            num_stages_per_rank=plan.stages_per_rank if looped else None,
            accumulates=False,
            offloads=("activations",) if offloads else ("none",),
        )

    def taking(self, choice: Choice) -> Settings:
        """The settings with what a choice settles."""
        chosen, given = choice.estimate.plan, self.settings
        plan, microbatches = given.plan, given.num_microbatches
        if chosen.fold.pp > 1:
            plan = PipelinePlan(chosen.schedule, chosen.num_stages_per_rank)
            microbatches = choice.estimate.microbatches
        recompute = parse_recompute(chosen.recompute)
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
    """Returns the settings with a dispatcher instead of ``"auto"``."""
    return config if config.dispatcher != "auto" else replace(config, dispatcher=cast(DispatcherName, name))


def known_model(auto: AutoFold, module: pl.LightningModule) -> MoEConfig | None:
    """Returns the model to plan for, or None if ``configure_model`` has not made it yet.

    Raises:
        PlanError: If the module's blocks are in a custom network.
    """
    if auto.model is not None:
        return find_model(auto.model)
    roots = parallel_roots(module)
    models = [root for _, root in roots if isinstance(root, MoECausalLM)]
    if roots and not models:
        raise PlanError(
            f'fold="auto" plans language models, but {roots[0][0] or type(roots[0][1]).__name__} is in a custom network; '
            "give the fold, or AutoFold(model=...) of a language model of the same size."
        )
    # The largest, if there are several: for a teacher and its student, the plan is for the teacher.
    return max((model.config for model in models), key=lambda config: config.num_parameters(), default=None)


def earlier_root(module: pl.LightningModule) -> ParallelRoot | None:
    """Returns a root that an earlier Trainer has parallelised, whose fold this Trainer must keep; or None."""
    spread = [root for _, root in parallel_roots(module) if root.mesh is not None and root.mesh.is_alive]
    return max(spread, key=lambda root: isinstance(root, MoECausalLM), default=None)


def choose_for(
    auto: AutoFold, fixed: Fixed, module: pl.LightningModule, device: torch.device, last_call: bool
) -> Choice | None:
    """Makes the choice for a Trainer that is about to run ``module``; None if the model is not made yet, unless at the last call.

    Raises:
        PlanError: If the model or the batch is unknown, or no plan fits.
    """
    model = known_model(auto, module)
    if model is None:
        if last_call:
            raise PlanError(
                f'fold="auto" plans for a MoECausalLM, but {type(module).__name__} holds none after configure_model; give the '
                "fold, or auto=AutoFold(model=...)."
            )
        return None
    rows, total, length = _batch(auto, module.trainer)
    dispatch = fixed.settings.dispatch
    hardware = machine(auto, fixed.ranks_per_node, device, dispatch.node_size)
    job = Job(
        model, fixed.world_size, hardware, total or rows or 1, length,
        fixed.precision, fixed.settings.sharding.mode, dispatch.capacity_factor, find_routing(auto.routing or "balanced"),
        dispatch.drop_scope, dispatch.pad_to_capacity, dispatch.chunks,
        dispatch.copies.max_copies_per_rank if dispatch.copies else 0, **_frozen_base(module, model),
    )  # fmt: skip
    profiles = None if auto.routing is None else (job.routing,)
    space = fixed.space(job.dispatchers, fixed.settings.offload and hardware.device != "cpu")
    return choose(job, space, None if total else rows, profiles)


def _frozen_base(module: pl.LightningModule, config: MoEConfig) -> dict[str, Any]:
    """Returns what a job says of a model whose weights are stored in fewer bytes; other adapters are planned as full training."""
    models = (root for _, root in parallel_roots(module) if isinstance(root, MoECausalLM) and root.config == config)
    model = next(models, None)
    if model is None or model.quantized is None or model.adapter is None:
        return {}
    return {"quantize": model.quantized, "lora_rank": model.adapter.lora.rank}


def difference(meta: Mapping[str, Any], choice: Mapping[str, Any]) -> str | None:
    """Describes how a resumed run's choice differs from the layout that its checkpoint names; None if it does not."""
    before = meta.get("fold")
    if before == choice["fold"] or before is None:
        return None
    text = f'the checkpoint was saved under {before}; fold="auto" continues under {choice["fold"]}, which changes no result'
    earlier, now = meta.get(RECORD, choice)["num_microbatches"], choice["num_microbatches"]
    if earlier != now:
        text += (
            f", except that the auxiliary loss is taken over {now} micro-batches instead of {earlier}: give "
            f"num_microbatches={earlier} to keep that"
        )
    return text + "."


def machine(auto: AutoFold, ranks_per_node: int, device: torch.device, node_size: int | None = None) -> Hardware:
    """Returns the machine in use, or the one that the user named, with the number of ranks that share fast links.

    Those are the ranks of a node, which share its memory, unless ``node_size`` says otherwise.
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
    """Returns the rows of a batch on each data rank, or on all together, and the tokens of a row."""
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
    """Returns the ``DataLoader`` given to the entry point; one made by a hook is not used, since it may need the fold."""
    loops: dict[TrainerFn | None, Any] = {
        TrainerFn.FITTING: trainer.fit_loop, TrainerFn.VALIDATING: trainer.validate_loop,
        TrainerFn.TESTING: trainer.test_loop, TrainerFn.PREDICTING: trainer.predict_loop,
    }  # fmt: skip
    loop = loops.get(trainer.state.fn)
    source = None if loop is None else loop._data_source.instance
    return source if isinstance(source, DataLoader) and source.batch_size is not None else None


def _row_length(loader: DataLoader[Any]) -> int | None:
    """Returns the tokens of the first row of a data set of dictionaries or tensors; None if unknown."""
    try:
        row = loader.dataset[0]
    except (TypeError, NotImplementedError):  # iterable data sets have no first row
        return None
    ids: Any = row.get("input_ids") if isinstance(row, dict) else row
    return len(ids) if hasattr(ids, "__len__") else None


@rank_zero_only
def announce(text: str) -> None:
    """Prints a message that is shown even if Lightning's own messages are silenced."""
    print(text, flush=True)


def agreed(answer: Callable[[], Answer], broadcast: Callable[[Any], Any], rank: int) -> Answer:
    """Returns ``answer()`` of rank 0 on every rank; its ``ValueError`` is raised on every rank too. Collective."""
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
