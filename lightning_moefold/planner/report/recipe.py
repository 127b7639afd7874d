# SPDX-License-Identifier: Apache-2.0
"""What to paste to run a plan: the arguments of the strategy and the Trainer, as YAML for ``moefold fit`` and as Python."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_moefold.errors import PlanError
from lightning_moefold.fold import expert_nodes
from lightning_moefold.modules.recompute_parts import parse_recompute
from lightning_moefold.planner.cost.cost import Estimate


def strategy_arguments(estimate: Estimate) -> dict[str, Any]:
    """Returns the arguments of ``MoEFoldStrategy`` that run the plan, together with :func:`trainer_arguments`."""
    job, plan, fold = estimate.job, estimate.plan, estimate.plan.fold
    arguments: dict[str, Any] = {
        "tensor_parallel_size": fold.tp,
        "context_parallel_size": fold.cp,
        "pipeline_parallel_size": fold.pp,
        "expert_parallel_size": fold.ep,
        "expert_tensor_parallel_size": fold.etp,
    }
    arguments = {name: size for name, size in arguments.items() if size > 1}
    if fold.pp > 1:
        arguments["num_microbatches"] = estimate.microbatches
        arguments["pipeline_schedule"] = plan.schedule
        if plan.num_stages_per_rank > 1:
            arguments["num_stages_per_rank"] = plan.num_stages_per_rank
    elif estimate.microbatches > 1:  # accumulated batches: every label weighs as in the one planned batch
        arguments["calculate_per_token_loss"] = True
    by_node = expert_nodes(fold.ep, fold.etp, job.hardware.gpus_per_node) > 1 and plan.dispatcher == "hierarchical"
    optional = (
        ("dispatcher", plan.dispatcher, "alltoall"),
        ("node_size", job.hardware.gpus_per_node if by_node else None, None),
        ("capacity_factor", job.capacity_factor, None),
        ("drop_scope", job.drop_scope, "full_sequence"),
        ("pad_to_capacity", job.pad_to_capacity, False),
        ("dispatch_chunks", job.dispatch_chunks, 1),
        ("data_parallel_sharding", job.sharding, "optimizer"),
        ("recompute", parse_recompute(plan.recompute), None),
        ("offload_activations", plan.offloads("activations"), False),
    )
    return arguments | {name: value for name, value, default in optional if value != default}


def trainer_arguments(estimate: Estimate) -> dict[str, Any]:
    """Returns the Trainer's arguments that run the plan: ranks, precision, and accumulation if there is no pipeline."""
    job = estimate.job
    nodes = -(-job.world_size // job.hardware.gpus_per_node)
    arguments: dict[str, Any] = {
        "accelerator": job.hardware.device, "devices": job.world_size // nodes, "num_nodes": nodes, "precision": job.precision
    }  # fmt: skip
    if estimate.plan.fold.pp == 1 and estimate.microbatches > 1:
        arguments["accumulate_grad_batches"] = estimate.microbatches
    return arguments


def rows_per_batch(estimate: Estimate) -> int:
    """Returns the number of rows of a batch on each data rank."""
    accumulated = trainer_arguments(estimate).get("accumulate_grad_batches", 1)
    return estimate.job.global_batch_size // (estimate.plan.fold.dp * int(accumulated))


def yaml_recipe(estimate: Estimate) -> str:
    """Returns the plan as a configuration of ``moefold fit``, in which the paths remain to be set.

    Raises:
        PlanError: If the plan does not fit, or the strategy does not run its precision.
    """
    _check(estimate)
    job, strategy = estimate.job, strategy_arguments(estimate)
    lines = [
        f"# {estimate.plan}",
        f"# predicted for {job.world_size} ranks of {job.hardware.name}, {job.global_batch_size} rows of "
        f"{job.sequence_length} tokens per step: {estimate.step_time:.3g} s, {estimate.mfu:.1%} MFU, "
        f"{estimate.memory.total / 2**30:.1f} of {estimate.limit / 2**30:.1f} GiB",
        "trainer:",
        "  strategy:",
        "    class_path: lightning_moefold.MoEFoldStrategy",
        "    init_args:" + " {}" * (not strategy),
        *(f"      {name}: {_yaml(value)}" for name, value in strategy.items()),
        *(f"  {name}: {_yaml(value)}" for name, value in trainer_arguments(estimate).items()),
        "model:",
        "  class_path: lightning_moefold.recipes.FineTuneModule",
        "  init_args:",
        f"    checkpoint: {_checkpoint(estimate)}",
        *(["    master_weights: true"] if job.master_weights else []),
        *(["    offload_state: true"] if estimate.plan.offloads("state") else []),
        *([f"    quantize: {job.quantize}"] if job.quantize else []),
        *([f"    adapter: {{rank: {job.lora_rank}}}"] if job.lora_rank else []),
        "data:",
        "  class_path: lightning_moefold.recipes.TextData",
        "  init_args:",
        "    files: [train.jsonl]",
        f"    tokenizer: {_checkpoint(estimate)}",
        f"    sequence_length: {job.sequence_length}",
        f"    batch_size: {rows_per_batch(estimate) * estimate.plan.fold.dp}   # rows over all data ranks together",
    ]
    return "\n".join(lines) + "\n"


def python_recipe(estimate: Estimate) -> str:
    """Returns the plan as Python: the strategy, the Trainer, and the rows of a batch.

    Raises:
        PlanError: If the plan does not fit, or the strategy does not run its precision.
    """
    _check(estimate)
    job, model = estimate.job, []
    if job.master_weights or estimate.plan.offloads("state"):
        made = "MasterWeights(torch.optim.AdamW, " if job.master_weights else "torch.optim.AdamW("
        made += "self.parameters(), ...)"
        model.append(
            f"# configure_optimizers: return {f'offload_state({made})' if estimate.plan.offloads('state') else made}"
        )
    if job.quantize:
        model.append(f"# configure_model: MoECausalLM.from_pretrained(..., quantize={job.quantize!r})")
    if job.lora_rank:
        model.append(f"# configure_model: self.model.add_adapter(LoRA(rank={job.lora_rank}))")
    trainer = trainer_arguments(estimate)
    return "\n".join([
        f"strategy = MoEFoldStrategy({_call(strategy_arguments(estimate))})",
        f"trainer = L.Trainer(strategy=strategy, {_call(trainer)})",
        f"# batches of {rows_per_batch(estimate)} rows of {job.sequence_length} tokens on each data rank ({estimate.plan.fold.dp})",
        *model,
    ]) + "\n"  # fmt: skip


def write_recipe(estimate: Estimate, path: Path) -> None:
    """Writes :func:`yaml_recipe` to a file.

    Raises:
        PlanError: If the plan cannot be run, or the file exists.
    """
    text = yaml_recipe(estimate)
    if path.exists():
        raise PlanError(f"{path} exists already; give another name, or remove it.")
    path.write_text(text)


def lines_to_paste(estimate: Estimate) -> Iterator[str]:
    """Yields both recipes with headings; nothing for a plan that does not fit or cannot be run."""
    if refusal(estimate) is not None:
        return
    yield from ("for moefold fit (moefold plan --write-config FILE.yaml writes it):", "")
    yield from ("    " + line for line in yaml_recipe(estimate).splitlines())
    yield from ("", "in Python:", "")
    yield from ("    " + line for line in python_recipe(estimate).splitlines())


def refusal(estimate: Estimate) -> str | None:
    """Returns the reason why there is no recipe of a plan, or None."""
    if not estimate.fits:
        return f"{estimate.plan} does not fit, so there is no recipe of it."
    if estimate.job.precision == "fp8-mixed":
        return "fp8-mixed is planned only: the strategy does not run it, so there is no recipe."
    return None


def _check(estimate: Estimate) -> None:
    reason = refusal(estimate)
    if reason is not None:
        raise PlanError(reason)


def _checkpoint(estimate: Estimate) -> str:
    name = estimate.job.name
    return name if Path(name).is_dir() else f"path/to/{name or 'checkpoint'}"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


def _call(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())
