# SPDX-License-Identifier: Apache-2.0
"""The registry of routers: whatever is in it can be asked for by name, in a layer, a model or a configuration file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_moefold.errors import InputError
from lightning_moefold.modules.routers.options import RouterOptions

if TYPE_CHECKING:
    from lightning_moefold.modules.routers.router import Router

#: Router classes by name.
ROUTERS: dict[str, type[Router]] = {}

#: What a router is asked for with: a name, options, or options as a mapping (``name`` is one of them).
RouterSpec = str | RouterOptions | Mapping[str, Any]

_R = TypeVar("_R", bound="Router")


def register_router(name: str) -> Callable[[type[_R]], type[_R]]:
    """Class decorator that puts a router into the registry; a second one of the same name replaces the first.

    Args:
        name: By which it is asked for: ``MoELayer(..., router=name)``.
    """

    def register(router: type[_R]) -> type[_R]:
        ROUTERS[name] = router
        return router

    return register


def router_options(spec: RouterSpec) -> RouterOptions:
    """The options that ``spec`` means.

    Raises:
        ValueError: For a name that is not registered, or a field that the router does not have.
    """
    if isinstance(spec, RouterOptions):
        if type(spec) is not (kind := _find(spec.name).Options):
            raise InputError(
                f"{type(spec).__name__} names the router {spec.name!r}, whose options are {kind.__name__}; set its name."
            )
        return spec
    given = {"name": spec} if isinstance(spec, str) else dict(spec)
    kind = _find(given.get("name", RouterOptions.name)).Options
    known = sorted(field.name for field in fields(kind))
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InputError(f"router has no option {unknown[0]!r}; {kind.__name__} has {', '.join(known)}.")
    return kind(**given)


def make_router(spec: RouterSpec, hidden_size: int, num_experts: int, top_k: int) -> Router:
    """Makes a router.

    Args:
        spec: Which.
        hidden_size: D.
        num_experts: E.
        top_k: K.

    Raises:
        ValueError: See :func:`router_options`; or if the options do not go with the sizes.
    """
    options = router_options(spec)
    return _find(options.name)(hidden_size, num_experts, top_k, options)


def _find(name: str) -> type[Router]:
    if name not in ROUTERS:
        raise InputError(f"router {name!r} is not registered; use one of {', '.join(map(repr, sorted(ROUTERS)))}.")
    return ROUTERS[name]
