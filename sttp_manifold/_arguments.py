"""Which argument it was: errors of public functions that came of a value of the wrong type.

The package computes with what it is given and checks sizes and ranges by hand. Types are written in
the signatures already: where a call fails, and only then, the arguments are compared with them, and
the first that does not fit is named. A call that succeeds costs nothing more.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import itertools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from sttp_manifold.errors import ArgumentError, ShapeError, SttpError

__all__ = ["check_among", "explained", "explained_class", "explained_constructor"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=type)

_MOST = 64  # elements of a sequence that are looked at
_LONGEST = 80  # characters of a value that are shown


def explained(function: Callable[P, R]) -> Callable[P, R]:
    """Name the argument of the wrong type where a call fails because of one.

    Raises:
        ArgumentError: in place of what the call raised, if an argument does not fit its annotation.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except SttpError:
            raise
        except Exception as error:
            told = _culprit(function, args, kwargs)
            if told is None:
                raise
            raise ArgumentError(told) from error

    return call


def explained_class(cls: C) -> C:
    """:func:`explained` for every public method that a class defines, but not its constructor."""
    for name, value in list(vars(cls).items()):
        if name.startswith("_"):
            continue
        if inspect.isfunction(value):
            setattr(cls, name, explained(value))
        elif isinstance(value, (classmethod, staticmethod)):
            setattr(cls, name, type(value)(explained(value.__func__)))
    return cls


def explained_constructor(cls: C) -> C:
    """:func:`explained` for the constructor of a class, as of a dataclass."""
    setattr(cls, "__init__", explained(vars(cls)["__init__"]))  # noqa: B010
    return cls


def check_among(option: str, value: object, names: tuple[str, ...]) -> None:
    """Refuse what is none of the names that an option has.

    Raises:
        ShapeError: such a value.
    """
    if not isinstance(value, str) or value not in names:
        raise ShapeError(f"{option} must be {' or '.join(map(repr, names))}, got {value!r}")


def _culprit(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    signature = inspect.signature(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None  # Python has said what does not bind
    for name, value in given.items():
        parameter = signature.parameters[name]
        hint = _hint(function, parameter.annotation)
        values = value if parameter.kind == parameter.VAR_POSITIONAL else [value]
        if parameter.kind == parameter.VAR_KEYWORD:
            continue
        for single in values:
            if not _fits(single, hint):
                wanted = _shown(parameter.annotation)
                return f"{function.__qualname__}: {name} is {wanted}, got {_told(single)}"
    return None


def _hint(function: Callable[..., Any], annotation: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, vars(inspect.getmodule(inspect.unwrap(function))))
    except Exception:
        return Any  # a name that is imported for types only


def _shown(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    if text.isidentifier():
        return f"{'an' if text[0] in 'aeiouAEIOU' else 'a'} {text}"
    return text or repr(annotation)


def _told(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a Tensor {tuple(value.shape)} of {value.dtype}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may be meant by a type; True where that cannot be told."""
    if hint is Any:
        return True
    if isinstance(hint, TypeVar):
        return hint.__bound__ is None or _fits(value, hint.__bound__)
    if hint is None or hint is type(None):
        return value is None
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is collections.abc.Callable:
        return callable(value)
    if isinstance(origin, type):
        return _fits_class(value, origin) and _fits_elements(value, origin, parts)
    array = getattr(hint, "array_type", None)  # shapes in signatures
    return _fits_class(value, array if isinstance(array, type) else hint)


def _fits_elements(value: Any, origin: type, parts: tuple[Any, ...]) -> bool:
    if not parts or isinstance(value, torch.Tensor):
        return True
    if isinstance(value, collections.abc.Mapping):
        return all(_fits(element, parts[-1]) for element in list(value.values())[:_MOST])
    if not isinstance(value, collections.abc.Collection):
        return True  # an iterator would be used up
    if origin is tuple and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return all(_fits(element, parts[0]) for element in itertools.islice(value, _MOST))


def _fits_class(value: Any, kind: Any) -> bool:
    if not isinstance(kind, type) or getattr(kind, "_is_protocol", False):
        return True
    if kind is bool:
        try:
            return bool(value) in (False, True)
        except (RuntimeError, ValueError):
            return False  # arrays of several numbers
    if kind in (int, float):
        if isinstance(value, bool):
            return False
        if isinstance(value, torch.Tensor):
            return value.ndim == 0
        try:
            (operator.index if kind is int else float)(value)
        except (TypeError, ValueError, OverflowError):
            return False
        return not isinstance(value, (str, bytes))
    return isinstance(value, kind)
