# SPDX-License-Identifier: Apache-2.0
"""The oracle: Hugging Face's code without float32 casts, gradients by finite differences, training step by step."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from lightning_moefold.testing import (
    IGNORE,
    assert_close_by_name,
    canonical,
    hf_reference,
    join_rows,
    make_batches,
    make_checkpoint,
    micro_batches,
    reference_run,
    relative_error,
    routing_margin,
    unpack_documents,
)

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: make_checkpoint(folder / family, family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def checkpoint(checkpoints: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return checkpoints[request.param]


def one_batch(**kwargs: Any) -> dict[str, torch.Tensor]:
    return join_rows(make_batches(1, 2, 2, 12, 96, **kwargs)[0])


def loss_and_grads(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), canonical({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


class RefuseFloat32(TorchDispatchMode):
    """Raises where an operation makes a float32 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float32), func
        return result


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float64_all_the_way(checkpoint: Path, aux: bool, padding: str, attention: str) -> None:
    model = hf_reference(checkpoint, output_router_logits=aux, attn_implementation=attention)
    with RefuseFloat32():
        loss, _ = loss_and_grads(model, one_batch(padding=padding))
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("aux", [False, True])
def test_gradient_agrees_with_finite_differences(checkpoint: Path, aux: bool) -> None:
    model = hf_reference(checkpoint, output_router_logits=aux)
    batch = one_batch(padding="right")
    assert routing_margin(model, batch) > 1e-3
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        exact = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True))
        assert directional_derivative(model, batch, direction) == pytest.approx(exact, rel=1e-7)


def directional_derivative(model: Any, batch: dict[str, torch.Tensor], direction: list[torch.Tensor]) -> float:
    """Differentiates by central differences of fourth order."""
    h = 1e-5
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss_at(step: float) -> float:
        with torch.no_grad():
            for (name, parameter), d in zip(model.named_parameters(), direction, strict=True):
                parameter.copy_(weights[name] + step * d)
            return float(model(**batch, use_cache=False).loss)

    slope = (8 * (loss_at(h) - loss_at(-h)) - (loss_at(2 * h) - loss_at(-2 * h))) / (12 * h)
    loss_at(0.0)
    return slope


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_stock_code_agrees_to_float32(checkpoint: Path, padding: Any, aux: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint, output_router_logits=aux)
    stock = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.float32)
    reference = hf_reference(checkpoint, output_router_logits=aux)
    batch = one_batch(padding=padding)
    loss, grads = loss_and_grads(stock, batch)
    expected_loss, expected_grads = loss_and_grads(reference, batch)
    assert relative_error(loss, expected_loss) < 1e-6
    assert_close_by_name(grads, expected_grads, 1e-4, "float32 gradients")


def test_the_reference_leaves_stock_code_alone(checkpoints: dict[str, Path]) -> None:
    path, batch = checkpoints["qwen2_moe"], one_batch()
    before = loss_and_grads(hf_reference(path, dtype=torch.float32), batch)[0]
    reference = hf_reference(path)
    reference(**batch)
    after = loss_and_grads(hf_reference(path, dtype=torch.float32), batch)[0]
    assert torch.equal(before, after)
    twin = copy.deepcopy(reference)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(twin(**batch).loss.detach()) == pytest.approx(math.log(96), rel=1e-14)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_run_is_the_plain_training_loop(checkpoints: dict[str, Path], optimizer: Any) -> None:
    path = checkpoints["qwen3_moe"]
    batches = make_batches(4, 2, 2, 12, 96, padding="right", ignore="uneven")
    run = reference_run(
        path, batches, accumulate=2, clip=1.0, optimizer=optimizer, config_overrides={"output_router_logits": True}
    )

    model = hf_reference(path, output_router_logits=True).train()
    if optimizer == "adamw":
        update: Any = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        update = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    losses, norms = [], []
    for step in range(2):
        update.zero_grad()
        for batch in batches[2 * step : 2 * step + 2]:
            loss = model(**join_rows(batch), use_cache=False).loss
            (loss / 2).backward()
            losses.append(float(loss.detach()))
        grads = canonical({name: parameter.grad for name, parameter in model.named_parameters()})
        assert_close_by_name(run.grads[step], grads, 1e-12, f"gradients of step {step}")
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        update.step()
    assert run.losses == pytest.approx(losses, rel=1e-13)
    assert run.grad_norms == pytest.approx(norms, rel=1e-13)
    assert min(norms) > 1.0
    assert_close_by_name(run.weights, canonical(model.named_parameters()), 1e-12, "weights")


