# SPDX-License-Identifier: Apache-2.0
"""Every spelling of every field of config.json is read as transformers reads it, or refused in a sentence."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_moefold import MoEConfig
from lightning_moefold.errors import ConfigError
from lightning_moefold.models import fields
from lightning_moefold.models.hf_config import written_config
from lightning_moefold.modules.attention.rotary import rotary_tables

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
BASE: dict[str, dict[str, Any]] = {
    family: {
        "model_type": family, "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": False, "router_aux_loss_coef": 0.01, "max_position_embeddings": 64,
    }
    for family in FAMILIES
}  # fmt: skip
BASE["mixtral"] |= {"num_local_experts": 4, "sliding_window": None}
for _family in ("qwen2_moe", "qwen3_moe"):
    BASE[_family] |= {
        "num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "use_sliding_window": False, "sliding_window": None,
    }  # fmt: skip
BASE["qwen2_moe"] |= {"shared_expert_intermediate_size": 24, "qkv_bias": True}
BASE["qwen3_moe"] |= {"attention_bias": False}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Transformers logs what it thinks of rotary fields."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def theirs(raw: dict[str, Any]) -> Any:
    """The configuration of transformers."""
    from transformers import AutoConfig

    copied = {
        k: dict(v) if isinstance(v, dict) else v for k, v in raw.items() if k != "model_type"
    }  # it writes into them
    return AutoConfig.for_model(raw["model_type"], **copied)


# ---- rotary fields ---------------------------------------------------------------------------------------------------


def frequencies(raw: dict[str, Any]) -> torch.Tensor:
    """The inverse frequencies with which transformers' model turns heads."""
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeRotaryEmbedding
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

    kinds = dict(zip(FAMILIES, (MixtralRotaryEmbedding, Qwen2MoeRotaryEmbedding, Qwen3MoeRotaryEmbedding), strict=True))
    return kinds[raw["model_type"]](theirs(raw)).inv_freq


def angles(config: MoEConfig) -> torch.Tensor:
    """Ours, from the tables of position 1."""
    cos, sin = rotary_tables(
        torch.ones(1, 1, dtype=torch.int64),
        config.head_dim,
        config.rope_theta,
        torch.float64,
        config.rope_scaling_factor,
    )
    return torch.atan2(sin, cos).flatten().float()


#: One statement each, as (name, key, value); a key of None is a field of its own.
STATEMENTS: list[tuple[str, str | None, Any]] = [
    *(("rope_theta", None, theta) for theta in (777.0, 5000.0)),
    *((name, "rope_theta", theta) for name in ("rope_scaling", "rope_parameters") for theta in (777.0, 5000.0)),
    *(
        (name, key, kind)
        for name in ("rope_scaling", "rope_parameters")
        for key in ("rope_type", "type")
        for kind in ("default", "linear", "yarn", "dynamic")
    ),
    *((name, "factor", factor) for name in ("rope_scaling", "rope_parameters") for factor in (2.0, 4.0)),
    ("partial_rotary_factor", None, 0.5),
    ("rope_parameters", "partial_rotary_factor", 0.5),
    ("rope_parameters", "full_attention", {"rope_type": "default", "rope_theta": 777.0}),
    ("rope_parameters", "full_attention", {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0}),
]


def put(raw: dict[str, Any], statement: tuple[str, str | None, Any]) -> dict[str, Any]:
    name, key, value = statement
    return {**raw, name: value if key is None else {**raw.get(name, {}), key: value}}


