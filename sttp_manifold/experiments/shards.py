"""A part of a plan for each job of a batch system: no job has to know of another.

A run belongs to the shard that its specification's hash falls to, so that none is run by two, and
each shard has a record file of its own in the one folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sttp_manifold.errors import ConfigError

__all__ = ["Shard"]

_MOST = 10_000


@dataclass(frozen=True)
class Shard:
    """One of so many parts of every plan.

    Attributes:
        number: from 1.
        count: how many there are.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that ``3/16`` stands for.

        Raises:
            ConfigError: another text.

        Example:
            >>> Shard.parse("3/16")
            Shard(number=3, count=16)
        """
        found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text)
        if found is None or not int(found[1]) <= int(found[2]) <= _MOST:
            raise ConfigError(
                f"--shard {text!r}: expected its number and how many there are, as in 3/16"
            )
        return cls(int(found[1]), int(found[2]))

    def has(self, key: str) -> bool:
        """Whether a run is of this shard.

        Args:
            key: hash of its specification.
        """
        return int(key, 16) % self.count == self.number - 1

    def file_name(self, name: str) -> str:
        """The shard's own file in place of a record file.

        Example:
            >>> Shard(3, 16).file_name("records.jsonl")
            'records-3-of-16.jsonl'
        """
        path = Path(name)
        return f"{path.stem}-{self.number}-of-{self.count}{path.suffix}"
