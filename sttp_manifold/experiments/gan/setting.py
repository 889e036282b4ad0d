"""What decides the numbers of a GAN's training, beside the discriminator's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.json_values import LARGEST

__all__ = ["FLAGS", "PRESETS", "GanSetting"]


@dataclass(frozen=True)
class GanSetting:
    """Networks, steps and metrics of one training; a field each of the specification's options.

    Raises:
        ConfigError: a number out of range.

    Attributes:
        size: height and width of the images.
        ngf: width of the generator.
        ndf: width of the discriminator.
        latent: length of the normal vector that an image is made from.
        steps: steps of the generator.
        every: steps between two looks at images and spectra.
        batch_size: real images, and as many generated ones, in a step.
        discriminator_steps: of the discriminator, for each of the generator.
        generator_lr: rate of the generator's Adam, at the first step.
        ema: decay of the average of the generator's weights, which makes the images judged.
        samples: images that are judged.
        classifier_epochs: epochs of the classifier whose features are compared.
        fid: FID, KID and Inception Score at the end as well, by ``torch-fidelity``.
        amp: mixed precision: ``bfloat16``, or None for none.
    """

    size: int = 16
    ngf: int = 16
    ndf: int = 16
    latent: int = 128
    steps: int = 1500
    every: int = 250
    batch_size: int = 64
    discriminator_steps: int = 1
    generator_lr: float = 1e-3
    ema: float = 0.995
    samples: int = 2560
    classifier_epochs: int = 2
    fid: bool = False
    amp: str | None = None

    def __post_init__(self) -> None:
        """Check every number.

        Raises:
            ConfigError: says which one, and what was expected.
        """
        for name, value in asdict(self).items():
            flag = FLAGS.get(name, name)
            if name == "fid":
                continue
            if name == "amp":
                if value not in (None, "bfloat16"):
                    raise ConfigError(
                        f"{flag} {value}: expected bfloat16, whose range needs no scaling of losses"
                    )
            elif name == "generator_lr":
                if not 0 < value <= LARGEST:
                    raise ConfigError(f"{flag} {value}: expected a positive number")
            elif name == "ema":
                if not 0 <= value < 1:
                    raise ConfigError(f"{flag} {value}: expected 0 or more, and less than 1")
            elif not (math.isfinite(value) and 1 <= value <= 10**9):
                raise ConfigError(f"{flag} {value}: expected 1 or more")
        if self.samples < 64:
            raise ConfigError(f"--samples {self.samples}: expected 64 or more, to compare sets")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> GanSetting:
        """A setting from the options of a specification, of which others are passed over."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


FLAGS: dict[str, str] = {
    "ngf": "--ngf",
    "ndf": "--ndf",
    "latent": "--latent",
    "steps": "--steps",
    "every": "--every",
    "batch_size": "--batch",
    "discriminator_steps": "--discriminator-steps",
    "generator_lr": "--generator-lr",
    "ema": "--ema",
    "samples": "--samples",
    "classifier_epochs": "--classifier-epochs",
    "fid": "--fid",
    "amp": "--amp",
}
"""Option of the command line for each field that has one; size comes with the task."""

PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "published": {
        "ngf": 256,
        "ndf": 128,
        "steps": 50_000,
        "every": 1000,
        "discriminator_steps": 5,
        "generator_lr": 2e-4,
        "ema": 0.999,
        "samples": 10_000,
        "classifier_epochs": 20,
        "amp": "bfloat16",
    },
}
"""Settings by name; the published one is meant for a GPU."""
