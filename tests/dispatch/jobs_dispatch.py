# SPDX-License-Identifier: Apache-2.0
"""Dispatchers on the ranks of the pool, compared with a loop over tokens; and what they send."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_moefold import Fold, comm
from lightning_moefold.dispatch import Choices, DispatchConfig, ExpertAxes, TokenDispatcher
from lightning_moefold.dispatch.hierarchical import HierarchicalDispatcher
from lightning_moefold.dispatch.registry import DISPATCHERS, make_dispatcher
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules import MoELayer
from lightning_moefold.modules.experts.kernels import read_tokens, sum_rows
from lightning_moefold.parallel import Settings, Sharding, parallelize

EXPERTS, TOP, SIZE = 8, 3, 3
#: Of rows that are counted, so that nothing else is as wide.
SIZE_WIDE = 16
#: What is tried under every fold.
CONFIGS = {
    "alltoall": DispatchConfig("alltoall"),
    "two chunks": DispatchConfig("alltoall", chunks=2),
    "uneven chunks": DispatchConfig("alltoall", chunks=3),
    "padded": DispatchConfig("alltoall", capacity_factor=1.0, pad_to_capacity=True),
    "padded chunks": DispatchConfig("alltoall", capacity_factor=1.0, pad_to_capacity=True, chunks=2),
    "allgather": DispatchConfig("allgather"),
    "deduplicated": DispatchConfig("deduplicated"),
    "hierarchical": DispatchConfig("hierarchical", node_size=2),
}
#: More rows than any expert gets in the cases below.
PADDED = 40


def _routing(kind: str, rank: int) -> tuple[int, Tensor, Tensor | None]:
    """Tokens, their experts, and which choices are served; different on every rank."""
    generator = torch.Generator().manual_seed(17 * rank + 1)
    tokens = {"uneven": 3 + 4 * rank, "one rank empty": 0 if rank == 1 else 6, "all empty": 0}.get(kind, 7)
    expert = (
        torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(tokens)]) if tokens else None
    )
    expert = torch.empty(0, TOP, dtype=torch.int64) if expert is None else expert
    if kind == "all to one":
        expert = torch.tensor([5, 0, 4]).expand(tokens, TOP).clone()
    kept = None
    if kind == "padding":
        kept = torch.rand(tokens, 1, generator=generator) > 0.4
    if kind == "a rank of padding":
        kept = torch.full((tokens, 1), rank != 0)
    if kind == "dropped":
        kept = torch.rand(tokens, TOP, generator=generator) > 0.4
    return tokens, expert, kept


def _expert(index: int, x: Tensor, part: int, parts: int) -> Tensor:
    """Expert ``index`` scales each column by numbers of its own; an etp rank has a share of the result."""
    share = 1.0 / parts + (part - (parts - 1) / 2) * 0.1  # shares differ, and sum to one
    return x * (index + 1.5) * torch.arange(1, SIZE + 1, dtype=x.dtype) * share


def walk(dispatcher: TokenDispatcher, mesh: FoldedMesh, x: Tensor, weight: Tensor, expert: Tensor, kept: Any) -> Tensor:
    """The six steps around the experts above, as :class:`MoELayer` and :class:`RoutedExperts` take them."""
    parcels = dispatcher.dispatch_preprocess(x, Choices(weight, expert, kept, capacity=PADDED))
    flying = [dispatcher.token_dispatch(parcel) for parcel in parcels]
    returns, first = [], mesh.ep.index * dispatcher.local_experts
    for parcel, size in zip(flying, dispatcher.experts_per_chunk, strict=True):
        x_AD, rows = dispatcher.dispatch_postprocess(parcel)
        assert len(rows.counts_L) == size
        assert int(rows.counts_L.sum()) == rows.weight_M.shape[0]
        assert rows.counts is None or rows.counts == rows.counts_L.tolist()
        parts = [
            _expert(first + i, part, mesh.etp.index, mesh.etp.size)
            for i, part in enumerate(read_tokens(x_AD, rows).split(rows.counts_L.tolist()))
        ]
        y_AD = sum_rows(torch.cat(parts) * rows.weight_M.unsqueeze(1), rows, x_AD.shape[0])
        returns.append(dispatcher.token_combine(dispatcher.combine_preprocess(y_AD, parcel.plan), parcel.plan))
        first += size
    return dispatcher.combine_postprocess(returns, [parcel.plan for parcel in flying])


def make(name: str, mesh: FoldedMesh) -> TokenDispatcher:
    """The dispatcher of a name in ``CONFIGS``, on one rank too; by node only where ep spans nodes."""
    config = CONFIGS[name]
    axes = ExpertAxes.of(mesh, config)
    if name == "hierarchical":
        return make_dispatcher(config, EXPERTS, TOP, axes)
    return DISPATCHERS[config.dispatcher](config, EXPERTS, TOP, axes)


def check(folds: list[str], kinds: list[str], names: list[str]) -> int:
    """Output, gradient of the input and of the weights, against a loop, in float64."""
    torch.set_default_dtype(torch.float64)
    cases = 0
    for text in folds:
        mesh = FoldedMesh(Fold.parse(text, dist.get_world_size()), "cpu")
        for name in names:
            for kind in kinds:
                _check_one(make(name, mesh), mesh, kind, f"{name}, {text}, {kind}")
                cases += 1
    return cases


def _inputs(kind: str, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    tokens, expert, kept = _routing(kind, rank)
    generator = torch.Generator().manual_seed(100 + rank)
    x, slope = torch.randn(2, tokens, SIZE, generator=generator).unbind(0)
    return x, slope, torch.rand(tokens, TOP, generator=generator), expert, kept


def _check_one(dispatcher: TokenDispatcher, mesh: FoldedMesh, kind: str, what: str) -> None:
    x, slope, weight, expert, kept = _inputs(kind, mesh.rank)
    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    output = walk(dispatcher, mesh, *inputs, expert, kept)
    (output * slope).sum().backward()

    naive = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = [torch.zeros(SIZE) for _ in range(len(x))]
    for t in range(len(x)):
        for k in range(TOP):
            if kept is None or bool(kept.expand(-1, TOP)[t, k]):
                expected[t] = expected[t] + naive[1][t, k] * _expert(int(expert[t, k]), naive[0][t], 0, 1)
    whole = torch.stack(expected) if len(x) else torch.zeros(0, SIZE)
    if whole.requires_grad:
        (whole * slope).sum().backward()
    pairs = [(output, whole), *((a.grad, b.grad) for a, b in zip(inputs, naive, strict=True))]
    for name, (a, b) in zip(("output", "gradient of x", "gradient of the weights"), pairs, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}, {what}: {m}")


def bits_of_chunks(fold: str) -> list[bool]:
    """Whether output and gradients are the same bits in one part and in several."""
    torch.set_default_dtype(torch.float32)
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    found = {}
    for name in ("alltoall", "two chunks", "uneven chunks"):
        x, slope, weight, expert, kept = _inputs("uneven", mesh.rank)
        inputs = [x.requires_grad_(), weight.requires_grad_()]
        output = walk(make(name, mesh), mesh, *inputs, expert, kept)
        found[name] = [output.detach(), *torch.autograd.grad(output, inputs, slope)]
    return [
        torch.equal(a, b)
        for name in ("two chunks", "uneven chunks")
        for a, b in zip(found["alltoall"], found[name], strict=True)
    ]


def by_node(fold: str, node_size: int, kinds: list[str]) -> tuple[str, list[tuple[int, ...]]]:
    """As :func:`check`, under one fold and its dispatcher by node: which that is, and the ranks of its axes."""
    torch.set_default_dtype(torch.float64)
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    config = DispatchConfig("hierarchical", node_size=node_size)
    axes = ExpertAxes.of(mesh, config)
    for kind in kinds:
        _check_one(make_dispatcher(config, EXPERTS, TOP, axes), mesh, kind, f"by node, {fold}, {kind}")
    inside = axes.within or axes
    ranks = [] if axes.nodes is None else [axes.nodes.ranks, inside.ep.ranks, inside.etp_ep.ranks]
    return type(make_dispatcher(config, EXPERTS, TOP, axes)).__name__, ranks


def chosen(fold: str, node_size: int, top_k: int) -> tuple[str, tuple[int, ...]]:
    """The dispatcher of a layer that was left to choose one, and the ranks of its axis between nodes."""
    layer = MoELayer(16, EXPERTS, top_k, 8, dispatch=DispatchConfig("auto", node_size=node_size))
    layer.bind(FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu"))
    dispatcher = layer.dispatcher
    nodes = dispatcher.nodes.ranks if isinstance(dispatcher, HierarchicalDispatcher) else ()
    return type(dispatcher).__name__, nodes


def rows_of_each_step(fold: str, node_size: int, tokens: int) -> dict[str, int]:
    """Rows that this rank sends to other ranks of its node, and to other nodes, of balanced routing; and collectives by
    the place of their group, forward and backward."""
    torch.set_default_dtype(torch.float32)
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    config = DispatchConfig("hierarchical", node_size=node_size)
    dispatcher = make_dispatcher(config, EXPERTS, TOP, ExpertAxes.of(mesh, config))
    generator = torch.Generator().manual_seed(mesh.rank)
    expert = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP).indices
    found = {
        "within": 0,
        "between": 0,
        "forward within": 0,
        "forward between": 0,
        "backward within": 0,
        "backward between": 0,
    }
    way = "forward"
    names = ("all_to_all_single", comm.ALL_GATHER)
    real = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Any:
        def call(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            ranks = dist.get_process_group_ranks(kwargs["group"])
            step = "within" if len({rank // node_size for rank in ranks}) == 1 else "between"
            found[f"{way} {step}"] += 1
            if name == "all_to_all_single" and x.shape[1:] == (SIZE_WIDE,):
                send = args[1]
                found[step] += sum(n for rank, n in zip(ranks, send, strict=True) if rank != mesh.rank)
            return real[name](out, x, *args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counted(name) for name in names}):
        x, weight = torch.randn(tokens, SIZE_WIDE).requires_grad_(), torch.rand(tokens, TOP).requires_grad_()
        [parcel] = dispatcher.dispatch_preprocess(x, Choices(weight, expert))
        parcel = dispatcher.token_dispatch(parcel)
        arrived, rows = dispatcher.dispatch_postprocess(parcel)
        there = dict(found)
        y = sum_rows(read_tokens(arrived, rows) * rows.weight_M.unsqueeze(1), rows, arrived.shape[0])
        back = dispatcher.token_combine(dispatcher.combine_preprocess(y, parcel.plan), parcel.plan)
        output = dispatcher.combine_postprocess([back], [parcel.plan])
        way = "backward"
        output.sum().backward()
    return {**found, "within": there["within"], "between": there["between"]}


def rows_between_nodes(fold: str, node_size: int, size: int) -> dict[str, int]:
    """Rows that this rank sends to other nodes in a forward pass, and the distinct pairs of a token of this
    rank with another node that holds one of its experts."""
    torch.set_default_dtype(torch.float32)
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    config = DispatchConfig("hierarchical", node_size=node_size)
    axes = ExpertAxes.of(mesh, config)
    assert axes.nodes is not None
    node = axes.nodes.index
    _, _, _, expert, _ = _inputs("plain", mesh.rank)
    sent = 0
    real = dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, receive: list[int], send: list[int], **kwargs: Any) -> Any:
        nonlocal sent
        if x.shape[1:] == (size,):
            ranks = dist.get_process_group_ranks(kwargs["group"])
            sent += sum(n for rank, n in zip(ranks, send, strict=True) if rank // node_size != mesh.rank // node_size)
        return real(out, x, receive, send, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        dispatcher = make_dispatcher(config, EXPERTS, TOP, axes)
        (parcel,) = dispatcher.dispatch_preprocess(
            torch.randn(len(expert), size), Choices(torch.rand(len(expert), TOP), expert)
        )
        dispatcher.dispatch_postprocess(dispatcher.token_dispatch(parcel))
    nodes_TK = expert // (EXPERTS // axes.nodes.size)
    return {"rows": sent, "pairs": sum(len(set(row.tolist()) - {node}) for row in nodes_TK)}


def bytes_sent(name: str, fold: str, tokens: int, size: int) -> dict[str, int]:
    """Bytes of tokens and all other bytes that this rank sends to others in a forward pass, and the distinct pairs of a
    token of this rank with another rank that holds one of its experts."""
    torch.set_default_dtype(torch.float32)
    mesh = FoldedMesh(Fold.parse(fold, dist.get_world_size()), "cpu")
    generator = torch.Generator().manual_seed(mesh.rank)
    expert = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP] for _ in range(tokens)])
    sent = {"tokens": 0, "else": 0}
    real = dist.all_to_all_single

    def counted(out: Tensor, x: Tensor, receive: list[int], send: list[int], **kwargs: Any) -> Any:
        rows = sum(send) - send[mesh.ep.index]
        sent["tokens" if x.shape[1:] == (size,) else "else"] += rows * x[:1].numel() * x.element_size()
        return real(out, x, receive, send, **kwargs)

    with mock.patch.object(dist, "all_to_all_single", counted):
        dispatcher = make(name, mesh)
        parcels = dispatcher.dispatch_preprocess(torch.randn(tokens, size), Choices(torch.rand(tokens, TOP), expert))
        for parcel in parcels:
            dispatcher.dispatch_postprocess(dispatcher.token_dispatch(parcel))
    rank_TK = expert // dispatcher.local_experts
    pairs = sum(len(set(row.tolist()) - {mesh.ep.index}) for row in rank_TK)
    return {**sent, "pairs": pairs}


def held_while_experts_compute(name: str, node_size: int) -> list[bool]:
    """Whether the rows that this rank has sent are still in memory at each call of the experts."""
    mesh = FoldedMesh(Fold.parse("ep4", dist.get_world_size()), "cpu")
    layer = MoELayer(SIZE, EXPERTS, TOP, 8, dispatch=DispatchConfig(name, node_size=node_size))  # type: ignore[arg-type]
    parallelize(layer, mesh, Settings(Sharding("none")), torch.device("cpu"))
    sent, held = [], []
    preprocess, compute = layer.dispatcher.dispatch_preprocess, layer.experts.compute

    def preprocessed(*args: Any) -> Any:
        parcels = preprocess(*args)
        sent.extend(weakref.ref(parcel.x) for parcel in parcels)
        return parcels

    def computed(*args: Any) -> Any:
        held.extend(x() is not None for x in sent)
        return compute(*args)

    with (
        mock.patch.object(layer.dispatcher, "dispatch_preprocess", preprocessed),
        mock.patch.object(layer.experts, "compute", computed),
    ):
        layer(torch.randn(1, 12, SIZE, requires_grad=True)).sum().backward()
    assert sent
    return held
