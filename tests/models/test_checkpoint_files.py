# SPDX-License-Identifier: Apache-2.0
"""Files of a checkpoint: all that is in them is read as transformers reads it, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_moefold import MoECausalLM
from lightning_moefold.checkpoint import CheckpointError
from lightning_moefold.testing import RankPool, hf_reference, make_checkpoint
from tests.models import jobs_hugging_face
from tests.quick import quick

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
TOKENS = torch.arange(14).view(2, 7)


def set_fields(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change(path: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Adds tensors to a directory's one file, or takes them out."""
    held = load_file(path / "model.safetensors") | tensors
    save_file({n: t for n, t in held.items() if t is not None}, path / "model.safetensors", {"format": "pt"})


def same_logits(path: Path, **overrides: Any) -> None:
    with torch.no_grad():
        expected = hf_reference(path, **overrides)(input_ids=TOKENS, use_cache=False).logits
        actual = MoECausalLM.from_pretrained(path, torch.float64, **overrides)(TOKENS).logits
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# ---- said twice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_beside_a_tied_configuration(tmp_path: Path, family: str) -> None:
    """Refused where it is another matrix, with the way on; left out where it is the embedding."""
    path = make_checkpoint(tmp_path / "c", family)
    set_fields(path, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="holds a head of its own.*set tie_word_embeddings=False"):
        MoECausalLM.from_pretrained(path)
    same_logits(path, tie_word_embeddings=False)
    with torch.no_grad():  # as transformers reads the directory by itself, which says so in a warning
        theirs = hf_reference(path)(input_ids=TOKENS, use_cache=False).logits
        model = MoECausalLM.from_pretrained(path, torch.float64, tie_word_embeddings=False)
        torch.testing.assert_close(model(TOKENS).logits, theirs, rtol=1e-10, atol=1e-10)
        model.save_pretrained(tmp_path / "out")
        again = hf_reference(tmp_path / "out")(input_ids=TOKENS, use_cache=False).logits
    assert torch.equal(again, theirs)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    change(path, {"lm_head.weight": embedding.clone()})
    same_logits(path)
    nearly = embedding.clone()
    nearly[-1, -1] += 1e-3  # in the last element alone
    change(path, {"lm_head.weight": nearly})
    with pytest.raises(CheckpointError, match="holds a head of its own"):
        MoECausalLM.from_pretrained(path)
    change(path, {"lm_head.weight": embedding[:-1].clone()})
    with pytest.raises(CheckpointError, match="'lm_head.weight' in .* has shape"):
        MoECausalLM.from_pretrained(path)


