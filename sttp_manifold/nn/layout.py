"""Where the numbers of a weight lie in its vector."""

from __future__ import annotations

from dataclasses import dataclass

from sttp_manifold.spectrum import SpectrumMap
from sttp_manifold.tt.shape import TTShape

__all__ = ["SMALL", "Layout", "batch_map"]

SMALL = 16
"""Frames of at most so many columns are padded into one batch.

Up to there calls cost more than the arithmetic of the padding.
"""


@dataclass(frozen=True)
class Layout:
    """Where the numbers of a weight lie in its vector.

    Attributes:
        shape: the chain, as its cores are stored.
        map: the spectrum map.
        full: for each frame, whether its chart is full or reduced; None for frames of a point.
        starts: where the numbers of each frame start.
        sizes: how many they are; zero for a constant frame, minus the identity.
        spectrum: where the coordinates of the spectrum start.
        size: length of the vector.
        signs: whether constant signs, or singular values, come with it, which are the spectrum.
    """

    shape: TTShape
    map: SpectrumMap
    full: tuple[bool | None, ...]
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    spectrum: int
    size: int
    signs: bool

    @property
    def is_views(self) -> bool:
        """Whether one weight is formed faster from views of its vector than by a gather."""
        wide = any(r > SMALL for _, r in self.shape.frame_shapes)
        return wide and all(full is None for full in self.full)

    def __hash__(self) -> int:
        return hash((self.shape, self.map, self.full, self.size))


def batch_map(map_: SpectrumMap) -> SpectrumMap:
    """The map for a layout: of constant singular values, which come as a tensor, that of ones.

    So weights that differ in these values alone share a plan.
    """
    return SpectrumMap("identity", map_.rank) if map_.is_constant else map_
