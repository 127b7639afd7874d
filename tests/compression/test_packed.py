# SPDX-License-Identifier: Apache-2.0
"""A packed model is the zeroed one, in training too: what is zero in all three projections has no gradient."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from lightning_moefold import Fold, FoldError, MoECausalLM, MoEConfig
from lightning_moefold.compression.analysis import analyze
from lightning_moefold.compression.pruning import Pruned, prune, unpack
from lightning_moefold.errors import ConfigError, InputError
from lightning_moefold.modules import MoELayer
from lightning_moefold.testing import (
    RankPool,
    assert_close_by_name,
    hf_reference,
    make_batches,
    make_checkpoint,
    reference_run,
    verify,
)  # fmt: skip
from lightning_moefold.testing.pieces import assemble
from tests.compression.jobs_packed import OVERRIDES, train_in_two_runs, train_packed
from tests.compression.naive import calibration_rows
from tests.compression.test_analysis import EXACT
from tests.compression.test_pruning import logits_of, ours
from tests.quick import quick


def both_forms(folder: Path, family: str) -> Pruned:
    """Writes ``model``, and ``zeroed`` and ``packed``; some experts have no channel left: in Mixtral those of a rank of ep2."""
    path, ratio, empty = make_checkpoint(folder / "model", family), 0.4, [1]
    if family == "mixtral":
        ratio, empty = 0.6, [2, 3]
    energies = analyze(path, calibration_rows(), EXACT)
    energies.energy[:, empty] = 0
    prune(path, energies, folder / "zeroed", ratio)
    pruned = prune(path, energies, folder / "packed", ratio, "packed")
    for kept in pruned.kept.values():
        assert not kept.widths_E[empty].any()
        assert len(set(kept.widths_E.tolist())) > 2
    return pruned


@pytest.mark.parametrize("family", quick(["mixtral", "qwen2_moe", "qwen3_moe"], "qwen2_moe"))
def test_packed_computes_what_zeroed_computes(tmp_path: Path, family: str) -> None:
    pruned = both_forms(tmp_path, family)
    expected = logits_of(hf_reference(tmp_path / "zeroed"))
    torch.testing.assert_close(ours(tmp_path / "packed"), expected, rtol=0, atol=1e-10)
    sizes = [sum(file.stat().st_size for file in (tmp_path / n).glob("*.safetensors")) for n in ("zeroed", "packed")]
    gone = pruned.parameters[0] - pruned.parameters[1]
    assert abs(sizes[0] - sizes[1] - 4 * gone) < 4096  # headers of files differ
    assert (
        MoEConfig.from_pretrained(tmp_path / "packed", output_router_logits=True).num_parameters()
        == pruned.parameters[1]
    )
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    torch.testing.assert_close(logits_of(hf_reference(tmp_path / "unpacked")), expected, rtol=0, atol=1e-11)
    MoECausalLM.from_pretrained(tmp_path / "packed", **OVERRIDES).save_pretrained(tmp_path / "again")
    read = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "again")]
    assert read[0] == read[1]
    torch.testing.assert_close(ours(tmp_path / "again"), expected, rtol=0, atol=1e-10)


def in_packed_form(tensors: dict[str, Tensor | None], pruned: Pruned) -> dict[str, Tensor]:
    """The parts of a zeroed model's tensors that a packed one has."""
    found = {}
    for name, tensor in tensors.items():
        assert tensor is not None
        if ".experts." in name or ".shared_expert." in name:
            kept = pruned.kept[int(name.split(".")[2])]
            mask = torch.from_numpy(kept.routed_EF if ".experts." in name else kept.shared_S)
            if "down_proj" in name:
                tensor = tensor.transpose(-1, -2)[mask]
                tensor = tensor if ".experts." in name else tensor.t()
            else:
                tensor = tensor[mask]
        found[name] = tensor
    return found


def assert_same_run(records: list[Any], zeroed: Path, batches: Any, pruned: Pruned, microbatches: int = 1) -> None:
    expected = reference_run(
        zeroed, batches, lr=1e-3, clip=0.5, config_overrides=OVERRIDES, num_microbatches=microbatches
    )
    for record in records:
        np.testing.assert_allclose(record.losses, expected.losses, rtol=1e-9)
        np.testing.assert_allclose(record.norms, expected.grad_norms, rtol=1e-9)
    for step, grads in enumerate(expected.grads):
        assert_close_by_name(assemble(r.grads[step] for r in records), in_packed_form(grads, pruned), 1e-9, "gradients")
    assert_close_by_name(
        assemble(r.weights for r in records), in_packed_form(expected.weights, pruned), 1e-9, "weights"
    )


