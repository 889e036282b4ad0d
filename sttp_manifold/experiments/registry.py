"""Names for things, and an answer that lists the names when one of them is wrong."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Generic, Protocol, TypeVar

from sttp_manifold.errors import ConfigError

__all__ = ["Named", "Registry"]

_NAME = re.compile(r"[^\W_][\w.+-]{0,99}")


class Named(Protocol):
    """Anything with a name of its own."""

    @property
    def name(self) -> str:
        """The name that a user types."""
        ...


T = TypeVar("T", bound=Named)


class Registry(Generic[T]):
    """An ordered dictionary from names to things, which keeps the order of registration.

    Args:
        noun: what an entry is called in messages, ``"method"`` or ``"task"``.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._entries: dict[str, T] = {}

    def add(self, entry: T) -> T:
        """Register an entry under its own name and hand it back.

        Raises:
            ConfigError: the name is taken, or is none that a user can type.
        """
        if not _NAME.fullmatch(entry.name):
            raise ConfigError(
                f"{self.noun} name {entry.name!r}: expected letters, digits and . _ + - (files are "
                "named after it), a letter or digit first"
            )
        if entry.name in self._entries:
            raise ConfigError(f"a {self.noun} named {entry.name!r} is registered already")
        self._entries[entry.name] = entry
        return entry

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise self._unknown(name) from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[str]:
        """Every name, in the order of registration."""
        return list(self._entries)

    def select(self, patterns: Sequence[str]) -> list[str]:
        """The names that the patterns stand for, each once, in the order asked for.

        A pattern is a name, a shell wildcard (``sttp-*``) or ``all``.

        Raises:
            ConfigError: a pattern stands for nothing.
        """
        chosen: dict[str, None] = {}
        for pattern in patterns:
            wildcard = "*" if pattern == "all" else pattern
            hits = [name for name in self._entries if fnmatchcase(name, wildcard)]
            if not hits:
                raise self._unknown(pattern)
            chosen.update(dict.fromkeys(hits))
        return list(chosen)

    def _unknown(self, name: str) -> ConfigError:
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        return ConfigError(
            f"unknown {self.noun} {name!r}.{hint} The {self.noun}s are: {', '.join(self.names())}"
        )
