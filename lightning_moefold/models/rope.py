# SPDX-License-Identifier: Apache-2.0
"""Reads the rotary fields of a configuration, which have several spellings. Pure Python.

    "rope_theta": 1e6                                       beside the rest
    "rope_scaling": {"type": "linear", "factor": 4.0}       transformers 4; ``rope_type`` later
    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}     transformers 5

``transformers`` 5 prefers ``rope_scaling`` to ``rope_parameters`` unless it is empty, looks for a missing base beside
it, and otherwise uses a default base. All spellings in a file must agree with what is read in this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_moefold.errors import ConfigError
from lightning_moefold.models.fields import ABOVE_ZERO, MAPPING, STRING, FieldReader

NAMES = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
_DICTS = ("rope_scaling", "rope_parameters")
_DEFAULT_THETA = {"mixtral": 1e6, "qwen2_moe": 1e4, "qwen3_moe": 1e4}
_READ = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor")
#: Fields of rope types that are refused; the other types ignore them.
_OF_OTHER_TYPES = (
    "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "finetuned",
)  # fmt: skip


def read_rope(reader: FieldReader) -> tuple[float, float]:
    """Reads base and divisor of the rotary frequencies.

    Raises:
        ConfigError: If two spellings disagree, a value is of the wrong type, or a rope type is not supported.
    """
    reader.seen.update(NAMES)
    raw = {name: reader.raw[name] for name in NAMES if reader.raw.get(name) is not None}
    _check_kinds(raw)
    chosen = _chosen(raw)
    kind = _kind(chosen)
    if kind not in ("default", "linear"):
        raise ConfigError(f"rope_type={kind!r} is not supported; use 'default' or 'linear'.")
    theta = chosen.get("rope_theta", raw.get("rope_theta", _DEFAULT_THETA[reader.family]))
    if kind == "linear" and chosen.get("factor") is None:
        raise ConfigError("rope_type='linear' needs a factor beside it.")
    factor = chosen["factor"] if kind == "linear" else 1.0
    _refuse_others(raw, {"rope_type": kind, "type": kind, "rope_theta": theta, "factor": factor})
    if reader.raw.get("rope_theta", theta) is None and chosen.get("rope_theta") is None:
        raise ConfigError("rope_theta=None must be a finite number above 0.")
    return float(theta), float(factor)


def replace_rope(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration in which the rotary fields of ``overrides`` replace the file's, whatever their spelling.

    If the overrides give no base, the file's base remains.
    """
    given = {name: overrides[name] for name in NAMES if name in overrides}
    if not given:
        return dict(raw)
    _check_kinds({name: value for name, value in given.items() if value is not None})
    rest = {name: value for name, value in raw.items() if name not in NAMES}
    if any(name in given for name in _DICTS):
        theta = _chosen(raw).get("rope_theta", raw.get("rope_theta"))
        says = "rope_theta" in given or any("rope_theta" in (given.get(name) or {}) for name in _DICTS)
        return rest | ({} if theta is None or says else {"rope_theta": theta}) | given
    file = {name: raw[name] for name in NAMES if name in raw and name not in given}
    for name in _DICTS:
        if isinstance(file.get(name), Mapping):
            file[name] = {key: value for key, value in file[name].items() if key not in given}
    return rest | file | given


def with_base(raw: Mapping[str, Any], theta: float) -> dict[str, Any]:
    """Returns a configuration that says its base: ``theta`` if it says none itself."""
    says = "rope_theta" in raw or "rope_theta" in _chosen(raw)
    return dict(raw) if says else {**raw, "rope_theta": theta}


def unknown_keys(raw: Mapping[str, Any]) -> set[str]:
    """Returns unknown keys of the rotary dictionaries, with the dictionary's name."""
    known = (*_READ, *_OF_OTHER_TYPES)
    return {f"{name}.{key}" for name in _DICTS for key in raw.get(name) or {} if key not in known}


def _chosen(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    chosen = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    return {key: value for key, value in chosen.items() if value is not None} if isinstance(chosen, Mapping) else {}


def _kind(chosen: Mapping[str, Any]) -> str:
    return chosen.get("rope_type", chosen.get("type", "default"))


def _check_kinds(raw: Mapping[str, Any]) -> None:
    for where in _DICTS:
        if where not in raw:
            continue
        MAPPING.check(where, raw[where])
        for key, value in raw[where].items():
            if isinstance(value, Mapping):
                raise ConfigError(
                    f"{where} has parameters for {key!r} alone, and in these families all layers share theirs; give them "
                    f"in {where} itself."
                )
            if value is not None and key in _READ:
                (STRING if key.endswith("type") else ABOVE_ZERO).check(f"{key} in {where}", value)
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in raw:
            ABOVE_ZERO.check(name, raw[name])


def _refuse_others(raw: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Refuses spellings that disagree with what is read."""
    for where, said in (("beside", raw), *((name, raw.get(name, {})) for name in _DICTS)):
        prefix = "" if where == "beside" else f" in {where}"
        if said.get("partial_rotary_factor") not in (1.0, None):
            raise ConfigError(f"partial_rotary_factor{prefix} is not supported; set it to 1.0.")
        for key, value in read.items():
            if said.get(key) is None or said[key] == value or (where == "beside" and key != "rope_theta"):
                continue
            if key == "factor" and read["rope_type"] == "default":
                raise ConfigError(
                    f"factor={said[key]!r}{prefix} has no effect with rope_type='default'; take it out, or set "
                    "rope_type='linear'."
                )
            raise ConfigError(
                f"{key}={said[key]!r}{prefix} disagrees with {value!r}, which transformers reads from these rotary fields; "
                "keep one of rope_scaling and rope_parameters, with rope_theta in it."
            )
