"""Arguments of the wrong type are named where a call fails, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from sttp_manifold._arguments import (
    check_among,
    explained,
    explained_class,
    explained_constructor,
)
from sttp_manifold.errors import ArgumentError, ShapeError


@explained
def add(
    x: Tensor,
    count: int = 1,
    scale: float = 1.0,
    names: Sequence[str] = (),
    kind: Literal["a", "b"] = "a",
    then: Callable[[Tensor], Tensor] | None = None,
    pair: tuple[int, str] = (1, "a"),
    anything: Any = None,
    *rest: int,
    dtype: torch.dtype | None = None,
    **more: object,
) -> Tensor:
    """Fails, as a call with a wrong argument would."""
    raise AttributeError("something inside")


X = torch.ones(2)


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((3,), {}, "add: x is a Tensor, got int: 3"),
        ((X, 1.5), {}, "count is an int, got float: 1.5"),
        ((X, True), {}, "count is an int, got bool: True"),
        ((X,), {"scale": "2"}, "scale is a float, got str: '2'"),
        ((X,), {"names": 3}, "names is Sequence[str], got int: 3"),
        ((X,), {"names": ["a", 1]}, "names is Sequence[str]"),
        ((X,), {"kind": "c"}, "kind is Literal"),
        ((X,), {"then": 2}, "then is Callable"),
        ((X,), {"pair": (1, 2)}, "pair is tuple[int, str]"),
        ((X,), {"dtype": "float32"}, "dtype is torch.dtype | None, got str: 'float32'"),
        ((X, 1, 1.0, (), "a", None, (1, "a"), None, 2, "x"), {}, "rest is an int, got str: 'x'"),
        ((np.ones(3),), {}, "x is a Tensor, got ndarray: array([1., 1., 1.])"),
        (("x" * 500,), {}, "x…"),
    ],
)
def test_the_first_argument_that_does_not_fit_is_named(args, kwargs, words) -> None:
    with pytest.raises(ArgumentError) as caught:
        add(*args, **kwargs)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 200
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((X,), {}),
        ((torch.nn.Parameter(X), np.int64(2), 3), {"names": ["a"], "more": object()}),
        ((X, torch.tensor(2), torch.tensor(1.0)), {"then": torch.sin, "dtype": torch.float16}),
        ((X,), {"kind": "b", "pair": (2, "b"), "anything": object()}),
    ],
)
def test_a_call_whose_arguments_fit_fails_as_it_did(args, kwargs) -> None:
    with pytest.raises(AttributeError, match="something inside"):
        add(*args, **kwargs)


def test_calls_that_do_not_bind_fail_as_python_says() -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        add()


def test_methods_and_errors_of_ours() -> None:
    @explained_class
    class Thing:
        def named(self, x: Tensor) -> None:
            raise ShapeError("a word of ours")

        @classmethod
        def made(cls, x: Tensor) -> int:
            return x.ndim

        @staticmethod
        def counted(x: Tensor) -> int:
            return x.ndim

        def _private(self, x: Tensor) -> int:
            return x.ndim

    with pytest.raises(ShapeError, match="a word of ours"):
        Thing().named(3)
    for call in (Thing.made, Thing().made, Thing.counted):
        assert call(X) == 1
        with pytest.raises(ArgumentError, match="x is a Tensor, got int: 3"):
            call(3)
    with pytest.raises(AttributeError):
        Thing()._private(3)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        ([X, X], True),
        ((X for _ in range(2)), True),  # an iterator would be used up
        (X, True),
        ({"a": X}.values(), True),
        (np.ones(2), False),
        ("ab", False),
        ([X, 1.0], False),
        (3, False),
    ],
)
def test_elements_of_what_is_iterated_are_looked_at(value, fits) -> None:
    @explained
    def take(parameters: Iterable[Tensor]) -> None:
        raise ValueError("something inside")

    with pytest.raises(ValueError if fits else ArgumentError):
        take(value)


def test_constructors_and_names_of_options() -> None:
    @explained_constructor
    @dataclass
    class Options:
        size: int = 1
        kind: str = "a"

        def __post_init__(self) -> None:
            check_among("kind", self.kind, ("a", "b"))
            assert self.size < 3

    assert Options(2, "b").size == 2
    with pytest.raises(ArgumentError, match=r"Options.__init__: size is an int, got str: 'x'"):
        Options("x")
    with pytest.raises(ShapeError, match="kind must be 'a' or 'b', got 3"):
        Options(kind=3)
    with pytest.raises(AssertionError):
        Options(3)
