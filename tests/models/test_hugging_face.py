# SPDX-License-Identifier: Apache-2.0
"""To and from Hugging Face: the same tensors bit by bit, the same logits, every field honoured or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_moefold import MoECausalLM, MoEConfig
from lightning_moefold.errors import ConfigError
from lightning_moefold.testing import RankPool, assert_close_by_name, hf_reference, make_checkpoint
from lightning_moefold.testing.pieces import assemble
from tests.models import jobs_hugging_face
from tests.quick import quick

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "dtype", "fields"),
    [
        pytest.param("mixtral", torch.bfloat16, {"tie_word_embeddings": True}, marks=pytest.mark.more),
        pytest.param("qwen2_moe", torch.float32, {"vocab_size": 97}, marks=pytest.mark.more),
        ("qwen3_moe", torch.bfloat16, {"num_key_value_heads": 1, "attention_bias": True}),
    ],
)
def test_round_trip(pool: RankPool, tmp_path: Path, family: str, dtype: torch.dtype, fields: dict[str, Any]) -> None:
    """Several shards in, several out; a directory that transformers loads with the same logits."""
    source = make_checkpoint(tmp_path / "source", family, dtype=dtype, max_shard_size="20KB", **fields)
    (source / "tokenizer.json").write_text("{}")
    assert len(list(source.glob("*.safetensors"))) > 1
    written = _tensors(source)
    folds = ["", "tp4 | ep4", "tp2 | etp2 ep2"]
    pool.run(jobs_hugging_face.round_trip, str(source), folds, str(tmp_path), {"max_shard_size": 30_000}, ranks=4)
    for number in range(len(folds)):
        target = tmp_path / str(number)
        ours = _tensors(target)
        assert set(ours) == set(written) - ({"lm_head.weight"} if fields.get("tie_word_embeddings") else set())
        for name, tensor in ours.items():
            assert tensor.dtype == written[name].dtype, name
            assert torch.equal(tensor, written[name]), name
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(ours)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in ours.values())
        assert (target / "tokenizer.json").read_text() == "{}"
        assert not list(target.glob(".*"))
    batch = torch.arange(12).view(2, 6)
    with torch.no_grad():
        a, b = (hf_reference(p)(input_ids=batch).logits for p in (source, tmp_path / "2"))
    assert torch.equal(a, b)


def test_dtype_on_disk(pool: RankPool, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral", dtype=torch.bfloat16)
    pool.run(jobs_hugging_face.round_trip, str(source), [""], str(tmp_path), {"dtype": torch.float32}, ranks=2)
    ours = _tensors(tmp_path / "0")
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert json.loads((tmp_path / "0" / "config.json").read_text())["dtype"] == "float32"
    for name, tensor in _tensors(source).items():
        assert torch.equal(ours[name], tensor.float())


@pytest.mark.parametrize("family", quick(FAMILIES, "qwen2_moe"))
def test_random_weights_do_not_depend_on_the_fold(pool: RankPool, tmp_path: Path, family: str) -> None:
    config = json.loads((make_checkpoint(tmp_path / "c", family, pad_token_id=3) / "config.json").read_text())
    torch.manual_seed(5)
    single = dict(MoECausalLM.from_config(config, seed=1).named_parameters())
    assert not single["model.embed_tokens.weight"][3].any()
    folds = ["", "tp4 | ep4", "tp2 | etp2 ep2"]
    outcome = pool.run(jobs_hugging_face.seeded, config, folds, 1, ranks=4)
    for i, fold in enumerate(folds):
        assert_close_by_name(assemble(r[i] for r in outcome), single, 0.0, fold)
    other = dict(MoECausalLM.from_config(config, seed=2).named_parameters())
    assert not torch.equal(other["lm_head.weight"], single["lm_head.weight"])


def test_from_config_writes_what_transformers_loads(tmp_path: Path) -> None:
    """Also for a configuration that was made by hand, in our own words."""
    for family in FAMILIES:
        raw = json.loads((make_checkpoint(tmp_path / family, family) / "config.json").read_text())
        fields = {f: getattr(MoEConfig.from_hf(raw), f) for f in MoEConfig.__dataclass_fields__ if f != "raw"}
        model = MoECausalLM.from_config(MoEConfig(**fields), seed=3, dtype=torch.float64)
        model.save_pretrained(tmp_path / f"{family} out", dtype=torch.float64)
        batch = torch.arange(12).view(2, 6)
        with torch.no_grad():
            theirs = hf_reference(tmp_path / f"{family} out")(input_ids=batch).logits
            torch.testing.assert_close(model(batch).logits, theirs, rtol=1e-10, atol=1e-10)


ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e4}
#: Family, config fields that change the result, and fields that are needed for them to matter.
FIELDS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"sliding_window": 3}),
    ("mixtral", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}),
    ("mixtral", {"rope_parameters": ROPE}),
    ("mixtral", {"head_dim": 12}),
    ("mixtral", {"hidden_act": "gelu"}),
    ("mixtral", {"rms_norm_eps": 0.1}),
    ("mixtral", {"num_experts_per_tok": 3}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    ("qwen2_moe", {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3}),
    (
        "qwen2_moe",
        {
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),  # fmt: skip
    ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 3}),
    ("qwen2_moe", {"hidden_act": "relu", "tie_word_embeddings": True}),
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 3}),
    ("qwen3_moe", {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": ROPE}),
    ("qwen3_moe", {"decoder_sparse_step": 3, "mlp_only_layers": []}),
]


def _compare(path: Path, batch: dict[str, torch.Tensor], **overrides: Any) -> None:
    with torch.no_grad():
        expected = hf_reference(path, **overrides)(**batch, use_cache=False).logits
        actual = MoECausalLM.from_pretrained(path, torch.float64, **overrides)(**batch).logits
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-10, error


@pytest.mark.parametrize(("family", "fields"), FIELDS, ids=[f"{f} {' '.join(d)}" for f, d in FIELDS])
def test_fields_are_honoured(tmp_path: Path, family: str, fields: dict[str, Any]) -> None:
    path = make_checkpoint(tmp_path / "c", family, **fields)
    _compare(path, {"input_ids": torch.randint(96, (3, 9), generator=torch.Generator().manual_seed(1))})


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_spellings(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / "c", family, rope_parameters=ROPE)
    config = json.loads((path / "config.json").read_text())
    new = MoEConfig.from_hf(config)
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype")}
    old |= {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "float32"}
    assert MoEConfig.from_hf(old) == new
    for a, b in (("num_local_experts", "num_experts"), ("num_experts", "num_local_experts")):
        if a in config and family != "qwen2_moe":  # where transformers reads num_experts alone
            assert MoEConfig.from_hf({k: v for k, v in config.items() if k != a} | {b: config[a]}) == new
    assert (new.rope_theta, new.rope_scaling_factor, new.dtype) == (5e4, 4.0, "float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    """A field that config.json leaves out has the value of transformers' configuration class."""
    from transformers import AutoConfig

    needed = (
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "moe_intermediate_size",
    )
    full = AutoConfig.for_model(family).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({k: full[k] for k in needed if k in full}))
    theirs = AutoConfig.from_pretrained(tmp_path)
    short = MoEConfig.from_pretrained(tmp_path)
    long = MoEConfig.from_hf(theirs.to_dict())
    assert short == long


