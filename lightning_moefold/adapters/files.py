# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``.

The tensors of a file say which modules have an adapter; the configuration adds ranks and scales. Every field that
changes what is computed is honoured or refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_moefold.adapters.attach import adaptable_modules, is_module_in_peft
from lightning_moefold.adapters.config import LoRA
from lightning_moefold.adapters.layout import MIXTRAL, PREFIX, matrix_names, read_fused, read_separate, stored_leaf
from lightning_moefold.errors import CheckpointError, InputError
from lightning_moefold.layout import Box
from lightning_moefold.modules.base import Linear
from lightning_moefold.modules.experts.experts import Experts
from lightning_moefold.modules.routers import Router

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
#: Fields that :class:`AdapterFiles` reads, and those that change nothing once the tensors are there.
_KNOWN = {
    "lora_dropout", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "peft_type",
    "init_lora_weights",
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "ensure_weight_tying", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_OWN = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
_EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.lora_([AB])\.weight$")


class AdapterFiles:
    """An adapter in a directory: its configuration, and pieces of its A and B.

    Args:
        path: The directory.
        model: The model without an adapter, before it is cut; it needs no storage.

    Attributes:
        lora: Configuration of the adapter.
        dropout: Dropout with which it was trained, if it cannot go on so; it affects only training.

    Raises:
        CheckpointError: If the directory holds no LoRA adapter, or it does not fit the model.
    """

    def __init__(self, path: str | Path, model: nn.Module) -> None:
        self.path = Path(path)
        self._file = self.path / TENSORS
        config = self._read_config()
        self.dropout = float(config.get("lora_dropout") or 0.0)
        self._handle: Any = None
        self._shapes = self._read_header()
        modules = adaptable_modules(model)
        self._places = {name: self._name_of(name) for name in modules}
        self._separate = any(_EXPERT.match(name) for name in self._shapes)
        self._separate_gate_up = False
        self._experts = {name for name, module in modules.items() if isinstance(module, Experts)}
        self.lora = self._describe(config, modules)

    # ---- reading what it is ------------------------------------------------------------------------------------

    def _read_config(self) -> dict[str, Any]:
        file = self.path / CONFIG
        if not file.is_file() or not self._file.is_file():
            raise CheckpointError(f"{self.path} holds no adapter: it needs {CONFIG} and {TENSORS}.")
        try:
            config = json.loads(file.read_text())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} is not JSON ({error}).") from None
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise CheckpointError(f"{file} describes no LoRA adapter, and no other kind is read.")
        for key, value in config.items():
            neutral = key in _KNOWN or value == "none" or (not value and key != "bias")
            if not neutral or (key == "init_lora_weights" and not isinstance(value, bool) and value != "gaussian"):
                raise CheckpointError(f"{file} has {key}={value!r}, which is not supported here.")
        return config

    def _read_header(self) -> dict[str, tuple[int, ...]]:
        try:
            with safe_open(str(self._file), framework="pt") as opened:
                return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file} is damaged or truncated ({error}).") from None

    def _name_of(self, name: str) -> str:
        """Returns a module's name in the file; Mixtral's blocks may have another name."""
        old = f"{PREFIX}{name.replace('.mlp.', '.block_sparse_moe.')}."
        return old[:-1] if any(stored.startswith(old) for stored in self._shapes) else f"{PREFIX}{name}"

    def _describe(self, config: dict[str, Any], modules: Mapping[str, nn.Module]) -> LoRA:
        names: list[str] = []
        ranks: dict[bool, set[tuple[int, float]]] = {False: set(), True: set()}  # of experts (True) and others
        known: set[str] = set()
        for name, module in modules.items():
            inside = f"{self._places[name]}."
            whole = isinstance(module, Experts)
            held = {n for n in self._shapes if n.startswith(inside) and (whole or n.removeprefix(inside) in _OWN)}
            if not held:
                continue
            names.append(name)
            known |= held
            if isinstance(module, Experts):
                ranks[True].add(self._describe_experts(name, module, config))
            else:
                ranks[False].add(self._describe_linear(name, module, config))
        unknown = sorted(set(self._shapes) - known)
        if unknown or not names:
            what = f"holds {unknown[0]!r}, for which the model has no place" if unknown else "holds no tensors"
            raise CheckpointError(f"{self._file} {what}; give the adapter of this model.")
        for of_experts, found in ranks.items():
            if len(found) > 1:
                what = "experts" if of_experts else "modules"
                raise CheckpointError(f"{self.path} has {what} of several ranks or scales, and one is supported here.")
        linear, experts = (next(iter(ranks[kind]), None) for kind in (False, True))
        root = bool(config.get("use_rslora"))
        rank, scale = linear or experts or (1, 1.0)
        alpha = scale * (rank**0.5 if root else rank)
        if experts is not None and abs(experts[1] - alpha / (experts[0] ** 0.5 if root else experts[0])) > 1e-9:
            raise CheckpointError(
                f"{self.path} scales experts by another alpha than the rest, which is not supported here."
            )
        dropout = 0.0
        if all(isinstance(modules[name], Linear) for name in names):
            dropout, self.dropout = self.dropout, 0.0
        return LoRA(
            rank, alpha, compressed(names, modules), None if experts is None else experts[0], dropout, root,
            bool(config.get("use_dora")), separate_gate_up=self._separate_gate_up,
        )  # fmt: skip

    def _describe_linear(self, name: str, module: nn.Module, config: dict[str, Any]) -> tuple[int, float]:
        if isinstance(module, Linear):
            out_features, in_features = module.out_features, module.in_features
        else:
            assert isinstance(module, Router)
            out_features, in_features = module.weight.shape
        rank = self._rank_of(name, config)
        self._expect(f"{self._places[name]}.lora_A.weight", (rank, in_features), name)
        self._expect(f"{self._places[name]}.lora_B.weight", (out_features, rank), name)
        lengths = f"{self._places[name]}.lora_magnitude_vector"
        if config.get("use_dora"):
            self._expect(lengths, (out_features,), name)
        elif lengths in self._shapes:
            raise CheckpointError(f"{self._file} holds {lengths!r}, but {CONFIG} does not say use_dora.")
        return rank, self._scale_of(name, rank, config)

    def _describe_experts(self, name: str, module: Experts, config: dict[str, Any]) -> tuple[int, float]:
        e, f, d, place = module.num_experts, module.ffn_hidden_size, module.hidden_size, self._places[name]
        if self._separate:
            if config.get("use_rslora"):
                raise CheckpointError(
                    f"{self.path} has use_rslora with an adapter for each matrix, which is not supported here."
                )
            matrices = self._matrices(place)
            rank = self._rank_of(f"{place.removeprefix(PREFIX)}.0.{matrices['down_proj']}", config)
            for expert in range(e):
                for matrix, (out, into) in {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}.items():
                    key = f"{place}.{expert}.{matrices[matrix]}"
                    self._expect(f"{key}.lora_A.weight", (rank, into), key)
                    self._expect(f"{key}.lora_B.weight", (out, rank), key)
            self._separate_gate_up = True
            return rank, self._scale_of(f"{place.removeprefix(PREFIX)}.0.{matrices['down_proj']}", rank, config)
        ranks = {part: self._rank_of(f"{name}.{part}", config) for part in ("gate_up_proj", "down_proj")}
        for part, depth, out, into in (("gate_up_proj", ".base_layer", 2 * f, d), ("down_proj", "", d, f)):
            self._expect(f"{place}{depth}.lora_A.weight", (e * ranks[part], into), f"{name}.{part}")
            self._expect(f"{place}{depth}.lora_B.weight", (out, ranks[part] * e), f"{name}.{part}")
        rank, twice = ranks["down_proj"], ranks["gate_up_proj"]
        scales = {self._scale_of(f"{name}.{part}", ranks[part], config) for part in ranks}
        if twice not in (rank, 2 * rank) or len(scales) > 1:
            raise CheckpointError(
                f"{self.path} has rank {twice} for gate and up and {rank} for down of its experts, or another scale; equal ones "
                "are supported here, and twice the rank for gate and up."
            )
        self._separate_gate_up = twice == 2 * rank
        return rank, scales.pop()

    def _matrices(self, place: str) -> dict[str, str]:
        return matrix_names(mixtral=f"{place}.0.gate_proj.lora_A.weight" not in self._shapes)

    def _expect(self, name: str, shape: tuple[int, ...], what: str) -> None:
        if name not in self._shapes:
            whose = what.removeprefix(PREFIX)
            raise CheckpointError(f"{self._file} has no {name!r}; it needs A and B of all matrices of {whose!r}.")
        if self._shapes[name] != tuple(shape):
            raise CheckpointError(
                f"{name!r} in {self._file} has shape {list(self._shapes[name])}, and model and {CONFIG} make it {list(shape)}; "
                "give the adapter of this model."
            )

    def _rank_of(self, key: str, config: dict[str, Any]) -> int:
        return int(_pattern(config.get("rank_pattern"), key, config.get("r", 8)))

    def _scale_of(self, key: str, rank: int, config: dict[str, Any]) -> float:
        alpha = float(_pattern(config.get("alpha_pattern"), key, config.get("lora_alpha", 8)))
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    # ---- reading its values ------------------------------------------------------------------------------------

    def fill(self, name: str, box: Box, out: Tensor) -> None:
        """Copies the part ``box`` of parameter ``name`` (its name in the model) into ``out``, whatever its dtype and device."""
        if box.numel == 0:
            return
        owner, _, leaf = name.rpartition(".")
        place, shape = self._places[owner], self._parameters[name]
        if owner not in self._experts:
            out.copy_(self._read(f"{place}.{stored_leaf(leaf)}", box.slices()))
        elif not self._separate:
            out.copy_(read_fused(self._read, place, leaf, shape, box))
        else:
            first, *rest = box.slices()
            matrices = self._matrices(place)
            for piece, expert in zip(out, range(shape[0])[first], strict=True):
                whole = read_separate(self._read, f"{place}.{expert}", leaf, shape[1:], matrices)
                piece.copy_(whole[tuple(rest)])

    def adopt(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Receives the global shapes of the parameters, once the model has them."""
        self._parameters = dict(shapes)

    def _read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        if self._handle is None:
            self._handle = safe_open(str(self._file), framework="pt")
        try:
            return self._handle.get_slice(name)[slices] if slices else self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name!r} cannot be read from {self._file} ({error}).") from None

    def close(self) -> None:
        """Closes the file."""
        self._handle = None


def _pattern(patterns: Mapping[str, Any] | None, key: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a name, as PEFT looks it up: of a module or of its weight."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in (key, f"{key}.weight")):
            return value
    return default


def compressed(names: Iterable[str], there: Iterable[str]) -> list[str]:
    """Shortens names of modules to the part after the last dot, if all modules of ``there`` with this ending are included."""
    chosen = set(names)
    leaves = {name.rpartition(".")[2] for name in chosen}
    whole = {leaf for leaf in leaves if all(n in chosen for n in there if n.rpartition(".")[2] == leaf)}
    rest = [name for name in there if name in chosen and name.rpartition(".")[2] not in whole]
    return [*sorted(whole), *rest]


def peft_config(lora: LoRA, names: Iterable[str], model: nn.Module) -> dict[str, Any]:
    """Returns the content of ``adapter_config.json`` for an adapter.

    In these families PEFT reads ``gate_proj`` in the list of modules as that of the experts, so dense layers are listed
    as parameters.
    """
    names = list(names)
    there, modules, parameters = adaptable_modules(model), [], []
    for name in compressed(names, there):
        module = next(m for n, m in there.items() if n == name or n.endswith(f".{name}"))
        if isinstance(module, Experts):
            parameters += [f"{name}.gate_up_proj", f"{name}.down_proj"]
        elif is_module_in_peft(name, module):
            modules.append(name)
        else:
            parameters.append(f"{name}.weight")
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    if any(isinstance(there[name], Experts) for name in names):
        ranks = {"experts.down_proj": lora.down_rank, "experts.gate_up_proj": lora.gate_up_rank}
        rank_pattern = {part: rank for part, rank in ranks.items() if rank != lora.rank}
        if lora.separate_gate_up:
            alpha_pattern["experts.gate_up_proj"] = 2 * lora.alpha
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": 0.0 if parameters else lora.dropout, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora, "target_modules": modules, "target_parameters": parameters or None,
        "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
    }  # fmt: skip


def separate_config(config: Mapping[str, Any], lora: LoRA, experts: int, names: dict[str, str]) -> dict[str, Any]:
    """The same for a file with an adapter for each matrix of an expert, whose readers know modules only.

    Args:
        config: Result of :func:`peft_config`.
        lora: The adapter.
        experts: Experts of a layer.
        names: Names of an expert's matrices in the file; Mixtral's modules had other names, too.

    Raises:
        InputError: If gate and up of an expert share an A that is not of either.
    """
    if lora.separate_gate_up:
        raise InputError(
            "gate and up of an expert share an A of twice the rank, which has no form with an adapter for each matrix; leave "
            "separate_experts out."
        )
    mixtral = names == MIXTRAL
    others, matrices = list(config["target_modules"]), []
    for parameter in config["target_parameters"] or []:
        owner, _, leaf = parameter.rpartition(".")
        if leaf == "weight":
            others.append(owner)
        elif leaf == "down_proj":
            matrices += [f"{owner}.{e}.{name}" for e in range(experts) for name in names.values()]
    modules = [name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name for name in (*others, *matrices)]
    rank = lora.down_rank if matrices else lora.rank
    # A router is a module to older readers, and its weight to newer ones.
    pattern = {f"{re.escape(name)}(\\.weight)?": lora.rank for name in modules[: len(others)] if rank != lora.rank}
    changed = {"r": rank, "target_modules": modules, "target_parameters": None, "rank_pattern": pattern}
    return {**config, **changed, "alpha_pattern": {}}
