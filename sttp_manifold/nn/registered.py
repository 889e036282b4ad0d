"""`register`: subclasses of stock layers, and layers of your own, for `compress` to treat."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from torch import nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.carry import FORWARDS
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.stock import TABLE, Row

__all__ = ["register", "unregister"]

K = TypeVar("K", bound=type[nn.Module])


@explained
def register(kind: K, spectral: type[SpectralLayer] | None = None) -> K:
    """Have :func:`compress` treat a type of layer that it does not know.

    A subclass of a stock layer is another layer, of which nobody knows what it does, and stays as
    it is until it is registered. One that inherits the ``forward`` of its stock layer is treated as
    that is, and comes back from :func:`decompress` as what it was, with all its attributes; while
    it is spectral, methods and attributes of its class are not there. Any other type needs a
    spectral layer of its own.

    Args:
        kind: the type: a subclass of a stock layer, or any other with ``spectral``. Its subclasses
            are other layers again.
        spectral: the layer that stands for it; by default that of the stock layer.

    Returns:
        The type, so that this may be written as a decorator.

    Raises:
        ConversionError: a type that inherits from no stock layer, or has a ``forward`` of its own,
            without ``spectral``; or a ``spectral`` that does not stand for it.

    Example:
        >>> @register
        ... class Projection(nn.Linear):
        ...     pass
        >>> from sttp_manifold.nn import compress, decompress
        >>> model = compress(nn.Sequential(Projection(64, 32)), rank=4)
        >>> decompress(model)
        Sequential(
          (0): Projection(in_features=64, out_features=32, bias=True)
        )
        >>> unregister(Projection)
    """
    given: object = kind
    if not (isinstance(given, type) and issubclass(given, nn.Module)):
        raise ConversionError(
            f"register takes a type of modules, as in register(MyLinear); got {kind!r}"
        )
    rows = {row.stock: row for row in TABLE}
    if spectral is not None:
        row = _row_for(kind, spectral)
    else:
        base = next((base for base in kind.__mro__ if base in rows), None)
        if base is None:
            known = ", ".join(sorted(found.__name__ for found in rows))
            raise ConversionError(
                f"{kind.__name__} inherits from none of {known}; write a spectral layer that "
                f"stands for it, and register({kind.__name__}, SpectralLayerOfYours)"
            )
        row = replace(rows[base], stock=kind, lazy=None)
        own = [name for name in FORWARDS if getattr(kind, name, 0) is not getattr(base, name, 0)]
        if row.spectral is not None and own:
            raise ConversionError(
                f"{kind.__name__} is a {base.__name__} with a {own[0]} of its own, which a "
                f"{row.spectral.__name__} would not call; write a spectral layer that stands for "
                f"it, and register({kind.__name__}, SpectralLayerOfYours)"
            )
    unregister(kind)
    TABLE.append(row)
    return kind


def _row_for(kind: type[nn.Module], spectral: type[SpectralLayer]) -> Row:
    given: object = spectral
    if not (isinstance(given, type) and issubclass(given, SpectralLayer)):
        raise ConversionError(f"spectral is a subclass of SpectralLayer, got {spectral!r}")
    if spectral.stock is not kind:
        raise ConversionError(
            f"{spectral.__name__} stands for a {spectral.stock.__name__}; let it say "
            f"stock = {kind.__name__}"
        )
    return Row(kind, spectral)


def unregister(kind: type[nn.Module]) -> None:
    """Leave layers of a type as they are from now on; nothing where it was not registered.

    Args:
        kind: what :func:`register` was given.
    """
    TABLE[:] = [row for row in TABLE if row.stock is not kind]
