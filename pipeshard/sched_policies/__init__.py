"""Policies decide where each unit of a model lives. The built-in ones are one file each; anyone can add one:

    @pipeshard.sched_policies.register
    class MyPolicy:
        def place(self, ctx: PolicyContext) -> Placement: ...

or without registering, by `policy="my_mod:MyPolicy"`, `policy="my_policy.py:MyPolicy"`, a class, an object or a plain
function of the context; or by an entry point of the group `pipeshard.policies`.

Not here: what a policy is given (base.py), who asks it (planner.py).
Threads: registering is done at import; looking up is safe from any thread.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar, runtime_checkable

from ..errors import BudgetError, PipeshardError, PlanError, RequestError
from .base import (
    Layer,
    Place,
    Placement,
    PolicyContext,
    Prediction,
    Split,
    Tier,
    Unit,
    check,
)

__all__ = [
    "Layer",
    "Place",
    "Placement",
    "Policy",
    "PolicyContext",
    "Prediction",
    "Split",
    "Tier",
    "Unit",
    "decide",
    "get",
    "name_of",
    "names",
    "register",
]

GROUP = "pipeshard.policies"
_BUILT_IN = (
    "full_gpu",
    "full_gpu_no_output",
    "static_attn",
    "shard_attn",
    "full_shard",
    "paper",
    "layer_split",
    "experts_cpu",
    "even_split",
    "auto",
)
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_registry: dict[str, Any] = {}

T = TypeVar("T")


@runtime_checkable
class Policy(Protocol):
    """Anything with `place(ctx)`. It may also have `tiers(n_ctx, n_seq)`, which then replaces the usual ones."""

    def place(self, ctx: PolicyContext) -> Placement: ...


class _Function:
    """A plain function as a policy."""

    def __init__(self, function: Callable[[PolicyContext], Placement]) -> None:
        self._function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def place(self, ctx: PolicyContext) -> Placement:
        return self._function(ctx)


def register(policy: T, *, name: str | None = None) -> T:
    """Decorator: makes a policy known by its `name` attribute, or its own name in snake_case. A name is given once."""
    chosen = name or name_of(policy)
    if not _NAME.fullmatch(chosen):
        raise RequestError(
            f"{chosen!r} cannot name a policy; use lower-case letters, digits and _",
            argument="name",
        )
    if chosen in _registry and _registry[chosen] is not policy:
        raise RequestError(f"there is already a policy {chosen!r}", argument="name")
    _as_policy(policy, chosen)
    _registry[chosen] = policy
    return policy


def names() -> list[str]:
    """Of all policies that can be asked for by name."""
    return sorted({*_registry, *(point.name for point in entry_points(group=GROUP))})


def name_of(policy: object) -> str:
    """What tables call a policy that was given in any of the accepted ways."""
    if isinstance(policy, str):
        return policy
    own = getattr(policy, "name", None)
    if isinstance(own, str) and own:
        return own
    text = getattr(policy, "__name__", type(policy).__name__)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text).lower()


def get(policy: str | Policy | type | Callable[[PolicyContext], Placement]) -> Policy:
    """The policy of a registered name, entry point, "module:name", "file.py:name", class, object or function."""
    if not isinstance(policy, str):
        return _as_policy(policy, name_of(policy))
    points: list[EntryPoint] = list(entry_points(group=GROUP, name=policy))
    if policy in _registry:
        if points:
            raise RequestError(
                f"the installed package that brings a policy {policy!r} takes a name that is already taken",
                argument="policy",
            )
        return _as_policy(_registry[policy], policy)
    if len(points) > 1:
        raise RequestError(f"several packages bring a policy {policy!r}", argument="policy")
    if points:
        return _as_policy(_importing(policy, points[0].load), policy)
    if ":" in policy or "." in policy:
        return _as_policy(_importing(policy, lambda: _import(policy)), policy)
    raise RequestError(
        f'there is no policy {policy!r}; there are {", ".join(names())}, and "module:name" for one of your own',
        argument="policy",
    )


def decide(policy: Policy, ctx: PolicyContext) -> Placement:
    """What the policy says, checked. BudgetError and PlanError pass, and that memory ran out; others become the cause
    of a PlanError."""
    try:
        placement = policy.place(ctx)
    except (BudgetError, PlanError, MemoryError):
        raise
    except Exception as error:
        raise PlanError(
            f"policy {name_of(policy)} failed: {type(error).__name__}: {error}"
        ) from error
    return check(ctx, placement)


def _as_policy(policy: Any, name: str) -> Policy:
    if isinstance(policy, type):
        try:
            policy = policy()
        except TypeError as error:
            raise RequestError(
                f"policy {name}: a class must be made without arguments ({error})",
                argument="policy",
            ) from error
    if callable(getattr(policy, "place", None)):
        made: Policy = policy
        return made
    if callable(policy):
        return _Function(policy)
    raise TypeError(
        f"policy {name!r} is neither a function nor has it place(ctx): {type(policy).__name__}"
    )


def _importing(policy: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except PipeshardError:
        raise
    except Exception as error:
        raise RequestError(
            f"cannot import policy {policy!r}: {type(error).__name__}: {error}", argument="policy"
        ) from error


def _import(path: str) -> Any:
    module_name, _, attribute = path.rpartition(":") if ":" in path else path.rpartition(".")
    found: Any = (
        _import_file(Path(module_name))
        if module_name.endswith(".py")
        else importlib.import_module(module_name)
    )
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _import_file(path: Path) -> ModuleType:
    """Not by its module name, so that it cannot be taken for another file of that name."""
    name = f"_pipeshard_policy_{abs(hash(str(path.resolve()))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


for _name in _BUILT_IN:
    importlib.import_module(f".{_name}", __name__)
