"""What a conversion leaves as it is: said in one warning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

__all__ = ["SkippedLayerWarning", "listed", "warn_of_left"]

_SAID = 20


class SkippedLayerWarning(UserWarning):
    """Layers that `compress` or `adapt` left as they were, with the reason for each."""


def listed(sentences: Sequence[str]) -> str:
    """The first of some sentences, and how many more there are."""
    more = len(sentences) - _SAID
    return "; ".join(sentences[:_SAID]) + (f"; and {more} more" if more > 0 else "")


def warn_of_left(left: Sequence[str]) -> None:
    """Warn of what is left, if anything is, at the line that calls the caller.

    Args:
        left: a sentence for each layer; the caller is a public function.
    """
    if left:
        # Past the function and its decorator.
        warnings.warn(f"left as they are: {listed(left)}", SkippedLayerWarning, stacklevel=4)