#: What files hold before another statement is added to them.
FILES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "old": {"rope_theta": 5000.0},
    "old linear": {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "old linear, base inside": {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "new linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pairs_of_rotary_statements(family: str) -> None:
    """Added to every kind of file: read with transformers' frequencies, or refused; nothing is dropped."""
    read, refused = 0, 0
    for (title, file), pair in itertools.product(FILES.items(), itertools.combinations(STATEMENTS, 2)):
        raw = BASE[family] | file
        for statement in pair:
            raw = put(raw, statement)
        try:
            config = MoEConfig.from_hf(raw)
        except ConfigError:
            refused += 1
            continue
        read += 1
        torch.testing.assert_close(angles(config), frequencies(raw), rtol=1e-5, atol=1e-7, msg=f"{title}: {pair}")
        # Whatever the file says of base and factor is what was read.
        said = [raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {}]
        assert {x["rope_theta"] for x in said if "rope_theta" in x} <= {config.rope_theta}, (title, pair)
        assert {x["factor"] for x in said if "factor" in x} <= {config.rope_scaling_factor}, (title, pair)
    assert read > 30
    assert refused > 1000


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("title", [title for title in FILES if title != "yarn"])
def test_one_spelling_is_read(family: str, title: str) -> None:
    raw = BASE[family] | FILES[title]
    config = MoEConfig.from_hf(raw)
    torch.testing.assert_close(angles(config), frequencies(raw), rtol=1e-5, atol=1e-7)
    doubled = raw | {"rope_parameters": dict(theirs(raw).rope_parameters)} | {"rope_theta": config.rope_theta}
    assert MoEConfig.from_hf(doubled) == config, "the same said twice is not refused"


OVERRIDES: list[dict[str, Any]] = [
    {"rope_theta": 99.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 99.0}},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": None, "rope_parameters": None},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_rotary_overrides_replace_every_spelling(family: str, overrides: dict[str, Any]) -> None:
    """What an override does not name stays the file's, and what is written is what was computed with."""
    for title, file in FILES.items():
        dictionary = next((v for k, v in overrides.items() if k != "rope_theta" and v), None)
        if title == "yarn" and "rope_theta" in overrides:
            continue  # its type stays, and is refused
        config = MoEConfig.from_hf(BASE[family] | file, **overrides)
        plain = MoEConfig.from_hf(BASE[family] | (file if title != "yarn" else {}))
        given = {**(dictionary or {}), **overrides}
        assert config.rope_theta == given.get("rope_theta", plain.rope_theta), title
        expected = plain.rope_scaling_factor if list(overrides) == ["rope_theta"] else given.get("factor", 1.0)
        assert config.rope_scaling_factor == expected, title
        written = written_config(config)
        assert MoEConfig.from_hf(written) == config
        torch.testing.assert_close(angles(config), frequencies(written), rtol=1e-5, atol=1e-7)


# ---- names -----------------------------------------------------------------------------------------------------------


def groups() -> Iterator[tuple[str, str, str]]:
    """Family, a field, and another name for it."""
    for family, raw in BASE.items():
        for field in [field for field, value in raw.items() if value is not None]:
            read, foreign = fields.spellings(family, field)
            yield from ((family, field, name) for name in (*read[1:], *foreign))
        yield family, "dtype", "torch_dtype"


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return {"silu": "gelu", "float32": "bfloat16"}.get(value) or 2 * value


@pytest.mark.parametrize(("family", "field", "name"), sorted(set(groups())))
def test_all_pairs_of_names(family: str, field: str, name: str) -> None:
    """Alone, beside each other and agreeing, and disagreeing: as transformers' own attribute, or refused."""
    value = BASE[family].get(field, "float32")
    without = {k: v for k, v in BASE[family].items() if k != field}
    for raw in (
        without | {field: value},
        without | {name: value},
        without | {name: other(value)},
        *({**without, first: a, second: b} for first, second in ((field, name), (name, field))
          for a in (value, other(value)) for b in (value, other(value))),
    ):  # fmt: skip
        values = {raw[n] for n in (field, name) if n in raw}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a name that is ignored would be said in one
                config = MoEConfig.from_hf(raw)
        except ConfigError:
            assert len(values) > 1 or field not in raw, f"{raw} is not ambiguous"
            continue
        assert len(values) == 1, f"{values} cannot both hold"
        own = {"num_local_experts": "num_experts", "attention_bias": "qkv_bias"}.get(field, field)
        if family == "mixtral" and field == "intermediate_size":
            own = "moe_intermediate_size"
        theirs_value = getattr(theirs(raw), field)
        theirs_value = str(theirs_value).removeprefix("torch.") if field == "dtype" else theirs_value
        assert getattr(config, own) == theirs_value


@pytest.mark.parametrize("family", FAMILIES)
def test_an_override_replaces_every_name(family: str) -> None:
    own = "num_local_experts" if family == "mixtral" else "num_experts"
    raw = {k: v for k, v in BASE[family].items() if k != own}
    for file in ({own: 4}, {"num_experts": 4}, {"num_local_experts": 4}, {own: 4, "n_routed_experts": 4}):
        if family == "qwen2_moe" and own not in file:
            continue
        for name in {own} if family == "qwen2_moe" else {"num_experts", "num_local_experts"}:
            config = MoEConfig.from_hf(raw | file, **{name: 8})
            assert config.num_experts == 8
            assert theirs(written_config(config)).num_experts == 8


# ---- what is written -------------------------------------------------------------------------------------------------

CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"num_experts_per_tok": 3, "sliding_window": 5, "rope_theta": 50.0}),
    ("qwen2_moe", {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen2_moe", {"qkv_bias": False, "tie_word_embeddings": True, "dtype": "bfloat16"}),
    ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [1], "hidden_act": "gelu", "head_dim": 12}),
    ("qwen3_moe", {"router": {"bias_update_rate": 0.01}, "router_aux_loss_coef": 0.5, "aux_loss": "global_batch"}),
]