def test_no_head_beside_an_untied_configuration(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", "qwen3_moe", tie_word_embeddings=True)
    set_fields(path, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match="has no tensor 'lm_head.weight'.*set tie_word_embeddings=True"):
        MoECausalLM.from_pretrained(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_rotary_frequencies(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_checkpoint(tmp_path / "c", "mixtral", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frequencies = 1.0 / 5000.0 ** (torch.arange(0, 8, 2) / 8)
    change(path, {name: frequencies.to(dtype)})
    same_logits(path)
    change(path, {name: (1.0 / 1e4 ** (torch.arange(0, 8, 2) / 8)).to(dtype)})
    with pytest.raises(CheckpointError, match="frequencies are not those of rope_theta=5000.0"):
        MoECausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.0.self_attn.masked_bias": torch.zeros(1)}, "holds 'model.layers.0.self_attn.masked_bias'"),
        ({"model.layers.0.attn.bias": torch.zeros(1)}, "holds 'model.layers.0.attn.bias'"),
        ({"model.layers.0.mlp.gate.e_score_correction_bias": torch.zeros(4)}, "holds .*e_score_correction_bias"),
    ],
    ids=str,
)
def test_nothing_else_is_left_out(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    path = make_checkpoint(tmp_path / "c", "qwen2_moe")
    change(path, dict(tensors))
    with pytest.raises(CheckpointError, match=message):
        MoECausalLM.from_pretrained(path)


def test_biases_of_some_layers(tmp_path: Path) -> None:
    """With routers that have them: of every layer or of none, and of the right shape."""
    path, options = make_checkpoint(tmp_path / "c", "qwen2_moe"), {"router": {"bias_update_rate": 0.01}}
    names = [f"model.layers.{i}.mlp.gate.e_score_correction_bias" for i in range(2)]
    assert not any(b.any() for b in dict(MoECausalLM.from_pretrained(path, **options).stored_buffers()).values())
    change(path, {names[0]: torch.ones(4)})
    with pytest.raises(CheckpointError, match=f"has no tensor '{names[1]}'"):
        MoECausalLM.from_pretrained(path, **options)
    change(path, {names[1]: torch.ones(3)})
    with pytest.raises(CheckpointError, match="has shape"):
        MoECausalLM.from_pretrained(path, **options)
    change(path, {names[1]: 2 * torch.ones(4)})
    buffers = dict(MoECausalLM.from_pretrained(path, **options).stored_buffers())
    assert [buffers[name].tolist() for name in names] == [[1.0] * 4, [2.0] * 4]


def test_experts_of_several_dtypes(tmp_path: Path) -> None:
    """A stack of experts is written in the widest of its dtypes, so that none loses digits."""
    path = make_checkpoint(tmp_path / "c", "qwen2_moe", dtype=torch.bfloat16)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    exact = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    change(path, {name: exact})
    MoECausalLM.from_pretrained(path).save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written[name], exact)
    assert written["model.layers.1.mlp.experts.2.up_proj.weight"].dtype == torch.bfloat16


# ---- two sets of weights ---------------------------------------------------------------------------------------------


@pytest.fixture
def single_and_shards(tmp_path: Path) -> tuple[Path, Path]:
    """The same configuration with other weights, in one file and in several."""
    single = make_checkpoint(tmp_path / "single", "qwen3_moe", seed=1)
    return single, make_checkpoint(tmp_path / "shards", "qwen3_moe", seed=2, max_shard_size="30KB")


def test_two_sets_of_weights(single_and_shards: tuple[Path, Path]) -> None:
    single, shards = single_and_shards
    shutil.copy(single / "model.safetensors", shards)
    with pytest.raises(CheckpointError, match="two sets of weights.*delete the one that is not meant"):
        MoECausalLM.from_pretrained(shards)
    for file in shards.glob("model-*.safetensors"):  # the index is left over; transformers does not look at it
        file.unlink()
    with pytest.raises(CheckpointError, match="two sets of weights"):
        MoECausalLM.from_pretrained(shards)
    (shards / "model.safetensors.index.json").unlink()
    same_logits(shards)


def test_an_index_of_the_single_file(single_and_shards: tuple[Path, Path]) -> None:
    single, _ = single_and_shards
    weight_map = dict.fromkeys(load_file(single / "model.safetensors"), "model.safetensors")
    (single / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    same_logits(single)


def test_tensors_that_the_index_leaves_out(single_and_shards: tuple[Path, Path]) -> None:
    """Transformers reads whole shards, so the index alone does not say what it would read."""
    _, shards = single_and_shards
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    file = shards / index["weight_map"]["lm_head.weight"]
    save_file(load_file(file) | {"model.norm.weight.old": torch.ones(32)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="'model.norm.weight.old', which the index does not place there"):
        MoECausalLM.from_pretrained(shards)


def test_leftover_shards_are_not_read(single_and_shards: tuple[Path, Path]) -> None:
    """Files that neither transformers nor the index names do not count."""
    single, shards = single_and_shards
    shutil.copy(next(shards.glob("model-*.safetensors")), single)
    (single / "pytorch_model.bin").write_bytes(b"old")
    same_logits(single)


def test_an_adapter_in_the_directory(single_and_shards: tuple[Path, Path]) -> None:
    single, _ = single_and_shards
    (single / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter that transformers adds to the weights; merge it"):
        MoECausalLM.from_pretrained(single)


# ---- experts in one tensor -------------------------------------------------------------------------------------------


def fuse(path: Path) -> None:
    """Writes a directory's experts as transformers has them in memory."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(path, dtype="auto").save_pretrained(path, save_original_format=False)
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(path / "model.safetensors"))


@pytest.mark.parametrize("family", quick(FAMILIES, "qwen3_moe"))
def test_fused_experts(pool: RankPool, tmp_path: Path, family: str) -> None:
    """The same model, also in pieces, and written as everybody writes it."""
    path = make_checkpoint(tmp_path / "c", family, dtype=torch.bfloat16)
    written = load_file(path / "model.safetensors")
    plain = dict(MoECausalLM.from_pretrained(path).named_parameters())
    fuse(path)
    same_logits(path)
    for name, parameter in MoECausalLM.from_pretrained(path).named_parameters():
        assert torch.equal(parameter, plain[name]), name
    pool.run(jobs_hugging_face.round_trip, str(path), ["tp2 | etp2 ep2", "| ep4"], str(tmp_path), {}, ranks=4)
    for number in (0, 1):
        ours = load_file(tmp_path / str(number) / "model.safetensors")
        assert set(ours) == set(written)
        assert all(torch.equal(ours[name], written[name]) for name in ours)


def test_fused_in_one_layer_and_renamed_in_another(tmp_path: Path) -> None:
    """Each layer as it is stored; both ways at once in a layer are refused."""
    path = make_checkpoint(tmp_path / "c", "mixtral")
    held = load_file(path / "model.safetensors")
    fuse(path)
    fused = load_file(path / "model.safetensors")
    mixed = {n: t for n, t in fused.items() if ".layers.0.mlp." not in n}
    mixed |= {n.replace("block_sparse_moe", "mlp"): t for n, t in held.items() if ".layers.0.block_sparse_moe" in n}
    save_file(mixed, path / "model.safetensors", {"format": "pt"})
    same_logits(path)
    save_file({**mixed, **{n: t.clone() for n, t in held.items()}}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="which a model of its configuration does not have"):
        MoECausalLM.from_pretrained(path)