def test_microbatches_change_the_auxiliary_loss_only(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["mixtral"]
    batches = make_batches(1, 2, 3, 12, 96, ignore="uneven")
    whole, split = (reference_run(path, batches, num_microbatches=m) for m in (1, 2))
    assert split.losses == pytest.approx(whole.losses, rel=1e-13)
    assert_close_by_name(split.grads[0], whole.grads[0], 1e-11, "gradients")

    overrides: dict[str, Any] = {"output_router_logits": True}
    with_aux = reference_run(path, batches, num_microbatches=2, config_overrides=overrides)
    model = hf_reference(path, **overrides)
    parts = micro_batches(batches[0], 2)
    assert [len(part["input_ids"]) for part in parts] == [4, 2]
    assert torch.equal(parts[1]["input_ids"], torch.stack([rank["input_ids"][2] for rank in batches[0]]))
    aux = sum(float(model(**part).aux_loss.detach()) for part in parts) / 2
    assert with_aux.losses[0] == pytest.approx(whole.losses[0] + 0.05 * aux, rel=1e-13)
    assert reference_run(path, batches, num_microbatches=4).losses == pytest.approx(whole.losses, rel=1e-13)
    assert [len(part["input_ids"]) for part in micro_batches(batches[0], 4)] == [2, 2, 2]
    with pytest.raises(ValueError, match="one batch per data rank"):
        reference_run(path, [join_rows(batches[0])], num_microbatches=2)


def test_no_label_gives_zero(checkpoint: Path) -> None:
    run = reference_run(checkpoint, make_batches(1, 2, 2, 8, 96, ignore="all"))
    assert run.losses == [0.0]
    assert run.grad_norms == [0.0]
    assert all(grad is not None and not grad.any() for grad in run.grads[0].values())


def test_documents_are_on_their_own(checkpoints: dict[str, Path]) -> None:
    path, batch = checkpoints["qwen2_moe"], one_batch()
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]).repeat(4, 1)
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2]).repeat(4, 1)
    labels = batch["labels"].masked_fill(positions == 0, IGNORE)
    overrides = {"output_router_logits": True}
    ours = reference_run(path, [{**batch, "document_ids": ids}], config_overrides=overrides)
    theirs = reference_run(path, [{**batch, "labels": labels, "position_ids": positions}], config_overrides=overrides)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-13)
    assert_close_by_name(ours.grads[0], theirs.grads[0], 1e-11, "gradients")
    mask = torch.ones_like(ids).index_fill(1, torch.tensor([0, 11]), 0)
    rows = unpack_documents({**batch, "document_ids": ids, "attention_mask": mask})
    assert rows["attention_mask"].sum(1).tolist() == [2, 6, 2] * 4
    assert torch.equal(rows["input_ids"][2][:2], batch["input_ids"][0][9:11])


def test_loss_weights(checkpoints: dict[str, Path]) -> None:
    path, batch = checkpoints["mixtral"], one_batch(padding="right")
    plain = reference_run(path, [batch])
    constant = torch.full(batch["labels"].shape, 0.25)
    same = reference_run(path, [{**batch, "loss_weights": constant}])
    assert same.losses == pytest.approx(plain.losses, rel=1e-13)
    assert_close_by_name(same.grads[0], plain.grads[0], 1e-11, "gradients")
    first_rank_only = constant.clone()
    first_rank_only[2:] = 0
    masked = {**batch, "labels": batch["labels"].masked_fill(first_rank_only == 0, IGNORE)}
    one = reference_run(path, [{**batch, "loss_weights": first_rank_only}], steps=1)
    assert one.losses == pytest.approx(reference_run(path, [masked]).losses, rel=1e-13)