@pytest.mark.parametrize(("family", "changes"), CHANGES, ids=str)
def test_written_is_what_is_computed(family: str, changes: dict[str, Any]) -> None:
    """Overrides of the function are written; those that say what a call returns are not."""
    raw = BASE[family] | {"use_cache": True, "torch_dtype": "float32", "bos_token_id": 1}
    config = MoEConfig.from_hf(raw, **changes, output_router_logits=True)
    assert config.output_router_logits
    written = written_config(config)
    assert "output_router_logits" not in written
    assert (written["use_cache"], written["bos_token_id"]) == (True, 1)
    assert written_config(MoEConfig.from_hf(raw | {"output_router_logits": True}))["output_router_logits"]
    again = MoEConfig.from_hf(written, output_router_logits=True)
    assert again == config
    assert written_config(MoEConfig.from_hf(raw)) == raw, "nothing is changed that was not overridden"


@pytest.mark.parametrize(
    ("family", "file", "overrides"),
    [
        ("mixtral", {"attention_dropout": 0.1}, {"attention_dropout": 0.0}),
        ("mixtral", {"sliding_window": 0}, {"sliding_window": None}),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * 2}, {"layer_types": None}),
        ("qwen3_moe", {"n_routed_experts": 9}, {"num_experts": 4}),
    ],
)
def test_what_overrides_mend_is_mended_in_what_is_written(
    family: str, file: dict[str, Any], overrides: dict[str, Any]
) -> None:
    raw = BASE[family] | file | {"bos_token_id": 7}
    with pytest.raises(ConfigError):
        MoEConfig.from_hf(raw)
    config = MoEConfig.from_hf(raw, **overrides)
    written = written_config(config)
    assert MoEConfig.from_hf(written) == config
    assert written["bos_token_id"] == 7


def test_written_after_replace() -> None:
    config = replace(MoEConfig.from_hf(BASE["qwen3_moe"]), num_experts_per_tok=3, rope_theta=3.0)
    written = written_config(config)
    assert written["num_experts_per_tok"] == 3
    assert MoEConfig.from_hf(written) == config
    unused = replace(MoEConfig.from_hf(BASE["mixtral"]), intermediate_size=64)  # no layer of the family is dense
    assert written_config(unused) == BASE["mixtral"]
    mixed = replace(MoEConfig.from_hf(BASE["mixtral"]), sliding_windows=(None, 4))
    with pytest.raises(ConfigError, match="sliding_windows=.* cannot be written in a config.json of mixtral"):
        written_config(mixed)


