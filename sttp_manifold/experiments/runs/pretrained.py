"""Dense networks that runs go on from: trained once for all methods of a seed, and kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.cache import cache_folder
from sttp_manifold.experiments.checkpoint import Checkpoint
from sttp_manifold.experiments.distributed import is_first, of_all
from sttp_manifold.experiments.files import lock, named_errors, replacing
from sttp_manifold.experiments.runs.contract import Run
from sttp_manifold.experiments.specs import RunSpec
from sttp_manifold.experiments.trainers import TRAINERS

__all__ = ["PRETRAIN", "PRETRAINER", "kept_state", "pretraining"]

PRETRAIN = "pretrain"
PRETRAINER = next(trainer for trainer in TRAINERS if trainer.name == "dense-adam")

_SECONDS_BETWEEN_LOOKS = 0.5
# What decides a run that goes on from a pretrained network, but not that network.
_LATER = ("start", "pretrain_epochs", "pretrain_lr")


def pretraining(spec: RunSpec) -> RunSpec:
    """How the dense network is trained that a run starts from: the same for all its methods.

    Args:
        spec: of a run whose option ``start`` is ``pretrained``.
    """
    options = {name: value for name, value in spec.options.items() if name not in _LATER}
    return replace(
        spec,
        method=PRETRAINER.name,
        kind=PRETRAINER.kind,
        parameterization=PRETRAINER.parameterization,
        optimizer=PRETRAINER.optimizer,
        momentum=PRETRAINER.momentum,
        spectrum=None,
        schedule="cosine",
        rank=0,
        epochs=int(spec.options["pretrain_epochs"] or 1),
        lr=float(spec.options["pretrain_lr"] or 1e-3),
        purpose=PRETRAIN,
        options=options,
    )


def kept_state(
    key: str, make: Callable[[], Run], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """State of the network that a run ends with: from the cache, or trained now and kept.

    One process of a machine trains it, the others wait. Where it is killed it goes on from its
    latest checkpoint.

    Args:
        key: hash of the run's specification.
        make: the run.
        device: where to compute.
        dtype: what in.

    Raises:
        ConfigError: the cache cannot be written.
        DivergedError: the run diverged.
    """
    path = cache_folder() / "pretrained" / f"{key}.pt"
    advice = "name another folder with the variable STTP_CACHE"
    with named_errors(path, advice):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.with_suffix(".lock")) if is_first() else _nothing():
        state = of_all(_read(path))
        if state is not None:
            return state
        run = make()
        checkpoint = Checkpoint(path.parent, key)
        run.begin(device, dtype)
        checkpoint.resume(run)
        while run.advance():
            checkpoint.look(run)
        final = run.state_dict()
        assert final is not None
        state = {name: value.cpu() for name, value in final["model"].items()}
        if is_first():
            with named_errors(path, advice), replacing(path) as temporary:
                torch.save(state, temporary)
            checkpoint.remove()
        return state


def _read(path: Path) -> dict[str, Any] | None:
    if not is_first() or not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"{path} is no kept network ({error}); remove it, and it is made again"
        ) from error
    return state


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process of this machine holds a file; it is let go by a kill as well."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while not lock(descriptor):
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        yield
    finally:
        os.close(descriptor)
