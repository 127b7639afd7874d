# SPDX-License-Identifier: Apache-2.0
"""Explains one plan line by line (``--explain``), each number with the sizes it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

from lightning_moefold.planner.cost.cost import CostModel, Estimate
from lightning_moefold.planner.machine.links import axis_shape
from lightning_moefold.planner.report.explain import describe, gib, legend, time_bar
from lightning_moefold.planner.search.job import Job

_WHAT = {
    "gemm": "dense matrix products (q k v o, router, shared expert, dense layers)",
    "experts": "expert matrix products",
    "attention": "attention cores",
    "elementwise": "element-wise work, permutation",
    "head": "head, loss, embedding",
    "launch": "exposed launches and host waits (the calibrated products contain those of eager runs)",
    "tp": "all-gather and reduce-scatter over tp",
    "cp": "exposed ring attention messages",
    "a2a": "token exchange over ep",
    "etp": "all-gather and reduce-scatter over etp",
    "recompute": "recomputation",
    "offload": "exposed copies to and from host memory",
    "sharding": "exposed weight gathers, gradient scatters",
    "bubble": "pipeline bubble",
    "p2p": "exposed messages between stages",
    "gradients": "exposed gradient reduction, weight gather",
    "optimizer": "optimizer",
}


def walk(job: Job, estimate: Estimate) -> Iterator[str]:
    """Yields the lines of an explanation: the result, groups, sizes of a layer, time and memory."""
    costs = CostModel(job)
    yield describe(estimate)
    yield (
        f"{estimate.step_time:.3f} s per step, {estimate.mfu:.1%} MFU, "
        f"{job.model_flops / estimate.step_time / job.world_size / 1e12:.0f} model TFLOP/s per rank, "
        f"bound by {estimate.bound_by}, largest overhead {estimate.overhead}"
    )
    yield f"[{time_bar(estimate, 60)}]"
    yield from legend()
    parts = [_groups(job, estimate), _sizes(job, estimate, costs), _times(estimate), _memory(estimate)]
    for lines in [*parts, _offload(job, estimate, costs)] if estimate.plan.offload != "none" else parts:
        yield ""
        yield from lines


def _groups(job: Job, estimate: Estimate) -> Iterator[str]:
    fold, per_node = estimate.plan.fold, job.hardware.gpus_per_node
    yield f"where the groups lie ({per_node} ranks a node)"
    uses = {
        "tp": "attention, dense parts", "cp": "keys and values", "ep": "tokens to experts", "etp": "rows of an expert",
        "dp_cp": "gradients of dense parameters", "edp": "gradients of experts", "pp": "activations between stages",
    }  # fmt: skip
    for axis, use in uses.items():
        if fold.size(axis) == 1:
            continue
        shape = axis_shape(fold, axis, per_node)
        where = f"crosses {shape.nodes} nodes, {shape.local} ranks on each" if shape.crosses else "inside a node"
        yield f"  {axis:6}{fold.size(axis):6} ranks  {where:40} {use}"


def _sizes(job: Job, estimate: Estimate, costs: CostModel) -> Iterator[str]:
    model, plan, fold = job.model, estimate.plan, estimate.plan.fold
    n = costs.layers.tokens(plan.micro_batch_size, fold.cp)
    t, k, b = ceil(n / fold.tp), model.num_experts_per_tok, job.activation_bytes
    local, width = model.num_experts // fold.ep, ceil(model.moe_intermediate_size / fold.etp)
    rows = t * k * estimate.load * fold.etp
    product = costs.layers.compute.gemm(rows / local, width, model.hidden_size)
    rate = 2 * rows / local * width * model.hidden_size / product if product else 0.0
    moe, _ = costs.layers.layers(fold.tp, fold.cp, fold.ep, fold.etp, plan.micro_batch_size, plan.dispatcher)
    yield "a MoE layer of one micro-batch"
    yield f"  {n} tokens on a tp group, {t} on a rank; {k} of {model.num_experts} experts each"
    yield (
        f"  busiest rank: load {estimate.load:.2f} of the mean, {rows:.0f} rows over {local} local experts "
        f"({rows / local:.0f} each{', empty ones among them' if job.pad_to_capacity else ''})"
    )
    yield (
        f"  expert product [{rows / local:.0f} x {model.hidden_size}] x [{model.hidden_size} x {width}]: "
        f"{rate / 1e12:.0f} TFLOP/s, {rate / job.hardware.peak(job.dtype):.0%} of the peak"
    )
    if fold.ep > 1:
        yield from _exchange(job, estimate, costs, t)
        sent = t * k * estimate.load * model.hidden_size * b
        if (parts := costs.layers.chunks(fold.ep)) > 1:
            shape = costs.layers.shape(fold.ep, fold.etp)
            one = costs.layers.links.exchange(shape, sent / parts)
            whole = costs.layers.links.exchange(shape, sent)
            yield (
                f"  in {parts} parts of {local / parts:g} experts, {one * 1e3:.2f} ms each instead of {whole * 1e3:.2f} ms "
                f"in one: the first way there and the last way back are seen, the others travel behind the products"
            )
    yield f"  forward {moe.forward_total * 1e3:.2f} ms = " + _sum(moe.forward)
    yield f"  backward {moe.backward_total * 1e3:.2f} ms = " + _sum(moe.backward)


def _exchange(job: Job, estimate: Estimate, costs: CostModel, tokens: int) -> Iterator[str]:
    """Yields lines about how the tokens of a rank reach their experts."""
    layers, plan, fold = costs.layers, estimate.plan, estimate.plan.fold
    one = tokens * job.model.hidden_size * job.activation_bytes / 2**20
    if plan.dispatcher == "allgather":
        yield f"  each gather moves {one * fold.ep * fold.etp:.1f} MiB to every rank, and so does each reduction"
        return
    if plan.dispatcher == "alltoall":
        sent = one * job.model.num_experts_per_tok * estimate.load
        yield f"  each exchange moves {sent:.1f} MiB per rank; four of them a layer, forward and backward"
        return
    nodes, ranks = layers.nodes(fold.ep, fold.etp, plan.dispatcher), layers.pairs(fold.ep)
    if nodes == 1:
        yield (
            f"  a token goes once to each of {ranks.mean:.2f} of {fold.ep} ranks on average: {one * ranks.busiest:.1f} MiB at "
            "the busiest rank; four such exchanges a layer, forward and backward"
        )
        return
    pairs, inside = layers.pairs(nodes), fold.ep // nodes
    yield (
        f"  a token goes once to each of {pairs.mean:.2f} of {nodes} nodes on average, {one * pairs.busiest:.1f} MiB at a rank "
        f"of the busiest node, of which {(nodes - 1) / nodes:.0%} between nodes; deduplicated it would be "
        f"{one * ranks.busiest:.1f} MiB"
    )
    yield (
        f"  and from there to {ranks.mean:.2f} of {fold.ep} ranks, among the {inside} of each node: {one * ranks.busiest:.1f} "
        "MiB at the busiest rank; each step four times a layer, forward and backward"
    )


def _sum(seconds: Mapping[str, float]) -> str:
    parts = sorted(((v, k) for k, v in seconds.items() if v > 0), reverse=True)
    return " + ".join(f"{name} {value * 1e3:.2f}" for value, name in parts)


def _times(estimate: Estimate) -> Iterator[str]:
    size = estimate.plan.micro_batch_size
    yield f"a step on the slowest pipeline rank: {estimate.microbatches} micro-batches of {size} sequences"
    for name, seconds in sorted(estimate.times.items(), key=lambda item: -item[1]):
        if seconds > 0:
            share = seconds / estimate.step_time
            yield f"  {seconds:9.4f} s {share:6.1%} {'=' * round(share * 40):41}{_WHAT[name]}"
    flops = f"model FLOPs {estimate.job.model_flops:.3e}, causal attention counted at half the square"
    yield f"  {estimate.step_time:9.4f} s  sum;  {flops}"


def _memory(estimate: Estimate) -> Iterator[str]:
    yield "memory of the fullest rank"
    for name, size in estimate.memory.as_dict().items():
        yield f"  {size / 2**30:8.2f} GiB  {'=' * round(size / estimate.limit * 40):41}{name}"
    verdict = "fits" if estimate.fits else "does NOT fit"
    yield f"  {estimate.memory.total / 2**30:8.2f} GiB of {estimate.limit / 2**30:.2f} GiB: {verdict}"


def _offload(job: Job, estimate: Estimate, costs: CostModel) -> Iterator[str]:
    """Yields what travels over the host link, and how much of the time is seen."""
    plan, link, memory = estimate.plan, job.hardware.host, estimate.memory
    yield (
        f"offloaded over the host link ({link.rate / 1e9:.0f} GB/s each way): {gib(memory.host)} of host memory for this rank, "
        f"{gib(memory.host * min(job.world_size, job.hardware.gpus_per_node))} on a node whose ranks are all as full"
    )
    if plan.offloads("activations"):
        moe, dense, _ = costs.memory.saved(plan)
        sparse = job.model.num_moe_layers
        for name, size, layers in (("MoE", moe, sparse), ("dense", dense, job.model.num_hidden_layers - sparse)):
            if layers:
                way = costs.layers.links.to_host(size)
                mib = f"{size / 2**20:.1f} MiB"
                yield f"  activations of a {name} layer: {mib}, {way * 1e3:.2f} ms each way in every micro-batch"
        yield "  those of three layers stay on the device; copies overlap with computation, but for the last layer's way back"
    if plan.offloads("state"):
        way = costs.layers.links.to_host(memory.host_state)
        yield (
            f"  optimizer state: {gib(memory.host_state)}, {way * 1e3:.0f} ms back before the optimizer step, which waits, and "
            f"{way * 1e3:.0f} ms to the host behind the next forward and backward pass"
        )