# ---- types -----------------------------------------------------------------------------------------------------------

WRONG = {
    "a dict": {"a": 1},
    "a list": [[1]],
    "a NUL string": "\0",
    "NaN": math.nan,
    "infinity": math.inf,
    "a bool": True,
}
#: Where a value of the list above is right.
RIGHT = {
    "a bool": (
        "tie_word_embeddings", "norm_topk_prob", "use_sliding_window", "qkv_bias", "attention_bias", "output_router_logits",
    ),
    "a dict": ("rope_scaling", "rope_parameters"),  # one with a key that nobody knows, which is said in a warning
}  # fmt: skip
MORE: dict[str, Any] = {
    "rope_theta": 1e4, "rope_scaling": None, "rope_parameters": None, "pad_token_id": 0, "eos_token_id": 2,
    "bos_token_id": 1, "router_z_loss_coef": 0.0, "initializer_range": 0.02, "attention_dropout": 0.0, "aux_loss": "huggingface",
    "layer_types": None, "max_window_layers": 28, "dtype": "float32", "model_type": "", "output_router_logits": False,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", WRONG)
def test_wrong_types_are_one_sentence(family: str, what: str) -> None:
    tested = {*BASE[family], *MORE} - set(RIGHT.get(what, ()))
    if family == "mixtral":
        tested -= {"max_window_layers"}  # no field of this family
    for field in tested:
        raw = BASE[family] | {field: WRONG[what]}
        with pytest.raises(ConfigError, match=field) as caught:
            MoEConfig.from_hf(raw)
        assert str(caught.value).count("\n") == 0
    for key in ("rope_theta", "factor", "rope_type", "type"):
        for name in ("rope_scaling", "rope_parameters"):
            good = {"rope_type": "linear", "factor": 2.0}
            with pytest.raises(ConfigError, match=key if key != "type" else "type"):
                MoEConfig.from_hf(BASE[family] | {name: good | {key: WRONG[what]}})


def test_made_by_hand_is_checked_as_well() -> None:
    config = MoEConfig.from_hf(BASE["qwen3_moe"])
    for field, value in {
        "hidden_size": True,
        "rms_norm_eps": math.nan,
        "hidden_act": {},
        "norm_topk_prob": "no",
    }.items():
        with pytest.raises(ConfigError, match=field):
            replace(config, **{field: value})


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("qwen3_moe", {"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config"),
        ("qwen3_moe", {"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ("qwen3_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "every layer of this qwen3_moe"),
        ("mixtral", {"sliding_window": 0}, "sliding_window=0 must be a positive integer, or null"),
        ("qwen2_moe", {"layer_types": ["full_attention", "sliding_attention"]}, "no window is used"),
        ("qwen3_moe", {"dtype": "int8"}, "dtype='int8'"),
        ("qwen3_moe", {"rope_theta": None}, "rope_theta=None"),
        ("qwen3_moe", {"rope_scaling": {"type": "linear"}}, "needs a factor"),
    ],
)
def test_fields_that_would_be_lost(family: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoEConfig.from_hf(BASE[family] | given)


def test_unknown_keys_of_rotary_fields_are_named() -> None:
    raw = BASE["qwen3_moe"] | {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "mrope_section": [1, 2]}}
    with pytest.warns(UserWarning, match=r"ignored: rope_parameters.mrope_section\.$") as caught:
        config = MoEConfig.from_hf(raw)
    assert len(caught) == 1
    assert config.rope_theta == 5.0
    assert written_config(config) == raw  # and stay in what is written
