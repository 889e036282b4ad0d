"""Values that come from JSON files, which anyone may have written: read with care, and checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from sttp_manifold.errors import ConfigError

__all__ = ["LARGEST", "check_numbers", "check_words", "loads", "short"]

# Beyond it sums of squares overflow; no loss of a run that is still one comes near.
LARGEST = 1e100


def loads(text: str | bytes) -> Any:
    """What a JSON text holds, with None for floats that are not finite or beyond all measure.

    Raises:
        ValueError: the text is no JSON, or nested too deeply to be any of ours.
    """
    try:
        return json.loads(text, parse_float=_finite, parse_constant=lambda name: None)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _finite(text: str) -> float | None:
    value = float(text)
    return value if abs(value) <= LARGEST else None


def check_numbers(
    noun: str,
    values: Iterable[Any],
    *,
    null: bool = False,
    whole: bool = False,
    least: float = -LARGEST,
) -> None:
    """Check that values are finite numbers of a size that can be added and squared.

    Args:
        noun: what they are, for the message.
        values: as ``json.loads`` gives them.
        null: whether they may be None.
        whole: whether they have to be integers.
        least: the smallest that there may be.

    Raises:
        ConfigError: says which one is none.
    """
    for value in values:
        if value is None and null:
            continue
        kinds = (int,) if whole else (int, float)
        good = isinstance(value, kinds) and not isinstance(value, bool)
        # Integers of any length compare; only floats can be NaN.
        if not good or not least <= value <= LARGEST or math.isnan(value):
            wanted = "a whole number" if whole else "a finite number"
            wanted += "" if least < 0 else f", {least} or more"
            raise ConfigError(f"{noun} holds {short(value)}; expected {wanted}")


def check_words(noun: str, values: Sequence[Any]) -> None:
    """Check that values are short texts of one line, fit for a table and a terminal.

    Raises:
        ConfigError: says which one is none.
    """
    for value in values:
        if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
            raise ConfigError(f"{noun} holds {short(value)}; expected a text of one line")


def short(value: Any) -> str:
    """A value as it stands in a message, cut where it is long."""
    # Integers of more digits than Python prints would raise here.
    if isinstance(value, int) and abs(value) >= 10**30:
        return "an integer of more than 30 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
