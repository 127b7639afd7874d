# SPDX-License-Identifier: Apache-2.0
"""A base in bfloat16 under an adapter in float32: what is stored, what is computed, and what is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lightning_moefold import Fold, LoRA, MoECausalLM
from lightning_moefold.adapters.attach import is_adapter
from lightning_moefold.errors import InputError
from lightning_moefold.testing import RankError, RankPool, hf_reference, make_checkpoint
from tests.adapters import jobs
from tests.adapters.made import make_adapter
from tests.exactness import compare, matrix
from tests.exactness.shapes import SHAPES, checkpoint

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose numbers are those of bfloat16, and an adapter of all that can have one."""
    folder = tmp_path_factory.mktemp("narrow")
    base = make_checkpoint(folder / "base", "qwen2_moe", dtype=BF16)
    return base, make_adapter(folder / "adapter", base)


def test_products_are_in_bfloat16_and_what_trains_in_float32(made: tuple[Path, Path]) -> None:
    """The oracle has its adapter in bfloat16, with the same numbers: losses and gradients have the same bits."""
    model, narrow = (MoECausalLM.from_pretrained(made[0], BF16, output_router_logits=True) for _ in range(2))
    for one in (model, narrow):
        one.load_adapter(made[1])
    for (name, p), (_, q) in zip(model.named_parameters(), narrow.named_parameters(), strict=True):
        assert p.dtype == (torch.float32 if is_adapter(name) else BF16), name
        if is_adapter(name) and ".gate.lora" not in name:  # a router computes in float32
            p.data.copy_(p.data.to(BF16))
            q.data = p.data.to(BF16)
    ids = torch.randint(1, 96, (2, 6), generator=torch.Generator().manual_seed(0))
    losses = [one(ids, labels=ids).loss for one in (model, narrow)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == losses[1].item()
    for (name, p), (_, q) in zip(model.named_parameters(), narrow.named_parameters(), strict=True):
        if is_adapter(name):
            assert p.grad is not None
            assert q.grad is not None
            assert p.grad.dtype == torch.float32
            assert p.grad.any(), name
            torch.testing.assert_close(p.grad, q.grad.float(), rtol=0, atol=0)


def test_dtypes_and_files(made: tuple[Path, Path], tmp_path: Path) -> None:
    model = MoECausalLM.from_pretrained(made[0], BF16)
    model.load_adapter(made[1])
    model.save_adapter(tmp_path / "again")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "again", made[1]))
    assert ours.keys() == theirs.keys()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    PeftModel.from_pretrained(hf_reference(made[0], dtype=BF16), tmp_path / "again")
    model.save_pretrained(tmp_path / "merged")
    q = model.model.layers["1"].self_attn.q_proj
    expected = torch.addmm(q.weight.double(), q.lora_B.double(), q.lora_A.double(), alpha=q.lora_scale).to(BF16)
    merged = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    torch.testing.assert_close(merged, expected, rtol=0, atol=0)
    model.to(torch.float16)
    assert {p.dtype for n, p in model.named_parameters() if is_adapter(n)} == {torch.float32}
    model.double().save_adapter(tmp_path / "wide")
    assert {t.dtype for t in load_file(tmp_path / "wide" / "adapter_model.safetensors").values()} == {torch.float64}


def test_a_base_that_trains_in_another_dtype_is_refused(made: tuple[Path, Path]) -> None:
    model = MoECausalLM.from_pretrained(made[0], BF16)
    model.add_adapter(LoRA(rank=2))
    model.model.norm.weight.requires_grad_(True)
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(
        InputError, match="'model.norm.weight' of the base trains in bfloat16 beside an adapter in float32"
    ):
        model(ids, labels=ids)