CASES = [
    {"fold": "| ep4"},
    {"fold": "tp2 | ep2"},
    {"fold": "tp2 cp2 | ep4", "data_parallel_sharding": "full"},
    {"fold": "pp2 | ep2", "num_microbatches": 2},
    {"fold": "tp4", "data_parallel_sharding": "none"},
    {"fold": "| ep2", "dispatch_chunks": 2, "recompute": "full"},
    {"fold": "| ep4", "dispatcher": "allgather"},
    {"fold": "tp2 | ep2", "recompute": ["expert_activation"]},
    {
        "fold": "| ep2",
        "expert_kernel": "grouped_mm",
        "recompute": ["expert_activation"],
        "data_parallel_sharding": "full",
    },
    {"fold": "pp2 | ep2", "expert_kernel": "grouped_mm", "dispatch_chunks": 2, "num_microbatches": 2},
]


SOME, OTHERS = (0, 1, 3, 8), (2, 4, 5, 6, 7, 9)


@pytest.mark.parametrize(
    ("family", "chosen"), quick([("qwen2_moe", SOME), ("qwen2_moe", OTHERS), ("mixtral", SOME)], ("qwen2_moe", SOME))
)
def test_training_is_the_same_under_every_fold(
    pool: RankPool, tmp_path: Path, family: str, chosen: tuple[int, ...]
) -> None:
    """With an ep rank that holds no channel, uneven widths over tp, edp > 1, and experts in buckets."""
    pruned, cases = both_forms(tmp_path, family), []
    for case in (CASES[number] for number in chosen):
        rows = 2 * case.get("num_microbatches", 1)
        data = Fold.parse(case["fold"], 4).dp
        cases.append((case, make_batches(2, data, rows, 12, 96, seed=1, padding="right", ignore="uneven")))
    records = pool.run(train_packed, cases, str(tmp_path / "packed"), ranks=4)
    for number, (case, batches) in enumerate(cases):
        of_case = [record[number] for record in records]
        assert_same_run(of_case, tmp_path / "zeroed", batches, pruned, case.get("num_microbatches", 1))


@pytest.mark.more
def test_a_checkpoint_goes_on_under_another_fold(pool: RankPool, tmp_path: Path) -> None:
    pruned = both_forms(tmp_path, "qwen2_moe")
    batches = make_batches(2, 2, 2, 12, 96, seed=1)
    folds = ("tp2 | ep4", "cp2 | ep2")
    records = pool.run(train_in_two_runs, str(tmp_path / "packed"), folds, batches, str(tmp_path), ranks=4)
    assert_same_run(records, tmp_path / "zeroed", batches, pruned)
    saved = dict(MoECausalLM.from_pretrained(tmp_path / "saved", torch.float64, **OVERRIDES).named_parameters())
    weights = assemble(r.weights for r in records)
    assert_close_by_name(saved, {name: tensor.float() for name, tensor in weights.items()}, 1e-6, "saved weights")


def test_what_a_packed_model_cannot_is_refused(tmp_path: Path) -> None:
    both_forms(tmp_path, "mixtral")
    path = tmp_path / "packed"
    config = MoEConfig.from_pretrained(path, **OVERRIDES)
    with pytest.raises(FoldError, match="etp=2 would cut experts of uneven widths, which stay whole; use etp=1"):
        Fold.parse("| etp2", 2).validate(config)
    assert all(fold.etp == 1 for fold in Fold.enumerate(4, config))
    with pytest.raises(ValueError, match="moefold_packed"):
        AutoConfig.from_pretrained(path)
    with pytest.raises(InputError, match="is packed already; moefold camera unpack"):
        analyze(path, calibration_rows(), EXACT)
    with pytest.raises(InputError, match="is not packed, so there is nothing to unpack"):
        unpack(tmp_path / "zeroed", tmp_path / "out")
    with pytest.raises(ConfigError, match="is packed, which transformers does not know"):
        verify(path, "| ep2", 2)
    with pytest.raises(InputError, match="'experts'|can be"):
        MoECausalLM.from_pretrained(path, **OVERRIDES).add_adapter({"targets": ["experts"]})
    raw = json.loads((path / "config.json").read_text())
    for fields, message in (
        ({"expert_widths": [[1, 2, 3, 4]]}, "must hold 4 widths for each of the 2 layers"),
        ({"expert_widths": [[1, -2, 3, 4]] * 2}, "must be 0 or more"),
        ({"expert_widths": 3}, "lacks a list of widths"),
    ):
        with pytest.raises(ConfigError, match=message):
            MoEConfig.from_hf(raw | fields)
    layer = MoELayer(8, 2, 1, (3, 0))
    assert layer(torch.randn(5, 8)).shape == (5, 8)
    with pytest.raises(InputError, match="holds 3 widths for num_experts=2"):
        MoELayer(8, 2, 1, (3, 0, 1))
