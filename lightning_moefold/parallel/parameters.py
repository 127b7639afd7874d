# SPDX-License-Identifier: Apache-2.0
"""Which parameter is which: names, layouts, and what each gradient still needs, for a whole LightningModule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from lightning_moefold import comm
from lightning_moefold.balance.placement import Placement
from lightning_moefold.layout import Box, Family, ParameterLayout, TensorGradient
from lightning_moefold.mesh import Axis, FoldedMesh
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.modules.moe import MoELayer
from lightning_moefold.parallel.network.runner import network_runners


class ParameterRegistry:
    """Made once the parameters of a LightningModule are final. Collective: every rank of the world makes it.

    Parameters of language models and blocks have a layout, and all those of a network that is spread over pipeline stages.
    All others are the user's own: dense, replicated on every rank, with identical gradients over tp and gradients summed over
    data ranks, as under DDP.
    """

    def __init__(self, root: nn.Module, mesh: FoldedMesh) -> None:
        self.mesh, self._root = mesh, root
        self.roots = dict(parallel_roots(root))
        for part in self.roots.values():
            part.release_gathered_weights()
        everywhere = {f"{prefix}.{name}".lstrip(".") for prefix, part in self.roots.items() for name in part.layouts}
        shared = any(
            len(layout.pp_ranks or ()) == 2 for part in self.roots.values() for layout in part.layouts.values()
        )
        for prefix, runner in network_runners(root):
            if runner.pipeline is not None:
                shared = shared or runner.shares_ends
                everywhere |= {f"{prefix}.{name}".lstrip(".") for name in runner.names}
        #: The two stages that share parameters, if any do; known to, and made by, all ranks.
        self._ends = mesh.ends if shared else None
        self.layouts = self._read_layouts()
        self.names = {id(p): name for name, p in root.named_parameters()}
        self._parameters = dict(root.named_parameters())
        #: Parameters and stored buffers that only other pipeline stages hold.
        here = {
            f"{prefix}.{name}".lstrip(".") for prefix, part in self.roots.items() for name, _ in part.stored_buffers()
        }
        self.elsewhere = everywhere - set(self.layouts) - here

    def _read_layouts(self) -> dict[str, ParameterLayout]:
        layouts: dict[int, ParameterLayout] = {}
        for part in self.roots.values():
            layouts |= {id(p): part.layouts[name] for name, p in part.named_parameters()}
        for _, runner in network_runners(self._root):
            if runner.pipeline is not None:
                own = runner.network.module.named_parameters()
                layouts |= {id(p): runner.layouts[name] for name, p in own if name in runner.layouts}
        # By identity: the user may hold a part of the model under a second name, which is in the state dict, too.
        everything = self._root.named_parameters(remove_duplicate=False)
        return {name: layouts[id(p)] for name, p in everything if id(p) in layouts}

    def place_experts(self, placements: Mapping[str, Placement]) -> None:
        """Notes where the experts of layers are from now on, in the layers here and in the layouts of all stages.

        Raises:
            InputError: For a placement of other experts or parts than a layer's.
        """
        for name, layer in self.moe_layers().items():
            if name in placements:
                layer.place(placements[name])
        for prefix, part in self.roots.items():
            for name, layout in part.layouts.items():
                full = f"{prefix}.{name}".lstrip(".")
                placement = next((p for layer, p in placements.items() if full.startswith(f"{layer}.")), None)
                if layout.is_expert_stack and placement is not None:
                    order = None if placement.is_contiguous else placement.expert_of_slot
                    part.layouts[name] = replace(layout, order=order)
        self.layouts = self._read_layouts()

    def expert_stacks(self) -> dict[str, nn.Parameter]:
        """The parameters here whose first dimension counts experts, as they are stored, by name."""
        for part in self.roots.values():
            part.release_gathered_weights()
        return {n: p for n, p in self._root.named_parameters() if n in self.layouts and self.layouts[n].is_expert_stack}

    def placements(self) -> dict[str, Placement]:
        """Where the experts of each layer are, by its name; also of layers that other stages of a language model hold."""
        found = {name: layer.placement for name, layer in self.moe_layers().items()}
        for prefix, part in self.roots.items():
            for name, layout in part.layouts.items():
                full = f"{prefix}.{name}".lstrip(".")
                if layout.is_expert_stack and not any(full.startswith(f"{layer}.") for layer in found):
                    order = layout.order or range(layout.shape[0])
                    found[full.rpartition(".experts.")[0]] = Placement(tuple(order), self.mesh.fold.ep)
        return found

    def everyones_placements(self) -> dict[str, Placement]:
        """:meth:`placements` of the layers of all stages, sorted by name, the same on every rank. Collective over ``pp``."""
        everyone = comm.all_gather_objects(self.placements(), self.mesh.axis("pp"))  # ranks of a stage have the same
        return dict(sorted((name, placement) for part in everyone for name, placement in part.items()))

    def moe_layers(self) -> dict[str, MoELayer]:
        """The MoE layers on this rank by name."""
        return {name: layer for name, layer in self._root.named_modules() if isinstance(layer, MoELayer)}

    @property
    def sharded(self) -> bool:
        """Whether any parameter is stored in pieces by the strategy, even if one rank holds them all."""
        return bool(self.layouts)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All parameters here, as they are stored, by name."""
        return iter(self._parameters.items())

    def own(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The user's own parameters."""
        return ((name, p) for name, p in self._parameters.items() if name not in self.layouts)

    def boxes(self, name: str) -> tuple[Box, ...]:
        """The parts of parameter ``name`` that this rank stores, one after the other."""
        return self.layouts[name].boxes(self.mesh.fold, self.mesh.rank)

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
            if layout.pp_ranks is not None and len(layout.pp_ranks) == 2:  # used by both, each of which has a part
                assert self._ends is not None
                yield parameter, self._ends