def test_gathered_weights_are_not_taken_for_another_dtype(made: tuple[Path, Path]) -> None:
    """In bf16-mixed FSDP2 shows weights in bfloat16 after the first forward of a step; a second one was refused."""
    model = MoECausalLM.from_pretrained(made[0], torch.float32)
    model.add_adapter(LoRA(rank=2))
    weight = model.model.norm.weight.requires_grad_(True)
    model.compute_dtype, weight.data = BF16, weight.data.to(BF16)
    assert model.adapter is not None
    model.adapter.check_trained(model)
    model.compute_dtype = None
    with pytest.raises(InputError, match="trains in bfloat16 beside an adapter in float32"):
        model.adapter.check_trained(model)


ROW = {
    "family": "qwen2_moe", "shape": "12 experts", "accumulate": 1, "auxiliary": True, "microbatches": 1,
    "uneven rows": False, "padding": "none", "documents": False, "ignore": "uneven", "frozen": "none",
    "sharding": "optimizer", "optimizer": "adamw", "recompute": None, "dispatch": "alltoall", "exchange": None,
    "schedule": "1f1b", "storage": BF16,
}  # fmt: skip
CASES = [
    ("tp2 | ep2", {"sharding": "full"}),
    ("tp2 | etp2 ep2", {"sharding": "none"}),
    ("| ep2", {"accumulate": 2, "shape": "6 experts, tied"}),
    ("cp2 | etp2", {"family": "mixtral", "recompute": "full", "sharding": "full"}),
    ("pp2 tp2 | etp2", {"microbatches": 2, "schedule": "zbv", "family": "qwen3_moe"}),
]


MARKED = [
    CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:4]), pytest.param(*CASES[4], marks=pytest.mark.more)
]  # fmt: skip


@pytest.mark.parametrize(("fold", "factors"), MARKED, ids=[fold for fold, _ in CASES])
def test_folds(pool: RankPool, tmp_path: Path, fold: str, factors: dict[str, object]) -> None:
    """Stored in bfloat16 and computed in float64 under every fold, as PEFT computes with the same numbers in float64."""
    row, parsed = {**ROW, **factors}, Fold.parse(fold, 4)
    whole = checkpoint(tmp_path, row["family"], row["shape"], matrix.layers(parsed, row))
    base = tmp_path / "rounded"
    MoECausalLM.from_pretrained(whole, BF16).save_pretrained(base)
    adapter = make_adapter(tmp_path / "adapter", base)
    number = row["accumulate"] * (compare.STEPS - (row["accumulate"] > 1))
    batches = compare.draw_batches(parsed, row, number, SHAPES[row["shape"]].get("vocab_size", 96), length=5)
    compare.check_run(pool, base, parsed, row | {"adapter": str(adapter)}, [], batches)


@pytest.mark.more
def test_runs(pool: RankPool, made: tuple[Path, Path]) -> None:
    """``bf16-true`` with an adapter is ``bf16-mixed`` with a base that takes half the memory."""
    path, lora = str(made[0]), {"rank": 4, "targets": ["q_proj", "gate", "experts", "down_proj"]}
    mixed, true = (
        pool.run(jobs.fit, path, "| ep2", lora, precision, ranks=2) for precision in ("bf16-mixed", "bf16-true")
    )
    for (losses, _, _), (theirs, dtypes, _) in zip(mixed, true, strict=True):
        assert theirs == losses
        assert dtypes == {"router": torch.float32, "attention": torch.float32}
    with pytest.raises(RankError, match="beside an adapter in float32"):
        pool.run(jobs.fit, path, "| ep2", lora, "bf16-true", "model.norm.weight", ranks=2)


def test_a_stage_that_cannot_train_lets_all_know(pool: RankPool, made: tuple[Path, Path]) -> None:
    """Only the last stage holds the parameter; the others waited for it, and a run said nothing on its first rank."""
    for before, after in pool.run(jobs.thaw, str(made[0]), "pp2", ranks=2):
        assert "'model.norm.weight' of the base trains in bfloat16 beside an adapter in float32" in before
        assert after == "no error"
