# SPDX-License-Identifier: Apache-2.0
"""Every rank takes part in making every group, as NCCL asks where a device is bound; and groups have the backends they need.

Each rank of a world is played by this process, on a process group that does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_moefold import Fold, MoECausalLM
from lightning_moefold.dispatch import DispatchConfig
from lightning_moefold.mesh import FoldedMesh, forget_groups
from lightning_moefold.models import MoEConfig
from lightning_moefold.models.weights import deferred_weights
from lightning_moefold.modules import MoELayer
from lightning_moefold.parallel import Settings, parallelize
from lightning_moefold.parallel.parameters import ParameterRegistry

FOLDS = [
    ("tp2 | ep4", 8), ("tp2 cp2 | ep4", 16), ("pp2 tp2 | ep4", 16), ("pp4 | ep2 etp2", 16), ("tp2 cp2 pp2 | ep4 etp2", 32),
    ("pp3 tp2 | ep4", 12), ("cp3 | ep2", 6), ("pp2 | etp4", 8), ("| ep8", 8),
]  # fmt: skip
Call = tuple[tuple[int, ...], str | None]
Build = Callable[[Fold], Any]


def made(fold: Fold, rank: int, build: Build) -> list[Call]:
    """The groups that a rank asks for, with their backends."""
    dist.init_process_group("fake", rank=rank, world_size=fold.world_size, store=FakeStore())
    calls: list[Call] = []
    real = dist.new_group

    def record(ranks: list[int], *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        calls.append((tuple(ranks), backend))
        return real(ranks, *args, **kwargs)

    try:
        with mock.patch.object(dist, "new_group", record):
            build(fold)
    finally:
        forget_groups()
        dist.destroy_process_group()
    return calls


def steps(text: str, world: int, build: Build) -> list[set[Call]]:
    """The groups of every step over all ranks, each of which must partition the world."""
    fold = Fold.parse(text, world)
    calls = [made(fold, rank, build) for rank in range(world)]
    assert len({len(mine) for mine in calls}) == 1, f"ranks make {[len(mine) for mine in calls]} groups"
    found = [set(step) for step in zip(*calls, strict=True)]
    for step in found:
        assert sorted(rank for ranks, _ in step for rank in ranks) == list(range(world)), f"{step} is no partition"
        assert len({backend for _, backend in step}) == 1
    return found


def mesh(fold: Fold, **options: Any) -> FoldedMesh:
    return FoldedMesh(fold, "cpu", **options)


@pytest.mark.parametrize("options", [{}, {"wrap_single": True}, {"replicated": True, "wrap_single": True}])
@pytest.mark.parametrize(("text", "world"), FOLDS)
def test_every_fold(text: str, world: int, options: dict[str, bool]) -> None:
    found = steps(text, world, lambda fold: mesh(fold, **options))
    assert len({frozenset(step) for step in found}) == len(found), "a group is made twice"


@pytest.mark.parametrize(("text", "world", "sizes"), [("| ep8", 16, (4, 2, 3, 6)), ("tp2 | ep4", 24, (6,))])
def test_cuts_by_node(text: str, world: int, sizes: tuple[int, ...]) -> None:
    """Nodes that cut some groups evenly and others not, too; and each size has its own cut."""
    cuts = []

    def build(fold: Fold) -> None:
        folded = mesh(fold)
        cuts.append([folded.cut_by_node("ep", size) for size in sizes])
        assert [folded.cut_by_node("ep", size) for size in sizes] == cuts[-1]

    steps(text, world, build)
    within = [{cut and cut[0].ranks for cut in of_size} for of_size in zip(*cuts, strict=True)]
    for size, groups in zip(sizes, within, strict=True):
        assert all(ranks is None or len({rank // size for rank in ranks}) == 1 for ranks in groups)
    assert within[0] - {None}


@pytest.mark.parametrize(("text", "world"), [("pp2 tp2", 4), ("pp4 tp2", 8), ("pp3 | ep2", 6)])
def test_ends_of_a_pipeline(text: str, world: int) -> None:
    seen: list[tuple[int, ...]] = []
    steps(text, world, lambda fold: seen.append(mesh(fold).ends.ranks))
    for pipeline in Fold.parse(text, world).groups("pp"):
        ends = (pipeline[0], pipeline[-1])
        assert [seen[rank] for rank in pipeline] == [ends if rank in ends else (rank,) for rank in pipeline]


def test_one_fold_after_another() -> None:
    """The groups of an earlier Trainer serve a later one, on all ranks or on none."""
    folds = [Fold.parse(text, 8) for text in ("tp2 | ep4", "pp4 | ep2", "pp2 | ep4", "tp2 | ep4")]

    def build(_: Fold) -> None:
        for fold in folds:
            _ = mesh(fold).ends
        before = dist.distributed_c10d._world.pg_map.copy()
        mesh(folds[0], wrap_single=True)
        assert dist.distributed_c10d._world.pg_map == before

    steps("tp2 | ep4", 8, build)


def model_of(fold: Fold, dense: tuple[int, ...] = (), tied: bool = False) -> None:
    """Parallelises a model without storage, whose tokens go by nodes of two ranks."""
    values = {
        "model_type": "qwen2_moe", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
        "num_experts": 8, "num_experts_per_tok": 2, "mlp_only_layers": list(dense), "tie_word_embeddings": tied,
        "output_router_logits": True,
    }  # fmt: skip
    with deferred_weights(), torch.device("meta"):
        model = MoECausalLM(MoEConfig.from_hf(values))
    for layer in (m for m in model.modules() if isinstance(m, MoELayer)):
        layer.dispatch = DispatchConfig("hierarchical", node_size=2)
    folded = mesh(fold)
    parallelize(model, folded, Settings(), torch.device("meta"))
    root = nn.Module()
    root.model = model
    list(ParameterRegistry(root, folded).unfinished_gradients())


def test_a_stage_without_moe_layers() -> None:
    steps("pp2 | ep4", 8, lambda fold: model_of(fold, dense=(0, 1)))


def test_tied_embeddings_over_three_stages() -> None:
    steps("pp3", 3, lambda fold: model_of(fold, tied=True))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_backends(device: str) -> None:
    """On GPUs, gloo is beside NCCL only where objects or tensors on the CPU travel."""

    def build(fold: Fold) -> None:
        config = "cpu:gloo,cuda:nccl" if device == "cuda" else "cpu:gloo,cuda:gloo"
        with mock.patch.object(dist, "get_backend_config", return_value=config):
            folded = FoldedMesh(fold, device, wrap_single=True)
            _ = folded.ends
            for name in ("tp", "cp", "pp", "dp"):
                axis = folded.axis(name)
                assert axis.group is not None
                backends[axis.ranks] = None

    backends: dict[tuple[int, ...], str | None] = {}
    found = steps("tp2 cp2 pp3 | ep4 etp2", 48, build)
    alone = "nccl" if device == "cuda" else None
    for step in found:
        for ranks, backend in step:
            assert backend == (None if ranks in backends else alone), f"{ranks}: {backend}"
    assert {backend for step in found for _, backend in step} == {None, alone}


def test_a_group_for_objects_is_made_beside_one_that_cannot_carry_them() -> None:
    """A partition that an earlier fold needed for the device alone."""

    def build(_: Fold) -> None:
        with mock.patch.object(dist, "get_backend_config", return_value="cpu:gloo,cuda:nccl"):
            FoldedMesh(Fold.parse("| ep2", 4), "cuda")  # {0, 1}, {2, 3} for experts
            FoldedMesh(Fold.parse("tp2", 4), "cuda")  # and for tp
            FoldedMesh(Fold.parse("| ep2", 4), "cuda")

    found = steps("| ep2", 4, build)
    pairs = [backend for step in found for ranks, backend in step if ranks == (0, 1)]
    assert pairs == ["nccl", None]
