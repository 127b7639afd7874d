# SPDX-License-Identifier: Apache-2.0
"""Laws of folds, for random sizes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_moefold import Fold, FoldError, MoEConfig
from lightning_moefold import errors as errors_module
from lightning_moefold import fold as fold_module
from lightning_moefold.fold import AXES, JOINT_AXES, divisors


@st.composite
def folds(draw: st.DrawFn, most: int = 48) -> Fold:
    world = draw(st.integers(1, most))
    pp = draw(st.sampled_from(divisors(world)))
    stage = world // pp
    sizes = []
    for _ in range(2):
        inner = draw(st.sampled_from(divisors(stage)))
        sizes += [inner, draw(st.sampled_from(divisors(stage // inner)))]
    tp, cp, etp, ep = sizes
    return Fold(world, tp, cp, pp, ep, etp)


@given(folds())
@settings(max_examples=200, deadline=None)
def test_laws(fold: Fold) -> None:
    ranks = list(range(fold.world_size))
    assert fold.tp * fold.cp * fold.dp == fold.etp * fold.ep * fold.edp == fold.world_size // fold.pp
    for axis in (*AXES, *JOINT_AXES):
        groups = fold.groups(axis)
        assert sorted(r for group in groups for r in group) == ranks, axis
        assert {len(group) for group in groups} == {fold.size(axis)}, axis
        assert all(group == sorted(group) for group in groups), axis
    # A stage is the same ranks for both mappings, and a pipeline group has one rank of each.
    stage = fold.world_size // fold.pp
    for group in fold.groups("pp"):
        assert [r // stage for r in group] == list(range(fold.pp))
    assert all(
        len({r // stage for r in group}) == 1
        for a in ("tp", "cp", "dp", "ep", "etp", "edp")
        for group in fold.groups(a)
    )


@given(folds())
@settings(max_examples=100, deadline=None)
def test_coordinates(fold: Fold) -> None:
    for rank in range(fold.world_size):
        at = fold.coordinates(rank)
        assert ((at["pp"] * fold.dp + at["dp"]) * fold.cp + at["cp"]) * fold.tp + at["tp"] == rank
        assert ((at["pp"] * fold.edp + at["edp"]) * fold.ep + at["ep"]) * fold.etp + at["etp"] == rank
        for axis in AXES:  # the place in a group is the coordinate
            group = next(g for g in fold.groups(axis) if rank in g)
            assert group.index(rank) == at[axis]
    for rank in (-1, fold.world_size):
        with pytest.raises(FoldError, match="ranks run from"):
            fold.coordinates(rank)


@given(folds())
@settings(max_examples=100, deadline=None)
def test_text(fold: Fold) -> None:
    assert Fold.parse(str(fold), fold.world_size) == fold
    assert Fold.parse(str(fold).replace("|", "").upper(), fold.world_size) == fold
    table = fold.table()
    assert str(fold) in table
    assert len(table.splitlines()) > fold.world_size


@pytest.mark.parametrize("world", [1, 2, 4, 6, 8, 12])
def test_enumerate_gives_each_legal_fold_once(world: int) -> None:
    found = list(Fold.enumerate(world))
    assert len(set(found)) == len(found)
    legal = set()
    sizes = range(1, world + 1)
    for tp in sizes:
        for cp in sizes:
            for pp in sizes:
                for ep in sizes:
                    for etp in sizes:
                        try:
                            legal.add(Fold(world, tp, cp, pp, ep, etp))
                        except FoldError:
                            continue
    assert set(found) == legal


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tp3", "tensor_parallel_size in 1,2,4,8|tensor_parallel_size=3 .* use"),
        ("tp2 tp2", "twice"),
        ("tp2 dp3", "leave dp out"),
        ("zp2", "write it like"),
        ("tp", "write it like"),
        ("tp0", "positive"),
        ("pp3", "pipeline_parallel_size in 1,2,4,8"),
        ("ep4 etp4", "expert_parallel_size in 1,2|use"),
        ("tp-2", "write it like"),
    ],
)
def test_illegal_text(text: str, message: str) -> None:
    with pytest.raises(FoldError, match=message) as raised:
        Fold.parse(text, 8)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "2", None])
def test_sizes_are_positive_integers(size: object) -> None:
    with pytest.raises(FoldError, match="positive integer"):
        Fold(8, tensor_parallel_size=size)  # type: ignore[arg-type]


def _config(**changes: object) -> MoEConfig:
    raw = {
        "model_type": "qwen2_moe", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20, "intermediate_size": 20,
    }  # fmt: skip
    return MoEConfig.from_hf({**raw, **changes})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"expert_parallel_size": 8}, "num_experts=60 .*ep=8; use ep in 1,2,3,4,5,6,10,12,15"),
        ({"expert_tensor_parallel_size": 16}, "moe_intermediate_size=24 .*etp=16; use etp in 1,2,3,4,6,8,12,24"),
        ({"tensor_parallel_size": 8}, "shared_expert_intermediate_size=20 .*tp=8; use tp in 1,2,4,5,10"),
        ({"pipeline_parallel_size": 4}, "pp=4 .*use pp <= 2"),
    ],
)
def test_a_fold_must_suit_the_model(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(FoldError, match=message):
        Fold(16, **sizes).validate(_config())


def test_a_head_is_never_cut() -> None:
    with pytest.raises(FoldError, match="use tp <= 4"):
        Fold(8, tensor_parallel_size=8).validate(_config(shared_expert_intermediate_size=16))


def test_enumerate_for_a_model() -> None:
    config = _config()
    for fold in Fold.enumerate(8, config):
        fold.validate(config)
    assert {f.ep for f in Fold.enumerate(8, config)} == {1, 2, 4}


def test_ground_floor_imports_no_torch() -> None:
    for module in (fold_module, errors_module):
        tree = ast.parse(Path(module.__file__).read_text())
        imports = {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
        imports |= {n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)}
        known = {"lightning_moefold.errors"}
        assert not {
            name for name in imports - known if name.split(".")[0] in ("torch", "lightning", "lightning_moefold")
        }


def test_the_first_fold_that_the_ranks_can_form() -> None:
    texts = ["tp2 | ep4", "| ep2"]
    assert Fold.first(texts, 4) == Fold.parse("tp2 | ep4", 4)
    assert Fold.first(texts, 2) == Fold.parse("| ep2", 2)
    with pytest.raises(FoldError, match=r"3 ranks can form none of the folds: 'tp2 \| ep4': .* '\| ep2': "):
        Fold.first(texts, 3)