def test_overrides(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "c", "qwen3_moe")
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    _compare(path, batch, norm_topk_prob=False)
    with pytest.warns(UserWarning, match="output_router_logits=True"):
        MoECausalLM.from_pretrained(path)
    model = MoECausalLM.from_pretrained(path, output_router_logits=True)
    assert model(**batch, labels=batch["input_ids"]).aux_loss is not None
    with pytest.raises(ConfigError, match="override 'temper' is not a field"):
        MoECausalLM.from_pretrained(path, temper=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "tanh"}, "hidden_act"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"pad_token_id": 96}, "pad_token_id"),
    ],
    ids=str,
)
def test_fields_that_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    raw = json.loads((make_checkpoint(tmp_path / "c", "qwen2_moe") / "config.json").read_text())
    if "layer_types" not in fields:
        raw.pop("layer_types", None)
    with pytest.raises(ConfigError, match=message):
        MoEConfig.from_hf({**raw, **fields})


def test_unknown_fields_are_named_once() -> None:
    raw = {
        "model_type": "mixtral", "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8,
        "num_key_value_heads": 2, "novelty": 3,
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"not known here and are ignored: novelty\.$") as caught:
        MoEConfig.from_hf(raw)
    assert len(caught) == 1


@pytest.mark.parametrize("fold", quick(["", "tp2 | ep2"], "tp2 | ep2"))
def test_logits_under_a_fold(pool: RankPool, tmp_path: Path, fold: str) -> None:
    """Whole logits on every rank, for padded rows too."""
    path = make_checkpoint(tmp_path / "c", "qwen2_moe", vocab_size=97, num_hidden_layers=3, use_sliding_window=True,
                           sliding_window=3, max_window_layers=2)  # fmt: skip
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = {"input_ids": torch.randint(97, (3, 7), generator=torch.Generator().manual_seed(1)), "attention_mask": mask}
    with torch.no_grad():
        expected = hf_reference(path)(**batch, use_cache=False).logits
    for actual in pool.run(jobs_hugging_face.logits, str(path), fold, batch, {}, ranks=2):
        torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pad", [0, 5, -1])
def test_padding_token_gets_no_gradient(tmp_path: Path, pad: int) -> None:
    path = make_checkpoint(tmp_path / "c", "mixtral", pad_token_id=pad)
    batch = torch.tensor([[0, 5, 95, 1, 2, 5]])
    ours = MoECausalLM.from_pretrained(path, torch.float64)
    theirs = hf_reference(path)
    for model in (ours, theirs):
        model(input_ids=batch, labels=batch).loss.backward()
    mine, expected = ours.model.embed_tokens.weight.grad, theirs.model.embed_tokens.weight.grad
    assert not mine[pad].any()
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
