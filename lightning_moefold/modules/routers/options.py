# SPDX-License-Identifier: Apache-2.0
"""Options of routers: how they score, choose and weigh experts. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from lightning_moefold.errors import InputError


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of the built-in routers. A router of your own may add fields in a subclass.

    The defaults are those of Mixtral, Qwen2-MoE and Qwen3-MoE. Fields that ``transformers`` also has bear its names.

    Args:
        name: Registered name of the router (:func:`~.registry.register_router`): ``"top_k"``, ``"swipe"``,
            ``"topology_aware"``, ``"force_balanced"``, or that of your own router. The second and third have their own
            options classes.
        score_function: ``"softmax"`` over all experts, or ``"sigmoid"`` of each expert's logit (DeepSeek-V3).
        softmax_after_topk: Whether weights are a softmax over the logits of the chosen experts only, which equals a
            normalised softmax over all. The choice of experts is the same.
        norm_topk_prob: Whether a token's K weights are divided by their sum. None means the value of the model's
            configuration, and True in a ``MoELayer`` by itself.
        routed_scaling_factor: Factor of the weights, applied last.
        n_group: Number of groups of neighbouring experts; a token's experts come from ``topk_group`` of them. With one
            group per node this limits the nodes that a token travels to.
        topk_group: Number of groups from which a token's experts come.
        group_score_topk: Number of a group's best scores whose sum is the score of the group: 2 in DeepSeek-V3, 1 in
            DeepSeek-V2.
        bias_update_rate: Step of the expert biases. A bias affects which experts are chosen but not their weights, and
            moves by this step after each optimizer step: up for experts with less than the mean load, down for those
            with more (arXiv 2408.15664). 0 keeps the biases unchanged; None means no bias.
        input_jitter: Strength of noise in training: the router's input is multiplied by numbers between ``1 -
            input_jitter`` and ``1 + input_jitter``. The experts get the input without noise.
        seed: Seed of the noise.

    Raises:
        ValueError: If values contradict each other.
    """

    #: Fields that do not change the prediction of a trained model, or whose effect ``transformers`` also implements.
    NOT_IN_PREDICTION: ClassVar[frozenset[str]] = frozenset({"norm_topk_prob", "input_jitter", "seed"})

    name: str = "top_k"
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    softmax_after_topk: bool = False
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    group_score_topk: int = 2
    bias_update_rate: float | None = None
    input_jitter: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.score_function not in ("softmax", "sigmoid"):
            raise InputError(f"score_function={self.score_function!r} is not known; use 'softmax' or 'sigmoid'.")
        if self.softmax_after_topk and self.score_function != "softmax":
            raise InputError("softmax_after_topk=True goes with score_function='softmax' only; leave one of them out.")
        if self.softmax_after_topk and self.norm_topk_prob is False:
            raise InputError(
                "weights that are a softmax over the chosen experts have the sum 1; leave out norm_topk_prob=False or "
                "softmax_after_topk=True."
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise InputError(f"topk_group={self.topk_group} must lie between 1 and n_group={self.n_group}.")
        if self.group_score_topk < 1:
            raise InputError(f"group_score_topk={self.group_score_topk} must be at least 1.")
        if self.bias_update_rate is not None and self.bias_update_rate < 0:
            raise InputError(
                f"bias_update_rate={self.bias_update_rate} must not be negative; 0 keeps the bias as it is."
            )
        if not 0 <= self.input_jitter < 1:
            raise InputError(f"input_jitter={self.input_jitter} must lie between 0 and 1, 1 excluded.")

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises a ValueError unless these options fit a layer with ``num_experts`` experts, ``top_k`` of them per token."""
        if not 1 <= top_k <= num_experts:
            raise InputError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}.")
        if self.n_group == 1:
            return
        if num_experts % self.n_group:
            raise InputError(f"n_group={self.n_group} must divide num_experts={num_experts}.")
        size = num_experts // self.n_group
        if top_k > size * self.topk_group:
            raise InputError(
                f"top_k={top_k} is more than the {size * self.topk_group} experts of topk_group={self.topk_group} groups; "
                "allow more groups."
            )
        if self.group_score_topk > size:
            raise InputError(
                f"group_score_topk={self.group_score_topk} is more than the {size} experts of a group; use at most {size}."
            )

    @property
    def changes_prediction(self) -> bool:
        """Whether a trained model computes a different result than with default options (except for normalisation)."""
        return bool(set(self.as_dict()) - self.NOT_IN_PREDICTION)

    @property
    def changes_training(self) -> bool:
        """Whether training computes a different result than with default options (except for normalisation)."""
        return bool(set(self.as_dict()) - {"norm_topk_prob", "seed"})

    def as_dict(self) -> dict[str, Any]:
        """Returns, as plain data, the fields that differ from their defaults, and the name unless it is the default router's."""
        named = {} if self.name == RouterOptions.name else {"name": self.name}
        return named | {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class SwipeOptions(RouterOptions):
    """Options of :class:`~.swipe.SwipeRouter`: those of all routers except groups.

    Raises:
        ValueError: If values contradict each other.
    """

    NOT_IN_PREDICTION: ClassVar[frozenset[str]] = RouterOptions.NOT_IN_PREDICTION | {"name"}

    name: str = "swipe"

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_groups(self)


@dataclass(frozen=True, kw_only=True)
class TopologyAwareOptions(RouterOptions):
    """Options of :class:`~.topology_aware.TopologyAwareRouter`: those of all routers except groups, and three more.

    Nodes are logical, so that training is the same under every fold. docs/routers.md says under which folds they are
    the real machines.

    Args:
        nodes: Number of nodes over which the experts are spread in blocks of neighbours. Required.
        far_fraction: Largest share of a row's choices that may be experts on other nodes, from 0 to 1.
        data_ranks: Number of ranks to which rows are dealt in turn; each node holds an equal block of neighbouring
            ranks. By default ``nodes``.

    Raises:
        ValueError: If values contradict each other.
    """

    NOT_IN_PREDICTION: ClassVar[frozenset[str]] = RouterOptions.NOT_IN_PREDICTION | {
        "name", "nodes", "far_fraction", "data_ranks",
    }  # fmt: skip

    name: str = "topology_aware"
    nodes: int = 0
    far_fraction: float = 0.14
    data_ranks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse_groups(self)
        if self.nodes < 1:
            raise InputError(
                f"nodes={self.nodes} must be at least 1; give the nodes over which the experts are spread."
            )
        if not 0 <= self.far_fraction <= 1:
            raise InputError(f"far_fraction={self.far_fraction} must lie between 0 and 1.")
        if self.data_ranks is not None and (self.data_ranks < 1 or self.data_ranks % self.nodes):
            raise InputError(
                f"data_ranks={self.data_ranks} must be a multiple of nodes={self.nodes}, so that each node has equally many."
            )

    def check(self, num_experts: int, top_k: int) -> None:
        """See :meth:`RouterOptions.check`."""
        super().check(num_experts, top_k)
        if num_experts % self.nodes:
            raise InputError(f"nodes={self.nodes} must divide num_experts={num_experts}.")
        if top_k > num_experts // self.nodes:
            raise InputError(
                f"top_k={top_k} is more than the {num_experts // self.nodes} experts of one of nodes={self.nodes}, but all of a "
                "token's experts must fit on one node; use fewer nodes."
            )


def _refuse_groups(options: RouterOptions) -> None:
    if options.n_group > 1:
        raise InputError(
            f"n_group={options.n_group} cannot be used with the router {options.name!r}, which may have to send a token to any "
            "expert; leave it out."
        )
