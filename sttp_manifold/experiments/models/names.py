"""Networks by name, as a command line has them: ``resnet-20``, ``wrn-28-10``, ``sngan-32``."""

from __future__ import annotations

import re

import torch
from torch import nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.models.resnet import ResNet, WideResNet
from sttp_manifold.experiments.models.sngan import SNGANDiscriminator, SNGANGenerator

__all__ = ["classifier", "network"]


def _numbers(pattern: str, name: str) -> list[int] | None:
    found = re.fullmatch(pattern, name)
    return found and [int(number) for number in found.groups()]


def classifier(name: str, channels: int = 3, classes: int = 10) -> nn.Module:
    """A residual network by its name.

    Args:
        name: ``resnet-D``, or ``wrn-D-K`` of depth ``D`` and ``K`` times as wide.
        channels: of the images.
        classes: outputs.

    Raises:
        ConfigError: another name, or a depth that such networks do not have.

    Example:
        >>> type(classifier("wrn-10-2", channels=1)).__name__
        'WideResNet'
    """
    if numbers := _numbers(r"resnet-(\d+)", name):
        return ResNet(numbers[0], channels, classes)
    if numbers := _numbers(r"wrn-(\d+)-(\d+)", name):
        return WideResNet(numbers[0], numbers[1], channels, classes)
    raise ConfigError(f"unknown model {name!r}; expected resnet-D or wrn-D-K, as in wrn-28-10")


def network(name: str, device: torch.device | str | None = None) -> nn.Module:
    """A published network by its name.

    Args:
        name: that of a :func:`classifier`, or ``sngan-S-discriminator`` and ``sngan-S-generator``
            for images of ``S`` pixels.
        device: where it is made; on ``"meta"`` it takes no time and no memory.

    Raises:
        ConfigError: another name, or a size that such networks do not have.

    Example:
        >>> sum(p.numel() for p in network("wrn-28-10", device="meta").parameters())
        36479194
    """
    with torch.device(torch.get_default_device() if device is None else device):
        if numbers := _numbers(r"sngan-(\d+)-discriminator", name):
            return SNGANDiscriminator.for_images(*numbers)
        if numbers := _numbers(r"sngan-(\d+)-generator", name):
            return SNGANGenerator.for_images(*numbers)
        if name.startswith(("resnet-", "wrn-")):
            return classifier(name)
    raise ConfigError(
        f"unknown network {name!r}; expected resnet-D, wrn-D-K, sngan-S-discriminator or "
        "sngan-S-generator, as in sngan-32-discriminator"
    )
