"""What a user may set of a training run beside the method, each a field of its specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.models import network

__all__ = ["OPTIONS", "checked_options"]

_SCHEDULES = ("cosine", "linear", "constant")
_STARTS = ("common", "own", "pretrained")
_AMP = ("bfloat16", "float16")

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "epochs": "--epochs",
        "batch_size": "--batch-size",
        "schedule": "--schedule",
        "model": "--model",
        "start": "--start",
        "pretrain_epochs": "--pretrain-epochs",
        "pretrain_lr": "--pretrain-lr",
        "augment": "--augment",
        "amp": "--amp",
        "image_size": "--image-size",
        "train_examples": "--train-examples",
        "val_examples": "--val-examples",
    }
)
"""Option of the command line for each."""


def _one_of(*names: str) -> Callable[[str, Any], None]:
    def check(flag: str, value: Any) -> None:
        if value not in names:
            raise ConfigError(f"{flag} {value!r}: expected {', '.join(names[:-1])} or {names[-1]}")

    return check


def _whole(flag: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{flag} {value}: expected a whole number, 1 or more")


def _rate(flag: str, value: Any) -> None:
    if not 0 < value < 1e6:
        raise ConfigError(f"{flag} {value}: expected a positive number")


def _network(flag: str, value: Any) -> None:
    if not str(value).startswith(("resnet-", "wrn-")):
        raise ConfigError(f"{flag} {value}: expected resnet-D or wrn-D-K, as in wrn-28-10")
    network(str(value), device=torch.device("meta"))


def _crop_flip(flag: str, value: Any) -> None:
    if value != "crop-flip":
        raise ConfigError(f"{flag} {value!r}: expected crop-flip")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "epochs": _whole,
    "batch_size": _whole,
    "schedule": _one_of(*_SCHEDULES),
    "model": _network,
    "start": _one_of(*_STARTS),
    "pretrain_epochs": _whole,
    "pretrain_lr": _rate,
    "augment": _crop_flip,
    "amp": _one_of(*_AMP),
    "image_size": _whole,
    "train_examples": _whole,
    "val_examples": _whole,
}
_OF_THE_SPECIFICATION = ("epochs", "batch_size", "schedule")
_OF_PRETRAINING = ("pretrain_epochs", "pretrain_lr")


def checked_options(given: Mapping[str, Any], epochs: int | None) -> dict[str, Any]:
    """Options that a specification holds beside its own fields: those that were given.

    Hashes of runs without them stay what they were.

    Args:
        given: settings by name; those that are no options of training are passed over.
        epochs: of the run.

    Raises:
        ConfigError: a value that is none, or an option that nothing would heed.
    """
    found = {}
    for name, check in _CHECKS.items():
        if given.get(name) is not None:
            check(OPTIONS[name], given[name])
            if name not in _OF_THE_SPECIFICATION:
                found[name] = given[name]
    if found.get("start") == "common":
        del found["start"]  # the default
    pretrained = found.get("start") == "pretrained"
    for name in _OF_PRETRAINING:
        if name in found and not pretrained:
            raise ConfigError(f"{OPTIONS[name]} {found[name]}: heeded with --start pretrained only")
    if pretrained:
        found.setdefault("pretrain_epochs", epochs)
        found["pretrain_lr"] = float(found.get("pretrain_lr", 1e-3))
    return found
