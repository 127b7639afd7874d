# SPDX-License-Identifier: Apache-2.0
"""What a :class:`~.base.Linear` with an adapter computes besides its two products: dropout, and the norms of DoRA.

Legend: N tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_moefold import comm
from lightning_moefold.kernels.dropout import drop_by
from lightning_moefold.kernels.noise import hashed
from lightning_moefold.mesh import Axis

Places: TypeAlias = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Returns the number of the training call, and row and position of each token, ``[N]``."""


def drop(x_NI: Tensor, probability: float, key: int, places: Places, first: int) -> Tensor:
    """Sets numbers to zero with a probability, and scales the others so that the mean stays.

    What is dropped depends on the token's place, the call, the module and the input alone: the same under every fold, and when
    it is computed again.

    Args:
        x_NI: Inputs.
        probability: Of being dropped.
        key: Of the module and the seed.
        places: Of the tokens.
        first: Number of the first of these inputs among all that the module has.
    """
    return drop_by(x_NI, hashed(key, *places()), probability, first)


@torch.no_grad()
def row_norms(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, axis: Axis) -> Tensor:
    """Returns the norm of each row of ``W + s B A``, ``[O]``, in at least float32, without making the sum.

    Collective if the inputs are cut over ``axis``.
    """
    dtype = torch.promote_types(weight_OI.dtype, torch.float32)
    a, b = a_RI.to(dtype), b_OR.to(dtype)
    cross_OR = (weight_OI @ a_RI.t().to(weight_OI.dtype)).to(dtype)
    square_O = torch.linalg.vector_norm(weight_OI, dim=1, dtype=dtype).square()
    square_O += scale * ((2 * cross_OR + scale * (b @ (a @ a.t()))) * b).sum(1)
    return comm.all_reduce_raw(square_O, axis).clamp_(min=0).sqrt_()
