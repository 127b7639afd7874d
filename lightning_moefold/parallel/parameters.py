# SPDX-License-Identifier: Apache-2.0
"""Which parameter is which: names, layouts, and what each gradient still needs, for a whole LightningModule."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_moefold.layout import Box, Family, ParameterLayout, TensorGradient
from lightning_moefold.mesh import Axis, FoldedMesh
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.parallel.network.runner import network_runners


class ParameterRegistry:
    """Made once parameters are final. Collective: every rank of the world makes it.

    Parameters of language models and blocks have a layout, and all those of a network that is spread over pipeline stages.
    All others are the user's own: dense, replicated on every rank, with identical gradients over tp and gradients summed over
    data ranks, as under DDP.

    Args:
        root: The LightningModule.
        mesh: The folded mesh.
    """

    def __init__(self, root: nn.Module, mesh: FoldedMesh) -> None:
        self.mesh = mesh
        layouts: dict[int, ParameterLayout] = {}
        everywhere: set[str] = set()
        self.roots = dict(parallel_roots(root))
        for prefix, part in self.roots.items():
            part.release_gathered_weights()
            layouts |= {id(p): part.layouts[name] for name, p in part.named_parameters()}
            everywhere |= {f"{prefix}.{name}".lstrip(".") for name in part.layouts}
        shared = any(len(layout.stages or ()) == 2 for part in self.roots.values() for layout in part.layouts.values())
        for prefix, runner in network_runners(root):
            if runner.pipeline is not None:
                shared = shared or runner.shares_ends
                own = runner.network.module.named_parameters()
                layouts |= {id(p): runner.layouts[name] for name, p in own if name in runner.layouts}
                everywhere |= {f"{prefix}.{name}".lstrip(".") for name in runner.names}
        #: The two stages that share parameters, if any do; known to, and made by, all ranks.
        self._ends = mesh.ends if shared else None
        # By identity: the user may hold a part of the model under a second name, which is in the state dict, too.
        everything = root.named_parameters(remove_duplicate=False)
        self.layouts = {name: layouts[id(p)] for name, p in everything if id(p) in layouts}
        self.names = {id(p): name for name, p in root.named_parameters()}
        self._parameters = dict(root.named_parameters())
        #: Parameters and stored buffers that only other pipeline stages hold.
        here = {
            f"{prefix}.{name}".lstrip(".") for prefix, part in self.roots.items() for name, _ in part.stored_buffers()
        }
        self.elsewhere = everywhere - set(self.layouts) - here

    @property
    def sharded(self) -> bool:
        """Whether any parameter is stored in pieces by the strategy, even if one rank holds them all."""
        return bool(self.layouts)

    def own(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The user's own parameters."""
        return ((name, p) for name, p in self._parameters.items() if name not in self.layouts)

    def box(self, name: str) -> Box:
        """The part of parameter ``name`` that this rank stores."""
        return self.layouts[name].box(self.mesh.fold, self.mesh.rank)

    def owns(self, name: str) -> bool:
        """Whether this rank is the one that counts and writes its piece of ``name``."""
        if name not in self.layouts:
            return self.mesh.rank == 0
        return self.layouts[name].is_owner(self.mesh.fold, self.mesh.rank)

    def counts_here(self, parameter: nn.Parameter) -> bool:
        """Whether this rank counts the parameter's piece in a norm."""
        name = self.names.get(id(parameter))
        return self.mesh.rank == 0 if name is None else self.owns(name)

    def is_expert(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter is of the EXPERT family; the user's own are dense."""
        layout = self.layouts.get(self.names.get(id(parameter), ""))
        return layout is not None and layout.plan.family is Family.EXPERT

    def unfinished_gradients(self) -> Iterator[tuple[nn.Parameter, Axis]]:
        """Parameters whose gradients FSDP2 does not finish, as :class:`~.gradients.GradientSum` takes them."""
        for name, parameter in self._parameters.items():
            layout = self.layouts.get(name)
            if layout is None:
                yield parameter, self.mesh.dp_cp
                continue
            if layout.plan.gradient is TensorGradient.PARTIAL:
                # Of experts: what an adapter holds whole on the ranks among which an expert's width is cut.
                yield parameter, self.mesh.axis("etp") if layout.plan.family is Family.EXPERT else self.mesh.tp
            if layout.data_dim is None:  # replicated, or there is but one copy
                yield parameter, self.mesh.axis(layout.data_axis)
            if layout.stages is not None and len(layout.stages) == 2:  # used by both, each of which has a part
                assert self._ends is not None
                yield parameter, self._ends
