# SPDX-License-Identifier: Apache-2.0
"""The gated feed-forward layer (SwiGLU, arXiv 2002.05202): dense layers and the shared expert."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from lightning_moefold.fold import Fold
from lightning_moefold.kernels import gated
from lightning_moefold.layout import Cut, ParameterPlan, TensorGradient, chunk_split, even_split
from lightning_moefold.mesh import FoldedMesh
from lightning_moefold.modules.base import Linear, ParallelRoot, column_plans, placed, row_plans
from lightning_moefold.modules.sequence import SequenceBatch
from lightning_moefold.modules.standalone import run_standalone

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class GatedMLP(ParallelRoot):
    """Computes ``down(act(gate(x)) * up(x))``; the width F is cut over tp.

    Args:
        hidden_size: Size of hidden states, D.
        ffn_hidden_size: Width of the layer, F.
        activation: Activation function, a name in :data:`ACTIVATIONS`.
        uneven: Whether tp may cut the width into unequal parts, as after pruning.
    """

    def __init__(
        self, hidden_size: int, ffn_hidden_size: int, activation: str = "silu", *, uneven: bool = False
    ) -> None:
        super().__init__()
        self.uneven = uneven
        self.hidden_size, self.ffn_hidden_size = hidden_size, ffn_hidden_size
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = Linear(hidden_size, ffn_hidden_size)
        self.up_proj = Linear(hidden_size, ffn_hidden_size)
        self.down_proj = Linear(ffn_hidden_size, hidden_size)

    def bind(self, mesh: FoldedMesh) -> None:
        """Receives the tensor parallel axis."""
        super().bind(mesh)
        if isinstance(self.down_proj, Linear):
            self.down_proj.lora_inputs = self.tp

    def plans(self, fold: Fold) -> dict[str, ParameterPlan]:
        """Cuts rows of gate and up, and columns of down."""
        if not self.uneven:
            fold.check_width("tp", "ffn_hidden_size", self.ffn_hidden_size)
        sizes = (chunk_split if self.uneven else even_split)(self.ffn_hidden_size, fold.tp)
        rows, columns = (
            ParameterPlan(cuts=(Cut("tp", dim, sizes),), gradient=TensorGradient.SHARDED) for dim in (0, 1)
        )
        return {
            **row_plans(self.gate_proj, "gate_proj", rows),
            **row_plans(self.up_proj, "up_proj", rows),
            **column_plans(self.down_proj, "down_proj", columns),
        }

    def forward(
        self, x: Tensor, batch: SequenceBatch | None = None, halfway: Callable[[], None] | None = None
    ) -> Tensor:
        """Runs the layer.

        Args:
            x: Tokens ``[T, D]``; without ``batch``, ``[..., D]``, the same on every tp rank.
            batch: Description of how the tokens are spread.
            halfway: Function called before the product back to the hidden size. In backward, its computations are also
                differentiated between the two halves.

        Returns:
            A tensor of the shape of ``x``.
        """
        if batch is None:
            return run_standalone(self, x)
        x_ND = batch.gather(x)
        places = batch.all_tokens(x.device)
        gate_NF, up_NF = (part(x_ND, **placed(part, places)) for part in (self.gate_proj, self.up_proj))
        inner_NF = gated(self.activation, gate_NF, up_NF)
        if halfway is not None:
            halfway()
        return batch.reduce_scatter(self.down_proj(inner_NF, **placed(self.down_proj, places)))
