"""References to modules that torch does not register: attributes, containers, bound methods.

A network may call a layer by more than its registered name: through a list, a dict, a bound method,
a closure. Whoever replaces the layer and leaves such a reference has a network that computes with
the old one, without a word. Here they are followed where that is possible, and named where not.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["loose", "stale", "swapped", "tensors_in"]

# What every module has.
_OWN = frozenset(nn.Module().__dict__)
_HOOKS = tuple(name for name in _OWN if name.endswith(("hooks", "hook")))
# So many objects behind one attribute are looked at.
_MOST = 10_000

Modules = Mapping[nn.Module, nn.Module]


def loose(module: nn.Module) -> list[tuple[str, Any]]:
    """Attributes of a module that torch does not register."""
    return [(name, value) for name, value in module.__dict__.items() if name not in _OWN]


def swapped(value: Any, new: Modules) -> Any:
    """A value with modules in it replaced: the value itself where that can be done in place.

    Args:
        value: a module, its bound method, a partial, or lists, tuples, dicts and deques of them.
        new: modules by those that they replace.
    """
    return _swapped(value, new, set())


def _swapped(value: Any, new: Modules, seen: set[int]) -> Any:
    if isinstance(value, nn.Module):
        return new.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        owner = value.__self__
        return getattr(new[owner], value.__name__, value) if owner in new else value
    if id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, partial):
        parts = _swapped((value.func, value.args, dict(value.keywords)), new, seen)
        (function, args, keywords) = parts
        is_same = function is value.func and args is value.args and keywords == value.keywords
        return value if is_same else partial(function, *args, **keywords)
    if isinstance(value, (list, deque)):
        for k, item in enumerate(value):
            value[k] = _swapped(item, new, seen)
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            value[key] = _swapped(item, new, seen)
    elif isinstance(value, tuple):
        items = [_swapped(item, new, seen) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def stale(module: nn.Module, old: Modules) -> Iterator[tuple[str, nn.Module]]:
    """References to modules that cannot be followed: in closures, weak references and objects.

    Args:
        module: whose attributes and hooks to look at.
        old: modules that will be replaced.

    Yields:
        The name of the attribute, or of torch's store of hooks, and the module.
    """
    hooks = [(name, module.__dict__.get(name)) for name in _HOOKS]
    for name, value in (*loose(module), *hooks):
        found = _unreachable(value, old)
        if found is not None:
            yield name, found


def _unreachable(value: Any, old: Modules) -> nn.Module | None:
    """A module behind a value that `swapped` does not find."""
    todo: list[tuple[Any, bool]] = [(value, True)]
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        value, is_followed = todo.pop()
        if isinstance(value, nn.Module):
            if not is_followed and value in old:
                return value
            continue
        if id(value) in seen or isinstance(value, (Tensor, type, ModuleType, str, bytes)):
            continue
        seen.add(id(value))
        todo += [(item, is_followed and follows) for item, follows in _behind(value)]
    return None


def _behind(value: Any) -> Iterable[tuple[Any, bool]]:
    """What a value refers to, and whether `swapped` follows it there."""
    if isinstance(value, dict):
        return [(item, True) for item in list(value.values())]
    if isinstance(value, (list, tuple, deque)):
        return [(item, True) for item in value]
    if isinstance(value, (set, frozenset)):
        return [(item, False) for item in value]
    if isinstance(value, partial):
        return [(item, True) for item in (value.func, *value.args, *value.keywords.values())]
    if isinstance(value, MethodType):
        return [(value.__self__, isinstance(value.__self__, nn.Module)), (value.__func__, False)]
    if isinstance(value, weakref.ref):
        return [(value(), False)]
    if isinstance(value, FunctionType):
        return [] if _is_own(value) else [(item, False) for item in _captured(value)]
    if _is_own(type(value)):
        return []
    return [(item, False) for item in getattr(value, "__dict__", {}).values()]


def _captured(function: FunctionType) -> list[Any]:
    """Values that a function carries with it."""
    cells = []
    for cell in function.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    return [*cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _is_own(thing: Callable[..., Any]) -> bool:
    """Whether a function or class is torch's or of this package, which look after themselves."""
    return (getattr(thing, "__module__", None) or "").split(".")[0] in ("torch", "sttp_manifold")


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors that an attribute is, or that its list, tuple or dict holds."""
    items = list(value.values()) if isinstance(value, dict) else value
    items = items if isinstance(items, (list, tuple, deque)) else [items]
    return [item for item in items if isinstance(item, Tensor)]