def test_frozen_parameters_stay(checkpoints: dict[str, Path]) -> None:
    path = checkpoints["mixtral"]
    before = canonical(hf_reference(path).state_dict())
    run = reference_run(path, make_batches(1, 1, 2, 8, 96), frozen=["*.gate_proj", "model.embed_tokens.*"])
    for name, grad in run.grads[0].items():
        fixed = name.endswith(".gate_proj") or "embed_tokens" in name
        assert (grad is None) == fixed
        assert torch.equal(run.weights[name], before[name]) == fixed
    with pytest.raises(ValueError, match="matches no parameter"):
        reference_run(path, make_batches(1, 1, 2, 8, 96), frozen=["*.nothing"])


def test_canonical_names_hold_the_disk_weights(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    disk = load_file(checkpoint / "model.safetensors")
    names = canonical(hf_reference(checkpoint, dtype=torch.float32).state_dict())
    mixtral = json.loads((checkpoint / "config.json").read_text())["model_type"] == "mixtral"
    for ours, old in {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}.items():
        theirs = f"block_sparse_moe.experts.1.{old}" if mixtral else f"mlp.experts.1.{ours}"
        assert torch.equal(names[f"model.layers.0.mlp.experts.{ours}"][1], disk[f"model.layers.0.{theirs}.weight"])
    assert not any("gate_up_proj" in name for name in names)


def test_checkpoints_depend_on_seed_and_name(tmp_path: Path) -> None:
    def weights(folder: str, **kwargs: Any) -> dict[str, torch.Tensor]:
        return hf_reference(make_checkpoint(tmp_path / folder, "qwen3_moe", **kwargs), dtype=torch.float32).state_dict()

    base, deeper, other = weights("a"), weights("b", num_hidden_layers=4, max_shard_size="20KB"), weights("c", seed=1)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists()
    assert all(torch.equal(tensor, deeper[name]) for name, tensor in base.items())
    assert not any(torch.equal(tensor, other[name]) for name, tensor in base.items())
    half = make_checkpoint(tmp_path / "d", "mixtral", dtype=torch.bfloat16, num_experts=6)
    assert json.loads((half / "config.json").read_text())["num_local_experts"] == 6
    with pytest.raises(ValueError, match="has no field hiden_size"):
        make_checkpoint(tmp_path / "e", "mixtral", hiden_size=3)
    with pytest.raises(ValueError, match="unknown family"):
        make_checkpoint(tmp_path / "e", "gpt2")


@pytest.mark.parametrize("padding", ["none", "right", "left"])
def test_batches(padding: Any) -> None:
    def counts(ignore: Any) -> list[list[int]]:
        batches = make_batches(3, 3, 4, 16, 50, padding=padding, ignore=ignore)
        return [[int((rank["labels"][:, 1:] != IGNORE).sum()) for rank in step] for step in batches]

    for step, ranks in enumerate(counts("one_rank_empty")):
        assert [count == 0 for count in ranks] == [rank == step for rank in range(3)]
    assert counts("all") == [[0] * 3] * 3
    assert all(ranks[0] > 2 * ranks[1] > 0 and ranks[2] > 0 for ranks in counts("uneven"))
    first, second = make_batches(1, 2, 4, 16, 50, padding=padding)[0]
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert ("attention_mask" in first) == (padding != "none")
    if padding != "none":
        mask = first["attention_mask"]
        assert mask.all(1).any()
        assert not mask.all()
        assert (first["labels"][mask == 0] == IGNORE).all()
        predicted_by_padding = (first["labels"][:, 1:] != IGNORE) & (mask[:, :-1] == 0)
        assert not predicted_by_padding.any()
        assert bool(mask[:, 0 if padding == "right" else -1].all())
    with pytest.raises(ValueError, match="different lengths"):
        join_rows([first, {key: tensor[:, :3] for key, tensor in second.items()}])


def test_errors_are_told_by_name() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert relative_error(one * 1.5, one) == 0.5
    assert relative_error(zero, zero) == 0.0
    assert relative_error(one, zero) == math.inf
    assert relative_error(one * math.nan, one) == math.inf
    assert_close_by_name({"a": one, "b": None}, {"a": one, "b": None}, 0.0, "same")
    with pytest.raises(AssertionError) as caught:
        assert_close_by_name({"a": one, "c": one, "d": None}, {"a": one * 2, "b": one, "d": one}, 0.1, "gradients")
    lines = str(caught.value).splitlines()
    assert lines[:3] == ["gradients", "missing: b", "extra: c"]
    assert "inf  d" in lines[4]
    assert "5.000e-01  a" in lines[5]
