# SPDX-License-Identifier: Apache-2.0
"""The router decides which experts a token goes to, and with what weight.

    logits  ->  scores  ->  chosen experts  ->  weights

Each arrow is a method; a router of your own overrides one or two of them.

Legend: T tokens, D hidden size, E experts, K experts per token, N groups of experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_moefold.kernels.float32 import exact_linear
from lightning_moefold.kernels.noise import hashed, uniform
from lightning_moefold.modules.base import ParallelModule, local, new_adapter, sparing_adapters, wide
from lightning_moefold.modules.routers.options import RouterOptions
from lightning_moefold.modules.routers.registry import register_router
from lightning_moefold.modules.sequence import SequenceBatch


class RouterOutput(NamedTuple):
    """The decisions of a router. All tensors except the expert numbers are in at least float32.

    It is a tuple, because FSDP2 (in torch 2.11) finds the tensors in tuples but not in dataclasses.

    Args:
        weight_TK: Weight of each chosen expert.
        expert_TK: Numbers of the chosen experts, int64; K different ones per token.
        probability_TE: Probability of each expert for load-balancing losses; sums to 1 over the experts.
        logits_TE: Logits, before the score function.
    """

    weight_TK: Tensor
    expert_TK: Tensor
    probability_TE: Tensor
    logits_TE: Tensor


@register_router("top_k")
class Router(ParallelModule):
    """Scores all experts and takes the best K, in at least float32 whatever the precision of the model.

    Args:
        hidden_size: Size of hidden states, D.
        num_experts: Number of experts, E.
        top_k: Number of experts per token, K.
        options: How experts are scored and chosen. The default is a softmax over all experts, then top-k, then weights
            that sum to 1.

    Attributes:
        layer: Number of the layer in its model, which makes the noise of layers different.
        e_score_correction_bias: Expert biases ``[E]``, added to the scores when experts are chosen, in at least float32
            whatever the precision of the model; None without ``bias_update_rate``.
        counts_E: How often each expert was chosen on this rank since the bias was last updated (int64).
        call: Number of training calls so far (int64 scalar), from which the noise of a call is made; None without noise.
        lora_scale: s of an adapter, with which ``logits = x W^T + s (x A^T) B^T``; None without one (:meth:`adapt`).
        bias_is_held: Whether the bias stays as it is, in spite of ``bias_update_rate``.
    """

    #: The options dataclass of the router.
    Options: ClassVar[type[RouterOptions]] = RouterOptions

    e_score_correction_bias: Tensor | None
    counts_E: Tensor
    call: Tensor | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float | None = None
    bias_is_held: bool = False

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, options: RouterOptions | None = None) -> None:
        super().__init__()
        self.options = self.Options() if options is None else options
        self.options.check(num_experts, top_k)
        self.num_experts, self.top_k, self.layer = num_experts, top_k, 0
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        has_bias, has_noise = self.options.bias_update_rate is not None, self.options.input_jitter > 0
        bias = torch.zeros(num_experts, dtype=wide(torch.get_default_dtype())) if has_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        counts_E = torch.zeros(num_experts, dtype=torch.int64) if has_bias else None
        self.register_buffer("counts_E", counts_E, persistent=False)
        self.register_buffer("call", torch.zeros((), dtype=torch.int64) if has_noise else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Keeps the bias and the adapter in float32, because in 16 bits most of their small steps would be lost."""
        bias = self.e_score_correction_bias
        super()._apply(sparing_adapters(self, fn), recurse)
        now = self.e_score_correction_bias
        if bias is not None and now is not None and now.dtype != wide(now.dtype):
            self.e_score_correction_bias = bias.to(now.device)
        return self

    def adapt(self, rank: int, scale: float) -> None:
        """Adds an adapter without values, A ``[rank, D]`` and B ``[E, rank]``, in the unit of the router's weight."""
        self.lora_scale = scale
        self.lora_A = new_adapter(self.weight, rank, self.weight.shape[1])
        self.lora_B = new_adapter(self.weight, self.num_experts, rank)

    def forward(self, x_TD: Tensor, batch: SequenceBatch | None = None) -> RouterOutput:
        """Chooses experts.

        Args:
            x_TD: Tokens of this rank.
            batch: Description of their rows and positions. By default the tokens are one row from position 0.
        """
        batch = batch or SequenceBatch(1, x_TD.shape[0])
        dtype = wide(x_TD.dtype)
        x_TD = x_TD.to(dtype)
        if self.training and self.options.input_jitter:
            x_TD = x_TD * self._noise(batch, x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):  # it would compute the product in 16 bits
            logits_TE = exact_linear(x_TD, local(self.weight).to(dtype))
            if self.lora_scale is not None:
                z_TR = exact_linear(x_TD, local(self.lora_A).to(dtype))
                logits_TE = logits_TE + self.lora_scale * exact_linear(z_TR, local(self.lora_B).to(dtype))
        score_TE = self.scores(logits_TE)
        expert_TK = self.choose(score_TE.detach(), batch)
        weight_TK = self.weights(logits_TE, score_TE, expert_TK)
        return RouterOutput(weight_TK, expert_TK, self.probabilities(logits_TE, score_TE), logits_TE)

    # ---- the steps -------------------------------------------------------------------------------------------------

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Computes the scores by which experts are chosen and weighed, ``[T, E] -> [T, E]``, between 0 and 1."""
        return logits_TE.softmax(-1) if self.options.score_function == "softmax" else logits_TE.sigmoid()

    def choose(self, score_TE: Tensor, batch: SequenceBatch) -> Tensor:
        """Chooses K different experts for each token, ``[T, K]`` int64.

        Args:
            score_TE: Scores, without gradient.
            batch: Description of rows and positions, for routers that need it.
        """
        return self.preferences(score_TE).topk(self.top_k, dim=-1).indices

    def preferences(self, score_TE: Tensor) -> Tensor:
        """Returns the values that compare experts, ``[T, E]``: scores plus biases, -inf outside of a token's groups."""
        if self.e_score_correction_bias is not None:
            score_TE = score_TE + self.e_score_correction_bias
        return self._within_groups(score_TE) if self.options.n_group > 1 else score_TE

    def weights(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """Computes the weights of the chosen experts, ``[T, K]``."""
        options = self.options
        if options.softmax_after_topk:
            weight_TK = logits_TE.gather(1, expert_TK).softmax(-1)
        else:
            weight_TK = score_TE.gather(1, expert_TK)
            if options.norm_topk_prob is not False:  # clamped, because all sigmoids may be zero
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).tiny)
        return weight_TK if options.routed_scaling_factor == 1 else weight_TK * options.routed_scaling_factor

    def probabilities(self, logits_TE: Tensor, score_TE: Tensor) -> Tensor:
        """Returns probabilities that sum to 1 over the experts, for load-balancing losses.

        Sigmoids are normalised through their logarithms. If they were divided by a sum plus an epsilon, the loss could
        be lowered by making all of them small.
        """
        return score_TE if self.options.score_function == "softmax" else F.logsigmoid(logits_TE).softmax(-1)

    def _within_groups(self, score_TE: Tensor) -> Tensor:
        """Keeps the scores of experts in each token's best groups; the others become -inf."""
        options = self.options
        score_TNe = score_TE.unflatten(-1, (options.n_group, -1))
        group_TN = score_TNe.topk(options.group_score_topk, dim=-1).values.sum(-1)
        kept = group_TN.topk(options.topk_group, dim=-1).indices
        closed_TN = torch.ones_like(group_TN, dtype=torch.bool).scatter_(-1, kept, False)
        return score_TNe.masked_fill(closed_TN.unsqueeze(-1), float("-inf")).flatten(-2)

    # ---- noise -----------------------------------------------------------------------------------------------------

    def next_call(self) -> Tensor | None:
        """Returns the number of this training call, if there is noise; it advances in each call with gradients."""
        if self.call is None or not self.training:
            return None
        number = self.call.clone()
        if torch.is_grad_enabled():
            self.call += 1
        return number

    def _noise(self, batch: SequenceBatch, x_TD: Tensor) -> Tensor:
        if batch.call is None:  # a MoELayer by itself; stored, so that recomputation uses the same noise
            batch.call = self.next_call()
        assert batch.call is not None
        row_T, position_T = batch.token_places(x_TD.device)
        key_T = hashed(self.options.seed, batch.call, self.layer, row_T, position_T)
        return 1 + self.options.input_jitter * (2 * uniform(key_T, x_TD.shape[1], x_TD.dtype) - 1)

    # ---- the bias of the experts -----------------------------------------------------------------------------------

    @property
    def learns_bias(self) -> bool:
        """Whether its bias moves with the load."""
        return bool(self.options.bias_update_rate) and not self.bias_is_held

    @torch.no_grad()
    def count(self, counts_E: Tensor) -> None:
        """Adds the choices of training tokens (int64) to the counts for the next update of the bias."""
        if self.learns_bias:
            self.counts_E += counts_E

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Moves the bias against the load, ``b += rate * sign(mean - count)``, and resets the counts.

        Args:
            counts_E: Number of choices of each expert on all ranks. They are compared as integers, because a
                floating-point mean may be rounded to the wrong side.
        """
        bias_E = self.e_score_correction_bias
        assert bias_E is not None
        direction_E = torch.sign(counts_E.sum() - self.num_experts * counts_E)
        bias_E.add_(direction_E.to(bias_E.dtype), alpha=self.options.bias_update_rate or 0.0)
        self.counts_E.zero_()
