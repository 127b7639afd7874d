# SPDX-License-Identifier: Apache-2.0
"""The registry of routers. A registered router can be selected by name in a layer, a model or a configuration file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_moefold.errors import InputError
from lightning_moefold.modules.routers.options import RouterOptions, SwipeOptions, TopologyAwareOptions

if TYPE_CHECKING:
    from lightning_moefold.modules.routers.router import Router

#: Router classes by name. Those of this package are imported, and so registered, at first use.
ROUTERS: dict[str, type[Router]] = {}

#: Routers of this package: module and options class by name. Options classes need no PyTorch.
_OURS: dict[str, tuple[str, type[RouterOptions]]] = {
    "force_balanced": ("lightning_moefold.modules.routers.force_balanced", RouterOptions),
    "swipe": ("lightning_moefold.modules.routers.swipe", SwipeOptions),
    "top_k": ("lightning_moefold.modules.routers.router", RouterOptions),
    "topology_aware": ("lightning_moefold.modules.routers.topology_aware", TopologyAwareOptions),
}

#: Specification of a router: a name, options, or options as a mapping (with the key ``name``).
RouterSpec = str | RouterOptions | Mapping[str, Any]

_R = TypeVar("_R", bound="Router")


def register_router(name: str) -> Callable[[type[_R]], type[_R]]:
    """Class decorator that registers a router; a second router of the same name replaces the first.

    Args:
        name: Name of the router, as in ``MoELayer(..., router=name)``.
    """

    def register(router: type[_R]) -> type[_R]:
        if name in _OURS and router.__module__ != _OURS[name][0]:
            importlib.import_module(_OURS[name][0])  # if imported later, it would replace this one
        ROUTERS[name] = router
        return router

    return register


def router_options(spec: RouterSpec) -> RouterOptions:
    """Converts a specification to options.

    Raises:
        ValueError: If the name is not registered, or the router does not have a field.
    """
    if isinstance(spec, RouterOptions):
        if type(spec) is not (kind := _find_options(spec.name)):
            raise InputError(
                f"{type(spec).__name__} names the router {spec.name!r}, whose options are {kind.__name__}; set its name."
            )
        return spec
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    kind = _find_options(given.get("name", RouterOptions.name))
    known = sorted(field.name for field in fields(kind))
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"router has no option {unknown[0]!r}; {kind.__name__} has {', '.join(known)}.")
    return kind(**given)


def make_router(spec: RouterSpec, hidden_size: int, num_experts: int, top_k: int) -> Router:
    """Makes the router that a specification names, for D, E and K.

    Raises:
        ValueError: See :func:`router_options`; also if the options do not fit the sizes.
    """
    options = router_options(spec)
    return _find(options.name)(hidden_size, num_experts, top_k, options)


def _find_options(name: str) -> type[RouterOptions]:
    return _OURS[name][1] if name in _OURS and name not in ROUTERS else _find(name).Options


def _find(name: str) -> type[Router]:
    if name not in ROUTERS and name in _OURS:
        importlib.import_module(_OURS[name][0])
    if name not in ROUTERS:
        known = ", ".join(map(repr, sorted(ROUTERS.keys() | _OURS.keys())))
        raise InputError(f"router {name!r} is not registered; use one of {known}.")
    return ROUTERS[name]
