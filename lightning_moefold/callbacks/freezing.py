# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a training step that frozen parameters save, and those that recomputation adds. Pure Python.

Each weight takes part in three products: forward, and in backward the gradients of its input and of itself. A frozen
weight needs no gradient of itself. The gradient of an input is needed only where something trains before it on a
token's way; below, *moving* says that the input depends on such a parameter. What is recomputed in backward is made once more
where there is a backward: where its output moves. An adapter's A and B take part in products of their own, which model FLOPs
know nothing of: they are negative savings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from math import prod
from types import MappingProxyType

from lightning_moefold.models import MoEConfig
from lightning_moefold.models.names import parameter_entries
from lightning_moefold.modules.recompute_parts import LAYER, half_is_recomputed

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: Factors of the products before an expert's activation; those with A are kept.
_BEFORE_ACTIVATION = ("gate_proj", "up_proj", "gate_lora_B", "up_lora_B")


class Savings:
    """The difference between model FLOPs (three times forward) and the FLOPs that are really computed.

    Args:
        config: Configuration of the model.
        frozen: Names of its frozen parameters.
        parts: What the decoder layers recompute in backward; see :func:`~.recompute_parts.recompute_parts`.
        adapter: Shapes of an adapter's A and B by name.

    Attributes:
        weights: FLOPs per token saved on products with weights, less the recomputed ones.
        still_attention: Number of layers whose queries, keys and values need no gradient.
        repeated_attention: Number of layers whose products of scores and of values are recomputed.
    """

    def __init__(
        self,
        config: MoEConfig,
        frozen: Collection[str],
        parts: frozenset[str] = frozenset(),
        adapter: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> None:
        self.config, self.frozen, self.parts = config, frozenset(frozen), parts
        self.weights = 0.0
        self.still_attention: list[int] = []
        self.repeated_attention: list[int] = []
        if self.frozen or self.parts or adapter:
            self._shapes = {name: entry.shape for name, entry in parameter_entries(config).items()} | dict(adapter)
            self._trainable: dict[str, list[str]] = defaultdict(list)  # by layer: models are long
            for name in self._shapes.keys() - self.frozen:
                self._trainable[_place(name)].append(name)
            self._walk()

    def per_token(self, sequence_length: int) -> float:
        """FLOPs saved per token of a row of ``sequence_length``; negative if recomputation adds more than is saved."""
        width = self.config.num_attention_heads * self.config.head_dim
        still, repeated = (
            sum(self.config.attended_keys(index, sequence_length) for index in layers)
            for layers in (self.still_attention, self.repeated_attention)
        )
        # Scores and values take one product each in forward, and two each in backward.
        return self.weights + 2 * 2 * width * (2 * still - repeated)

    def _walk(self) -> None:
        """Adds up the savings along a token's way through the model."""
        moving = self._trains(_EMBEDDING)
        for index in range(self.config.num_hidden_layers):
            moving = self._attention(index, moving)
            attended = moving
            moving = self._feed_forward(index, moving)
            if (LAYER in self.parts and moving) or ("attention" in self.parts and attended):
                self._repeat(index, "self_attn.")
                self.repeated_attention.append(index)
            moe = self.config.is_moe_layer(index)
            if half_is_recomputed(self.parts, moe) and moving:
                self._repeat(index, "mlp.")
            elif moe and "expert_activation" in self.parts and self._experts_move(index, attended):
                self._repeat(index, *(f"mlp.experts.{name}" for name in _BEFORE_ACTIVATION))
        head = _EMBEDDING if self.config.tie_word_embeddings else _HEAD
        self._multiply(head, moving or self._trains("model.norm."))

    def _trains(self, *prefixes: str) -> bool:
        """Whether any parameter whose name starts with one of these prefixes is trainable."""
        return any(name.startswith(prefixes) for name in self._trainable[_place(prefixes[0])])

    def _experts_move(self, index: int, moving: bool) -> bool:
        """Whether backward goes through the experts of a layer."""
        layer = f"model.layers.{index}."
        return moving or self._trains(
            *(f"{layer}{n}." for n in ("post_attention_layernorm", "mlp.gate", "mlp.experts"))
        )

    def _multiply(self, name: str, moving: bool) -> None:
        """Adds the FLOPs saved on one weight."""
        self.weights += self._product(name) * ((name in self.frozen) + (not moving))
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight":
            self._adapt([f"{owner}.lora_A"], [f"{owner}.lora_B"], moving)

    def _adapt(self, first: list[str], second: list[str], moving: bool) -> None:
        """Takes off the products of an adapter: of the input with A, and of that with B, or with several."""
        if first[0] not in self._shapes:
            return
        moves = moving or first[0] not in self.frozen
        for names, moved in ((first, moving), (second, moves)):
            self.weights -= sum(self._product(n) * (1 + moved + (n not in self.frozen)) for n in names)

    def _product(self, name: str) -> float:
        """Returns the FLOPs of one token's product with a weight."""
        weights = 2.0 * prod(self._shapes[name])
        return weights * (self.config.num_experts_per_tok / self.config.num_experts if ".mlp.experts." in name else 1)

    def _repeat(self, index: int, *parts: str) -> None:
        """Subtracts the FLOPs of products with the weights of parts of a layer."""
        prefixes = tuple(f"model.layers.{index}.{part}" for part in parts)
        matrices = (n for n, shape in self._shapes.items() if n.startswith(prefixes) and len(shape) > 1)
        self.weights -= sum(map(self._product, matrices))

    def _attention(self, index: int, moving: bool) -> bool:
        """Adds the FLOPs saved in a layer's attention; returns whether its output is moving."""
        layer = f"model.layers.{index}."
        moving = moving or self._trains(f"{layer}input_layernorm.")
        for name in "qkv":
            self._multiply(f"{layer}self_attn.{name}_proj.weight", moving)
        moving = moving or self._trains(*(f"{layer}self_attn.{name}_" for name in "qkv"))
        if not moving:
            self.still_attention.append(index)
        self._multiply(f"{layer}self_attn.o_proj.weight", moving)
        return moving or self._trains(f"{layer}self_attn.o_proj.")

    def _feed_forward(self, index: int, moving: bool) -> bool:
        """Adds the FLOPs saved in a layer's feed-forward part; returns whether its output is moving."""
        layer = f"model.layers.{index}."
        moving = moving or self._trains(f"{layer}post_attention_layernorm.")
        if self.config.is_moe_layer(index):
            self._multiply(f"{layer}mlp.gate.weight", moving)
            blocks = [f"{layer}mlp.experts."]
            if self.config.shared_expert_intermediate_size:
                self._multiply(f"{layer}mlp.shared_expert_gate.weight", moving)
                blocks.append(f"{layer}mlp.shared_expert.")
        else:
            blocks = [f"{layer}mlp."]
        for block in blocks:
            routed = block.endswith("experts.")
            tail = "" if routed else ".weight"
            inner = [f"{block}gate_proj", f"{block}up_proj"]
            for name in inner:
                self._multiply(name + tail, moving)
            if routed:  # its weights are multiplied in before the last product
                inner += [f"{layer}mlp.gate.", f"{block}gate_", f"{block}up_"]
                self._adapt([f"{block}gate_up_lora_A"], [f"{block}gate_lora_B", f"{block}up_lora_B"], moving)
                self._adapt([f"{block}down_lora_A"], [f"{block}down_lora_B"], moving or self._trains(*inner))
            self._multiply(f"{block}down_proj{tail}", moving or self._trains(*inner))
        return moving or self._trains(f"{layer}mlp.")


def _place(name: str) -> str:
    """Returns the prefix of the layer that a parameter belongs to, or the common prefix of parameters outside of layers."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else ""
