# SPDX-License-Identifier: Apache-2.0
"""Families of models that users register: a known architecture under other names. Pure Python."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_moefold.errors import ConfigError, InputError

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
_REGISTERED: dict[str, Family] = {}


@dataclass(frozen=True)
class Family:
    """A family that computes what a known one does, and names fields and tensors differently.

    Args:
        model_type: What its ``config.json`` says.
        base: The known family.
        fields: For each of its own field names, that of the base.
        constants: Fields of the base that its ``config.json`` does not hold, with their values.
        ignored: Its fields that change nothing.
        names: For each part of a tensor's name in the base, the part in this family; parts are whole between dots.
    """

    model_type: str
    base: str
    fields: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    ignored: frozenset[str]
    names: tuple[tuple[str, str], ...]

    def to_base(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a configuration in the words of the base.

        Raises:
            ConfigError: If a field is given under both names, or contradicts a constant.
        """
        theirs, found = dict(self.fields), {}
        for name, value in raw.items():
            if name in self.ignored:
                continue
            known = theirs.get(name, name)
            if known in found:
                raise ConfigError(
                    f"a {self.model_type} configuration holds {known!r} under two names; keep one of them."
                )
            found[known] = value
        for name, value in self.constants:
            if found.setdefault(name, value) != value:
                raise ConfigError(
                    f"{name}={found[name]!r} contradicts the {value!r} of every {self.model_type}; take it out."
                )
        return found | {"model_type": self.base}

    def overrides_to_base(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """Returns overrides in the words of the base; the family itself is none."""
        theirs = dict(self.fields)
        return {theirs.get(name, name): value for name, value in overrides.items() if name != "model_type"}

    def from_base(self, written: Mapping[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the configuration to write, from that in the words of the base and the one that was read.

        Raises:
            ConfigError: If a constant of the family has changed.
        """
        ours, constants = {known: name for name, known in self.fields}, dict(self.constants)
        for name, value in constants.items():
            if name in written and written[name] != value:
                raise ConfigError(
                    f"{name}={written[name]!r} cannot be written for {self.model_type}, where it is {value!r}."
                )
        kept = {ours.get(name, name): value for name, value in written.items() if name not in constants}
        return {name: raw[name] for name in raw if name in self.ignored} | kept | {"model_type": self.model_type}

    def disk_name(self, name: str) -> str:
        """Returns the name of a tensor in this family's files, from that of the base."""
        dotted = f".{name}."
        for known, own in self.names:
            dotted = dotted.replace(f".{known}.", f".{own}.")
        return dotted[1:-1]


def register_family(
    model_type: str,
    base: str,
    *,
    fields: Mapping[str, str] | None = None,
    constants: Mapping[str, Any] | None = None,
    ignored: Iterable[str] = (),
    names: Mapping[str, str] | None = None,
) -> None:
    """Teaches this process to read and write a family that computes what a known one does under other names.

    Call it before the model is made, in the script that trains. From then on ``from_pretrained``, ``save_pretrained``, export
    and the planner take checkpoints whose ``config.json`` says ``model_type``.

    Args:
        model_type: What ``config.json`` of the family says.
        base: The known family: ``"mixtral"``, ``"qwen2_moe"`` or ``"qwen3_moe"``.
        fields: The family's names of configuration fields, each with that of the base, such as
            ``{"n_experts": "num_experts"}``. Others have the same name.
        constants: Fields of the base that the family's configurations do not hold, with their values.
        ignored: Fields of the family that change nothing in the result.
        names: Parts of the base's tensor names on disk, whole between dots, each with the family's, such as
            ``{"mlp.experts": "moe.experts", "gate_proj": "w_gate"}``; applied in this order.

    Raises:
        InputError: If the family is known already with another meaning, or the base is not.

    Example::

        register_family("acme_moe", "qwen3_moe", fields={"n_experts": "num_experts"}, names={"mlp": "moe"})
    """
    if base not in FAMILIES:
        raise InputError(f"base={base!r} is no known family; use {', '.join(FAMILIES)}.")
    if not model_type or model_type in FAMILIES:
        raise InputError(f"model_type={model_type!r} cannot be registered; give the name of a new family.")
    targets = list((fields or {}).values())
    if twice := next((target for target in targets if targets.count(target) > 1), None):
        raise InputError(f"two fields of {model_type!r} stand for {twice!r}; give one.")
    family = Family(
        model_type, base, tuple((fields or {}).items()), tuple((constants or {}).items()), frozenset(ignored),
        tuple((names or {}).items()),
    )  # fmt: skip
    if _REGISTERED.setdefault(model_type, family) != family:
        raise InputError(f"{model_type!r} is registered already with another meaning; register a family once.")


def registered_family(model_type: str | None) -> Family | None:
    """Returns the family that a user has registered under this name; None if there is none."""
    return _REGISTERED.get(model_type) if isinstance(model_type, str) else None


def known_families() -> Collection[str]:
    """Returns the names of all families that can be read."""
    return (*FAMILIES, *_REGISTERED)
