# SPDX-License-Identifier: Apache-2.0
"""Every fold trains the adapter that PEFT trains on Hugging Face's model in one process (float64, errors below 1e-9)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_moefold import Fold, LoRA, MoECausalLM
from lightning_moefold.balance.fast import ExpertCopies
from lightning_moefold.kernels.noise import hashed, uniform
from lightning_moefold.testing import RankPool, assert_close_by_name, make_batches, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.adapters.made import make_adapter
from tests.balance import plans
from tests.exactness import compare, matrix, runs
from tests.exactness.shapes import SHAPES, checkpoint
from tests.quick import quick

ROW: dict[str, Any] = {
    "family": "qwen2_moe", "shape": "12 experts", "accumulate": 1, "auxiliary": True, "microbatches": 1,
    "uneven rows": False, "padding": "none", "documents": False, "ignore": "uneven", "frozen": "none",
    "sharding": "optimizer", "optimizer": "adamw", "recompute": None, "dispatch": "alltoall", "exchange": None,
    "schedule": "1f1b",
}  # fmt: skip

CASES = [
    ("tp2 | etp2", {"sharding": "none"}),
    ("tp2 | ep2", {"shape": "6 experts, tied", "recompute": "full"}),  # one key/value head: replicated over tp
    ("tp2 | etp2 ep2", {"dispatch": "chunks", "padding": "left"}),
    ("cp2 | etp2 ep2", {"family": "mixtral", "recompute": "selective", "sharding": "full"}),
    (" | ep2", {"family": "qwen3_moe", "shape": "dense layers", "sharding": "full", "accumulate": 2}),
    (" | etp2", {"family": "qwen3_moe", "optimizer": "sgd", "dispatch": "allgather"}),
    ("pp2 | ep2", {"microbatches": 2, "sharding": "none"}),
    ("pp2 tp2 | etp2", {"microbatches": 2, "schedule": "zbv", "family": "qwen3_moe"}),
]
#: DoRA: inputs and outputs cut over tp, and heads that tp does not divide.
DORA = [
    ("tp2 | ep2 etp2", {"shape": "12 experts"}), ("tp4 | ep2", {"shape": "6 experts, tied", "recompute": ("attention",)}),
    ("tp2 pp2 | ep2", {"microbatches": 2, "sharding": "none"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.mark.parametrize(("fold", "factors"), quick(CASES, CASES[2], CASES[7]), ids=[fold for fold, _ in CASES])
def test_folds(pool: RankPool, folder: Path, fold: str, factors: dict[str, Any]) -> None:
    row, parsed = {**ROW, **factors}, Fold.parse(fold, 2 if fold == "tp2 | etp2" else 4)
    base = checkpoint(folder, row["family"], row["shape"], matrix.layers(parsed, row))
    adapter = folder / f"{base.name}-adapter"
    if not adapter.exists():
        make_adapter(adapter, base)
    number = row["accumulate"] * (compare.STEPS - (row["accumulate"] > 1))
    batches = compare.draw_batches(parsed, row, number, SHAPES[row["shape"]].get("vocab_size", 96), length=5)
    compare.check_run(pool, base, parsed, row | {"adapter": str(adapter)}, [], batches)


@pytest.mark.parametrize(("fold", "factors"), quick(DORA, DORA[0]), ids=[fold for fold, _ in DORA])
def test_dora(pool: RankPool, folder: Path, fold: str, factors: dict[str, Any]) -> None:
    row, parsed = {**ROW, **factors}, Fold.parse(fold, 4)
    base = checkpoint(folder, row["family"], row["shape"], matrix.layers(parsed, row))
    adapter = folder / f"{base.name}-dora"
    if not adapter.exists():
        make_adapter(adapter, base, use_dora=True, target_parameters=None, rank_pattern={})
    batches = compare.draw_batches(parsed, row, compare.STEPS, SHAPES[row["shape"]].get("vocab_size", 96), length=5)
    compare.check_run(pool, base, parsed, row | {"adapter": str(adapter)}, [], batches)


# ---- dropout: our own oracle, since PEFT draws from one generator ----------------------------------------------------


@pytest.fixture(scope="module")
def dropping(folder: Path) -> tuple[Path, Path]:
    """A model with one key/value head, and an adapter of its attention with dropout and DoRA."""
    base = checkpoint(folder, "qwen2_moe", "6 experts, tied")
    path = folder / "dropping"
    fields = {"use_dora": True, "target_parameters": None, "rank_pattern": {}}
    return base, make_adapter(path, base, lora_dropout=0.3, **fields)


def test_what_is_dropped(dropping: tuple[Path, Path]) -> None:
    """Token by token as one would write it down; another call drops others, and evaluation none."""
    model = MoECausalLM.from_pretrained(dropping[0], torch.float64, output_router_logits=True)
    model.load_adapter(dropping[1])
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model.model.layers["0"].self_attn.o_proj
    layer.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out.detach())))
    ids = torch.randint(1, 96, (2, 4), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    model.eval()(ids, labels=ids)
    weight, a, b, length = (p.detach() for p in (layer.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude))
    norm = (weight + layer.lora_scale * b @ a).norm(dim=1)
    dropped = []
    for call, (x, y) in enumerate(seen):
        for token in range(8):
            key = hashed(layer._lora_key, call, token // 4, token % 4)
            kept = uniform(key.view(1), x.shape[1], torch.float32)[0] >= 0.3
            d = x[token] if call == 2 else torch.where(kept, x[token] / 0.7, 0.0)
            merged = weight @ d + layer.lora_scale * b @ (a @ d)
            expected = weight @ x[token] + merged * length / norm - weight @ d
            torch.testing.assert_close(y[token], expected, rtol=1e-9, atol=1e-9)
            dropped.append((~kept).double().mean())
    assert 0.2 < float(torch.stack(dropped).mean()) < 0.4
    assert not torch.equal(seen[0][1], seen[1][1])


FOLDS = ["tp2 | ep2 etp2", "cp2 tp2 | ep2", "| ep2", "pp2 | etp2"]


@pytest.mark.parametrize("recompute", quick([None, "full", ["attention", "norm"]], None))
def test_dropout_is_the_same_under_every_fold(pool: RankPool, dropping: tuple[Path, Path], recompute: Any) -> None:
    base, adapter = dropping
    rows = make_batches(
        3, 1, 8, 7, 96, seed=3
    )  # two a data rank: as many as micro-batches, whose auxiliary loss they share
    spec = {"overrides": {"output_router_logits": True}, "adapter": str(adapter), "clip": 0.5, "num_microbatches": 2}
    whole: dict[int, Any] = {}
    for fold in FOLDS:
        parsed = Fold.parse(fold, 4)
        # Rows are dealt in turn, so that a row has the same number; the auxiliary loss is of micro-batches of equal rows.
        batches = [[{k: v[d :: parsed.dp] for k, v in step[0].items()} for d in range(parsed.dp)] for step in rows]
        found = pool.run(runs.train, str(base), fold, batches, {**spec, "recompute": recompute}, ranks=4)
        if parsed.dp not in whole:
            whole[parsed.dp] = pool.run(runs.train, str(base), "", _joined(batches), spec, ranks=1)
        [alone] = whole[parsed.dp]
        assert found[0].losses == pytest.approx(alone.losses, rel=1e-9)
        assert_close_by_name(assemble(run.weights for run in found), assemble([alone.weights]), 1e-9, fold)


def test_what_experts_drop(folder: Path) -> None:
    """Token by token and expert by expert; evaluation drops nothing, and another call other inputs."""
    base = checkpoint(folder, "mixtral", "12 experts")
    model = MoECausalLM.from_pretrained(base, torch.float64, output_router_logits=True)
    model.add_adapter(LoRA(rank=3, targets=["experts"], dropout=0.3))
    layer, generator = model.model.layers["1"].mlp, torch.Generator().manual_seed(0)
    experts = layer.experts
    for name in ("gate_lora_B", "up_lora_B", "down_lora_B"):
        part = getattr(experts, name)
        part.data.copy_(torch.randn(part.shape, generator=generator))
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda m, args, out: seen.append((args[0].detach(), out[0].detach())))
    ids = torch.randint(1, 96, (2, 4), generator=generator)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
    model.eval()(ids, labels=ids)
    for call, (x, y) in enumerate(seen):
        routed = layer.gate(x)
        for token in range(8):
            number = hashed(experts._lora_key, call, token // 4, token % 4).view(1) & ~0x4000400040004000
            total = torch.zeros(x.shape[1], dtype=torch.float64)
            for weight, e in zip(routed.weight_TK[token], routed.expert_TK[token], strict=True):

                def drop(v: Tensor, which: int, number: Tensor = number, call: int = call) -> Tensor:
                    kept = uniform(hashed(number, which), len(v), torch.float32)[0] >= 0.3
                    return v if call == 2 else torch.where(kept, v / 0.7, 0.0)

                s, p = experts.lora_scale, {n: q.detach()[e] for n, q in experts.named_parameters()}
                z = s * p["gate_up_lora_A"] @ drop(x[token], 1)
                gate, up = (p[f"{n}_proj"] @ x[token] + p[f"{n}_lora_B"] @ z for n in ("gate", "up"))
                inner = torch.nn.functional.silu(gate) * up
                v = s * p["down_lora_A"] @ drop(inner, 2)
                total += weight.detach() * (p["down_proj"] @ inner + p["down_lora_B"] @ v)
            torch.testing.assert_close(y[token], total, rtol=1e-9, atol=1e-9)
    assert not torch.equal(seen[0][1], seen[1][1])


EXPERT_FOLDS = [
    ("tp2 | ep2 etp2", {"dispatch": {"dispatch_chunks": 2}}),
    ("cp2 tp2 | ep4", {"dispatch": {"dispatcher": "deduplicated"}, "recompute": "full"}),
    ("| ep2", {"dispatch": {"dispatcher": "allgather"}, "sharding": "full", "recompute": ["expert_activation"]}),
    ("pp2 | etp2", {"overrides": {"quantize": "int8"}}),
    ("pp2 | ep2", {"pipeline": {"pipeline_schedule": "zbv", "num_stages_per_rank": 2}}),  # drops in a split backward
    ("| ep4", {"dispatch": {"expert_copies": ExpertCopies(plans.drawn, 3)}, "overrides": {"quantize": "int8"}}),
]


@pytest.mark.parametrize(("fold", "more"), quick(EXPERT_FOLDS, EXPERT_FOLDS[0]), ids=[f for f, _ in EXPERT_FOLDS])
def test_experts_drop_the_same_under_every_fold(pool: RankPool, folder: Path, fold: str, more: dict[str, Any]) -> None:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 64, "num_experts": 12}
    layers, parsed = 4 if "pipeline" in more else 2, Fold.parse(fold, 4)
    base = folder / f"wide-{layers}"
    if not base.exists():
        make_checkpoint(base, "qwen2_moe", num_hidden_layers=layers, **sizes)
    rows = make_batches(3, 1, 8, 7, 96, seed=3)
    lora = {"rank": 3, "targets": ["experts", "q_proj"], "dropout": 0.3}
    overrides = {"output_router_logits": True, **more.get("overrides", {})}
    spec = {"lora": lora, "clip": 0.5, "num_microbatches": 2, "overrides": overrides}
    batches = [[{k: v[d :: parsed.dp] for k, v in step[0].items()} for d in range(parsed.dp)] for step in rows]
    found = pool.run(runs.train, str(base), fold, batches, spec | more | {"overrides": overrides}, ranks=4)
    assert ("expert_copies" in more.get("dispatch", {})) == (found[0].copies > 0)
    [alone] = pool.run(runs.train, str(base), "", _joined(batches), spec, ranks=1)
    assert found[0].losses == pytest.approx(alone.losses, rel=1e-9)
    for step, grads in enumerate(alone.grads):
        assert_close_by_name(assemble(run.grads[step] for run in found), assemble([grads]), 1e-9, f"{fold}, {step}")
    assert_close_by_name(assemble(run.weights for run in found), assemble([alone.weights]), 1e-9, fold)


def _joined(batches: list[list[dict[str, Tensor]]]) -> list[list[dict[str, Tensor]]]:
    """The rows of all data ranks in turn, as one rank holds them: row b of rank r of R is number b * R + r."""
    return [[{k: torch.stack([rank[k] for rank in step], dim=1).flatten(0, 1) for k in step[0]}] for step in batches]
