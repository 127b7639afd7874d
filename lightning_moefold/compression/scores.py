# SPDX-License-Identifier: Apache-2.0
"""Scores of whole experts: the lowest of each layer are pruned.

A score is a function of sums over the tokens that chose an expert, with out_t the expert's output without router weight and
p_t the weight, normalised over the token's top-k whether or not the model does so::

    frequency   |T_e|
    reap        mean_t p_t |out_t|                                   (Cerebras, ICLR 2026)
    ean         sum_t |out_t|
    man         mean_t |out_t|                                       (arXiv 2606.15716)
    msan        mean_t |out_t|^2                                     (arXiv 2606.15716)
    mone        |T_e| sqrt(sum_t |out_t - mean|^2 / (|T_e| - 1))     (arXiv 2507.00390)

Routing is the model's own, without dropping. Another score is one function with :func:`register_expert_score`.

Legend: E experts, D hidden size, c rows of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from lightning_moefold.compression.observed import Observer, reduce_all
from lightning_moefold.errors import InputError
from lightning_moefold.mesh import Axis


class ExpertSums(Observer):
    """Sums over the tokens of each expert of a layer, in float64.

    Args:
        experts: E.
        hidden_size: D.
        device: Where the rows are.

    Attributes:
        count_E: Number of tokens.
        norm_E: Sum of ``|out|``.
        square_E: Sum of ``|out|^2``.
        weighted_norm_E: Sum of ``p |out|``.
        output_ED: Sum of ``out``.
    """

    wants_outputs = True

    def __init__(self, experts: int, hidden_size: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.count_E, self.norm_E, self.square_E, self.weighted_norm_E = (zeros(experts) for _ in range(4))
        self.output_ED = zeros(experts, hidden_size)

    def see_output(self, expert: int, output_cD: Tensor, weight_c: Tensor) -> None:
        """See :meth:`.Observer.see_output`."""
        norm_c = torch.linalg.vector_norm(output_cD, dim=1)
        self.count_E[expert] += len(weight_c)
        self.norm_E[expert] += norm_c.sum()
        self.square_E[expert] += norm_c.square().sum()
        self.weighted_norm_E[expert] += (weight_c.double() * norm_c).sum()
        self.output_ED[expert] += output_cD.sum(0)

    def reduce(self, world: Axis) -> None:
        """Sums over all ranks. Collective."""
        sums = [self.count_E, self.norm_E, self.square_E, self.weighted_norm_E, self.output_ED]
        reduce_all(sums, world, dist.ReduceOp.SUM)

    def mean(self, sum_E: Tensor) -> Tensor:
        """Divides by the number of tokens; 0 for experts without any."""
        return sum_E / self.count_E.clamp(min=1)


def _mone(sums: ExpertSums) -> Tensor:
    squares_E = sums.square_E - sums.count_E * sums.mean(sums.output_ED.square().sum(1).sqrt()).square()
    return sums.count_E * (squares_E.clamp(min=0) / (sums.count_E - 1).clamp(min=1)).sqrt()


#: Maps sums to a score of each expert, ``[E]``.
ExpertScore = Callable[[ExpertSums], Tensor]

#: The scores by name, as above.
EXPERT_SCORES: dict[str, ExpertScore] = {
    "frequency": lambda sums: sums.count_E,
    "reap": lambda sums: sums.mean(sums.weighted_norm_E),
    "ean": lambda sums: sums.norm_E,
    "man": lambda sums: sums.mean(sums.norm_E),
    "msan": lambda sums: sums.mean(sums.square_E),
    "mone": _mone,
}


def register_expert_score(name: str) -> Callable[[ExpertScore], ExpertScore]:
    """Adds a score under a name, which ``moefold prune-experts --score`` then takes.

    Raises:
        InputError: If the name is taken.
    """

    def register(score: ExpertScore) -> ExpertScore:
        if name in EXPERT_SCORES:
            raise InputError(f"an expert score {name!r} exists already; choose another name.")
        EXPERT_SCORES[name] = score
        return score

    return register


def expert_score(name: str) -> ExpertScore:
    """Returns the score of a name.

    Raises:
        InputError: If there is none.
    """
    if name not in EXPERT_SCORES:
        raise InputError(f"--score {name} is not known; use {', '.join(EXPERT_SCORES)}.")
    return EXPERT_SCORES[name]


def experts_to_keep(score_E: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Returns the ``count`` experts with the highest scores, in their order in the layer; of equal ones the later stay."""
    return np.sort(np.argsort(score_E, kind="stable")[len(score_E) - count :])
