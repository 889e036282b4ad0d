"""Long runs that are cut: their state on disk, whole or absent, and gone when the run is done."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from sttp_manifold._files import remove_leftovers
from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.distributed import is_first, of_all
from sttp_manifold.experiments.files import replacing, write_bytes

__all__ = ["CHECKPOINTS", "PRODUCTS", "Checkpoint", "Resumable"]

CHECKPOINTS = "checkpoints"
PRODUCTS = "products"


class Resumable(Protocol):
    """What can be cut: a :class:`~sttp_manifold.experiments.runs.contract.Run`."""

    def state_dict(self) -> dict[str, Any] | None:
        """All that it goes on from; None where it cannot be cut."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        ...


class Checkpoint:
    """The state of one run, in a file named by the hash of its specification.

    Args:
        folder: of the comparison.
        key: hash of the specification.
        every: seconds between two states; a kill loses no more than that.
    """

    def __init__(self, folder: Path, key: str, every: float = 60.0) -> None:
        self.path = folder / CHECKPOINTS / f"{key}.pt"
        self._key = key
        self._every = every
        self._latest = time.monotonic()

    def resume(self, run: Resumable) -> bool:
        """Go on from the state that is there; whether there was one.

        One that cannot be read, or is of another run, is passed over: the run starts anew.

        Args:
            run: one that has begun.

        Raises:
            ConfigError: the state is one of another version of this package.
        """
        state = of_all(self._read())
        if state is None:
            return False
        try:
            run.load_state_dict(state)
        except Exception as error:
            # Half loaded, it is good for nothing; the next try starts anew.
            self.remove()
            raise ConfigError(f"{self.path} does not fit its run any longer: {error}") from error
        return True

    def _read(self) -> dict[str, Any] | None:
        if not is_first() or not self.path.is_file():
            return None
        try:
            content: dict[str, Any] = torch.load(self.path, weights_only=True)
            state: dict[str, Any] | None = content["state"]
            return state if content["hash"] == self._key else None
        except Exception:
            # What damaged files raise is not written down anywhere.
            return None

    def look(self, run: Resumable) -> None:
        """Write the state where the last one is old enough and the run can be cut.

        Args:
            run: between two pieces.
        """
        if not is_first() or time.monotonic() - self._latest < self._every:
            return
        state = run.state_dict()
        if state is None:
            return
        with replacing(self.path) as temporary:
            torch.save({"hash": self._key, "state": state}, temporary)
        self._latest = time.monotonic()

    def leave(self, files: Mapping[str, bytes]) -> None:
        """Write what a run leaves beside its record, each file whole or not there.

        Args:
            files: content by name; the folder is the run's own.
        """
        for name, content in files.items():
            path = self.path.parent.parent / PRODUCTS / self._key / name
            remove_leftovers(path)
            write_bytes(path, content)

    def remove(self) -> None:
        """Remove the file, what a kill left of one, and the folder with the last one."""
        self.path.unlink(missing_ok=True)
        remove_leftovers(self.path)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()
