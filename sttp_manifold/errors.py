"""Named errors. Each carries its culprit, so that a caller can act on it without parsing text."""

from __future__ import annotations

from typing import Any

__all__ = [
    "ArgumentError",
    "CheckError",
    "ConfigError",
    "ConversionError",
    "FrameOverflowError",
    "ManifoldError",
    "OffManifoldError",
    "OptimizerError",
    "PlaceError",
    "RankError",
    "ShapeError",
    "SpectrumError",
    "SttpError",
    "TimingError",
]


class SttpError(Exception):
    """Base of every error that this package raises on purpose."""


class ArgumentError(SttpError, TypeError):
    """An argument of another type than the one that a function takes."""


class ShapeError(SttpError, ValueError):
    """Modes, cores or tensors whose sizes do not fit together."""


class RankError(ShapeError):
    """A TT rank that its bond cannot carry.

    Attributes:
        bond: index ``k`` of the bond, ``0 <= k <= D + E``.
        rank: the rank that was asked for.
        bound: the largest rank that the bond can carry.
    """

    def __init__(self, message: str, *, bond: int, rank: int, bound: int) -> None:
        super().__init__(message)
        self.bond = bond
        self.rank = rank
        self.bound = bound


class PlaceError(ShapeError, IndexError):
    """A place outside of a matrix.

    Attributes:
        index: which index it was, ``"i"`` of the row or ``"j"`` of the column.
    """

    def __init__(self, message: str, *, index: str) -> None:
        super().__init__(message)
        self.index = index


class FrameOverflowError(SttpError, OverflowError):
    """Parameters of a Householder chart whose reflectors are too long for their dtype."""


class SpectrumError(SttpError, ValueError):
    """A spectrum that the chosen spectrum map cannot hold, or an unknown map."""


class ManifoldError(SttpError, ValueError):
    """A manifold, cost or tangent vector that an operation of geometry cannot work with."""


class OffManifoldError(ManifoldError):
    """A point that is used, and is beside its manifold by more than rounding."""


class CheckError(SttpError, AssertionError):
    """A manifold, retraction, transport or derivative that fails its numerical check.

    Attributes:
        result: the :class:`~sttp_manifold.checks.CheckResult` that did not pass.
    """

    def __init__(self, message: str, *, result: Any) -> None:
        super().__init__(message)
        self.result = result


class OptimizerError(SttpError, TypeError):
    """An optimizer that would leave the manifold, or a flag that it cannot honour."""


class ConversionError(SttpError, ValueError):
    """A layer or network that cannot be converted as asked.

    Attributes:
        layer: qualified name of the layer, empty for the root module.
    """

    def __init__(self, message: str, *, layer: str = "") -> None:
        super().__init__(message)
        self.layer = layer


class ConfigError(SttpError, ValueError):
    """An experiment setting that does not exist or contradicts another one."""


class TimingError(SttpError, RuntimeError):
    """Times from which nothing can be read, as those of a machine that is in use."""
