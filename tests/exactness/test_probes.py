# SPDX-License-Identifier: Apache-2.0
"""Probes under every fold: sums of 2 ** rank, the norm of ones, tokens that come back."""

from __future__ import annotations

import math

import pytest

from lightning_moefold import Fold, MoEConfig
from lightning_moefold.models.names import parameter_entries
from lightning_moefold.testing import RankPool, make_checkpoint
from tests.exactness import jobs_probes
from tests.quick import quick

SHARDINGS = ("optimizer", "full", "none")

#: Dense weights that are cut over tp. Of the others each tp rank has a part of the gradient.
CUT = ("q_proj", "k_proj", "v_proj", "o_proj", "shared_expert.", "embed_tokens", "lm_head")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Checkpoints by their number of layers."""
    folder = tmp_path_factory.mktemp("probed")
    return {
        layers: str(make_checkpoint(
            folder / f"{layers}", "qwen2_moe", num_experts=8, num_hidden_layers=layers, moe_intermediate_size=8,
            hidden_size=16, num_attention_heads=8, num_key_value_heads=4,
        ))
        for layers in (2, 4, 8)
    }  # fmt: skip


def _members(fold: Fold, name: str, rank: int) -> list[int]:
    """The ranks whose gradients of a weight belong together."""
    if ".experts." in name:
        summed = next(g for g in fold.groups("edp") if rank in g)
        if name.endswith(("gate_up_lora_A", "down_lora_B")):  # without a width, which is what etp cuts
            summed = [r for g in fold.groups("etp") if set(g) & set(summed) for r in g]
        return sorted(summed)
    summed = next(g for g in fold.groups("dp_cp") if rank in g)
    cut = any(part in name for part in CUT)
    if "lora_" in name:  # of an adapter, what lies at the dimension that is cut
        cut = cut and name.endswith("lora_A") == ("o_proj" in name or "down_proj" in name)
    if not cut or (
        fold.tp == 8 and ("k_proj" in name or "v_proj" in name)
    ):  # four key/value heads are not cut over eight
        summed = [r for g in fold.groups("tp") if set(g) & set(summed) for r in g]
    return sorted(summed)


def _check(pool: RankPool, paths: dict[int, str], folds: list[Fold]) -> None:
    shardings = [SHARDINGS[i % 3] for i in range(len(folds))]
    world = folds[0].world_size
    chosen = [paths[max(2, fold.pp)] for fold in folds]
    outcome = pool.run(jobs_probes.probe, chosen, [str(f) for f in folds], shardings, ranks=world, timeout=600)
    for i, (fold, sharding) in enumerate(zip(folds, shardings, strict=True)):
        what = f"{fold}, sharding {sharding}"
        for rank in range(world):
            found = outcome[rank][i]
            for name, value in found.powers.items():
                summed = [r for r in range(world + 1) if int(value) >> r & 1]
                assert value == sum(2.0**r for r in summed), f"{name} on rank {rank} of {what} holds {value}"
                assert summed == _members(fold, name, rank), f"{name} on rank {rank} of {what}: summed over {summed}"
            assert found.norm == pytest.approx(math.sqrt(found.parameters), rel=1e-12), what
            assert found.clipped == pytest.approx(1.0, rel=1e-6), what
            assert found.identity < 1e-12, what
        names = {*parameter_entries(MoEConfig.from_pretrained(chosen[i])), *outcome[0][i].adapter}
        assert set().union(*(outcome[rank][i].powers for rank in range(world))) == names, what


@pytest.mark.parametrize("part", quick(range(4), 1))
def test_every_fold_of_four(pool: RankPool, paths: dict[int, str], part: int) -> None:
    _check(pool, paths, list(Fold.enumerate(4))[part::4])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
def test_every_fold_of_eight(pool: RankPool, paths: dict[int, str], part: int) -> None:
    _check(pool, paths, list(Fold.enumerate(8))[part::12])
