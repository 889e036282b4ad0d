"""A run's curves and singular values as a TensorBoard log."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.files import file_name
from sttp_manifold.experiments.runs.trace import Trace
from sttp_manifold.experiments.specs import RunSpec

__all__ = ["BOARDS", "Board", "check_board"]

BOARDS = "tensorboard"
_AXES = ("epoch", "iteration", "evaluations")


def check_board() -> None:
    """Find out before the first run whether logs can be written.

    Raises:
        ConfigError: the package is not installed.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "--tensorboard needs the package tensorboard, which is not installed: "
            "pip install 'sttp-manifold[tensorboard]'"
        )


class Board:
    """The log of one run; nothing is written before there is something to tell.

    Args:
        folder: of the comparison.
        spec: of the run.
    """

    def __init__(self, folder: Path, spec: RunSpec) -> None:
        words = file_name(spec.label().replace(" ", "-"))
        self.path = folder / BOARDS / f"{words}-{spec.hash}"
        self._writer: Any = None
        self._told = 0

    def goes_on(self, trace: Trace) -> None:
        """Leave out what was told before a run was cut.

        Args:
            trace: as it was taken up.
        """
        self._told = len(trace.curves["seconds"])

    def look(self, trace: Trace) -> None:
        """Write what is new.

        Args:
            trace: of the run.
        """
        curves = trace.curves
        for k in range(self._told, len(curves["seconds"])):
            step = next((curves[axis][k] for axis in _AXES if curves[axis][k] is not None), k)
            writer = self._open(step)
            for name, values in curves.items():
                value = values[k]
                if name not in _AXES and isinstance(value, (int, float)):
                    writer.add_scalar(name, value, step)
            for layer, spectra in trace.spectra.items():
                s = spectra[k]
                writer.add_scalar(f"largest singular value/{layer}", max(s), step)
                writer.add_scalar(f"smallest one on record/{layer}", min(s), step)
            self._told = k + 1
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Let the log go."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run wrote beyond its checkpoint is told again.
            self._writer = SummaryWriter(str(self.path), purge_step=step)
        return self._writer
