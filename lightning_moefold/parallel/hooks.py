# SPDX-License-Identifier: Apache-2.0
"""Hooks of the user's on parameters and on backward passes: kept on one rank, refused where they would see parts of gradients.

A parameter that is cut is another one than that on which a hook was registered. And where FSDP2 would call it, it would be
with the gradient of one rank, before the ranks' gradients are summed; under a pipeline, in the middle of the schedule.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from lightning_moefold.errors import HookError
from lightning_moefold.modules.base import parallel_roots
from lightning_moefold.parallel.network.protocol import layered_networks

#: Where torch keeps the hooks of a tensor, and what registers them.
_OF_PARAMETERS = {
    "_backward_hooks": "register_hook",
    "_post_accumulate_grad_hooks": "register_post_accumulate_grad_hook",
}
_OF_MODULES = {
    "_backward_hooks": "register_full_backward_hook",
    "_backward_pre_hooks": "register_full_backward_pre_hook",
}


def check_hooks(root: nn.Module, where: str) -> None:
    """Refuses hooks on gradients, for more than one rank or gathered weights.

    Raises:
        HookError: Naming the parameter or module, and ``where`` hooks are refused, such as ``"under tp2 | ep2"``.
    """
    _check_watching(root, where)
    for name, parameter in root.named_parameters():
        for attribute, method in _OF_PARAMETERS.items():
            if getattr(parameter, attribute, None):
                raise HookError(
                    f"{method} on {name!r} would see gradients of one rank before they are summed, or none, {where}; change "
                    "gradients in on_before_optimizer_step, which comes after the sum."
                )
    parts = [(f"{prefix}.{name}".strip("."), m) for prefix, r in parallel_roots(root) for name, m in r.named_modules()]
    parts += [
        (f"{n.name}.{name}".strip("."), m) for n in layered_networks(root) for name, m in n.container.named_modules()
    ]
    for name, module in parts:
        for attribute, method in _OF_MODULES.items():
            if getattr(module, attribute, None):
                raise HookError(
                    f"{method} on {name or type(module).__name__} would see one rank's part of the gradients {where}; read "
                    "gradients in on_before_optimizer_step, or take the hook off."
                )


def _check_watching(root: nn.Module, where: str) -> None:
    """Weights & Biases watches by hooks, in the process of rank zero only."""
    of_modules = (hook for module in root.modules() for hook in module._forward_hooks.values())
    of_parameters = (
        hook for p in root.parameters() for name in _OF_PARAMETERS for hook in (getattr(p, name, None) or {}).values()
    )
    for hook in (*of_modules, *of_parameters):
        if (getattr(hook, "__module__", None) or "").partition(".")[0] == "wandb":
            raise HookError(
                f"WandbLogger.watch would show rank zero's pieces of weights and gradients {where}; take it out, and log "
                "what you want to see in on_before_optimizer_step."
            )


@contextmanager
def keeping_hooks(model: nn.Module) -> Generator[None, None, None]:
    """Hands the hooks on parameters to those that take their names inside; what removes a hook goes on to do so."""
    before = dict(model.named_parameters())
    yield
    for name, parameter in model.named_parameters():
        if (old := before[name]) is not parameter:
            for attribute in _OF_PARAMETERS:
                if hooks := getattr(old, attribute, None):
                    setattr(parameter, attribute, hooks)
