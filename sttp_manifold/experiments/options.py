"""Options of the command line as values: words, whole numbers, learning rates."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sttp_manifold.errors import ConfigError

__all__ = ["numbers", "rates", "words"]

_MOST_NUMBERS = 100_000


def words(values: Sequence[str]) -> list[str]:
    """Options that may be repeated, or hold several values parted by commas or spaces."""
    return [word for value in values for word in re.split(r"[,\s]+", value.strip()) if word]


def numbers(values: Sequence[str] | None, option: str) -> list[int] | None:
    """Whole numbers and ranges of them: ``0,1,2`` and ``0-2`` are the same.

    Args:
        values: as they were typed; None stays None.
        option: its name, for the message.

    Raises:
        ConfigError: a word that is neither, or more numbers than anyone means.
    """
    if values is None:
        return None
    found: dict[int, None] = {}
    for word in words(values):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", word)
        if match is None:
            raise ConfigError(f"{option} {word!r}: expected whole numbers, as in 4,8 or 0-2")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(
                f"{option} {word!r}: the range ends before it starts; expected {last}-{first}"
            )
        if last - first >= _MOST_NUMBERS:
            raise ConfigError(
                f"{option} {word!r}: {last - first + 1:,} numbers; expected {_MOST_NUMBERS:,} or "
                "fewer"
            )
        found.update(dict.fromkeys(range(first, last + 1)))
    if not found:
        raise ConfigError(f"{option} is empty: expected whole numbers, as in 4,8 or 0-2")
    return list(found)


def rates(values: Sequence[str] | None) -> dict[str, float]:
    """Learning rates: ``0.01`` for all methods, ``dense-adam=0.01`` for one.

    Args:
        values: as they were typed.

    Raises:
        ConfigError: a word that is neither.
    """
    found: dict[str, float] = {}
    for word in words(values or ()):
        name, _, text = ("all=" + word if "=" not in word else word).rpartition("=")
        try:
            if not name:
                raise ValueError
            found[name] = float(text)
        except ValueError:
            raise ConfigError(
                f"--lr {word!r}: expected a number, or a method and a number as in dense-adam=0.01"
            ) from None
    return found
