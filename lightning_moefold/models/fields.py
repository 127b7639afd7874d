# SPDX-License-Identifier: Apache-2.0
"""The kinds of values and the names of configuration fields. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_moefold.errors import ConfigError


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        words: Completes the sentence "the field must be ...".
        accepts: Function that says whether a value is of this kind.
    """

    words: str
    accepts: Callable[[Any], bool]

    def check(self, name: str, value: Any) -> None:
        """Raises a :class:`ConfigError` that names the field if the value is of another kind."""
        if not self.accepts(value):
            raise ConfigError(f"{name}={value!r} must be {self.words}.")

    @property
    def or_null(self) -> Kind:
        """Returns the kind that also accepts null."""
        return Kind(f"{self.words}, or null", lambda value: value is None or self.accepts(value))


#: Larger integers are no sizes, and cannot be indices of tensors.
_LARGEST = 1 << 62


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) and abs(value) < _LARGEST) or (isinstance(value, float) and math.isfinite(value))


def _all(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(accepts, value))


POSITIVE = Kind("a positive integer", lambda value: _is_int(value) and 0 < value < _LARGEST)
#: Of layers and experts, which are made one by one.
NUMEROUS = Kind("a positive integer up to 100,000", lambda value: _is_int(value) and 0 < value <= 100_000)
COUNT = Kind("an integer, 0 or more", lambda value: _is_int(value) and 0 <= value < _LARGEST)
INTEGER = Kind("an integer", lambda value: _is_int(value) and abs(value) < _LARGEST)
NUMBER = Kind("a finite number", _is_number)
NOT_NEGATIVE = Kind("a finite number, 0 or more", lambda value: _is_number(value) and value >= 0)
ABOVE_ZERO = Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
STRING = Kind("a string", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", lambda value: isinstance(value, Mapping))
INTEGERS = Kind("a list of integers", _all(_is_int))
STRINGS = Kind("a list of strings", _all(STRING.accepts))
TOKENS = Kind("a token's number, or a list of them", lambda value: _is_int(value) or INTEGERS.accepts(value))

#: Other names under which ``transformers`` reads a field.
_READ_AS_WELL = {
    ("mixtral", "num_local_experts"): ("num_experts",),
    ("qwen3_moe", "num_experts"): ("num_local_experts",),
    **{(family, "dtype"): ("torch_dtype",) for family in ("mixtral", "qwen2_moe", "qwen3_moe")},
}
#: Names that other families or programs use for a field, and that ``transformers`` does not read in these families.
_FOREIGN = {
    "vocab_size": ("n_vocab",),
    "hidden_size": ("d_model", "n_embd"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "multi_query_group_num"),
    "head_dim": ("kv_channels",),
    "num_experts": ("num_local_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts"),
    "num_local_experts": ("n_routed_experts", "num_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "num_selected_experts", "moe_top_k", "moe_topk"),
    "moe_intermediate_size": ("expert_intermediate_size", "moe_ffn_hidden_size"),
    "intermediate_size": ("ffn_dim", "ffn_hidden_size", "n_inner"),
    "norm_topk_prob": ("normalize_expert_weights", "moe_renormalize"),
    "decoder_sparse_step": ("moe_layer_freq",),
    "qkv_bias": ("attention_bias", "use_qkv_bias"),
    "attention_bias": ("qkv_bias", "use_qkv_bias"),
    "rms_norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
    "hidden_act": ("activation_function", "hidden_activation"),
    "tie_word_embeddings": ("tie_embeddings", "tied_embeddings", "tie_weights"),
    "sliding_window": ("window_size", "sliding_window_size"),
    "router_aux_loss_coef": ("aux_loss_coef", "moe_aux_loss_coeff", "aux_loss_alpha"),
}


def spellings(family: str, field: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the names of a field that ``transformers`` reads, its own first, and the names that it does not read."""
    read = (field, *_READ_AS_WELL.get((family, field), ()))
    return read, tuple(name for name in _FOREIGN.get(field, ()) if name not in read)


def names_beside(family: str, field: str) -> set[str]:
    """Returns all names of ``field``, including itself."""
    groups = ((of, others) for (known, of), others in _READ_AS_WELL.items() if known == family)
    own = next((of for of, others in groups if field in others), field)
    read, foreign = spellings(family, own)
    return {*read, *foreign}


_MISSING = object()


class FieldReader:
    """Reads and checks fields of a configuration, and remembers which were read."""

    def __init__(self, raw: Mapping[str, Any], family: str) -> None:
        self.raw, self.family = raw, family
        self.seen: set[str] = set()

    def get(self, field: str, kind: Kind, default: Any = _MISSING) -> Any:
        """Returns the value of a field, under any name that ``transformers`` reads.

        Raises:
            ConfigError: If the value is of another kind, two names disagree, or the field is missing and there is no
                default.
        """
        read, foreign = spellings(self.family, field)
        self.seen.update(read + foreign)
        given = {name: self.raw[name] for name in read if name in self.raw}
        for name, value in given.items():
            kind.check(name, value)
        said = {name: value for name, value in given.items() if value is not None or len(given) == 1}
        value = next(iter(said.values())) if said else None if given else default
        for name, other in said.items():
            if not _same(other, value):
                raise ConfigError(f"{next(iter(said))}={value!r} and {name}={other!r} disagree; keep one of them.")
        for name in foreign:
            if self.raw.get(name) is not None and not _same(self.raw[name], value):
                meant = "is missing" if value is _MISSING else f"is {value!r}"
                raise ConfigError(
                    f"{name}={self.raw[name]!r} is not read in {self.family}, where {field} {meant}; keep the right one "
                    f"of them as {field}."
                )
        if value is _MISSING:
            raise ConfigError(f"config.json has no field {field!r}.")
        return value

    def refuse_unless(self, field: str, neutral: tuple[Any, ...], reason: str) -> None:
        """Refuses by name a field whose value would change the result."""
        self.seen.add(field)
        value = self.raw.get(field, neutral[0])
        if not any(_same(value, accepted) for accepted in neutral):
            raise ConfigError(f"{field}={value!r} is not supported ({reason}); set it to {neutral[0]!r}.")


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
