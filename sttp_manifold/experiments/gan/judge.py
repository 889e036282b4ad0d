"""How generated images are judged: features of a classifier, distances, and their floor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.experiments.data import Splits
from sttp_manifold.experiments.gan.classifier import classifier_of
from sttp_manifold.experiments.gan.distances import coverage, frechet_distance, kernel_distance
from sttp_manifold.experiments.gan.published import inception_weights, published_metrics
from sttp_manifold.experiments.gan.samples import noise
from sttp_manifold.experiments.gan.setting import GanSetting
from sttp_manifold.experiments.specs import derived_seed

__all__ = ["Judge"]

_AT_ONCE = 512
# While a run goes on; all are compared at its end.
_QUICK = 1024


class Judge:
    """Makes images from the same noise at every look, and compares them with real ones.

    Args:
        name: of the task, with the version of its data.
        splits: real images in [-1, 1], with classes.
        setting: of the training.
        seed: of the noise.
        device: where to compute.

    Attributes:
        facts: digest and accuracy of the classifier.

    Raises:
        ConfigError: images without classes, no place to keep their classifier, or ``fid`` without
            what it needs.
    """

    def __init__(
        self, name: str, splits: Splits, setting: GanSetting, seed: int, device: torch.device
    ) -> None:
        if setting.fid:
            # Found out before the training, not after it.
            inception_weights()
        self.splits, self.setting, self.device = splits, setting, device
        self._classifier = classifier_of(name, splits, setting.classifier_epochs)
        self._noise = noise(setting.samples, setting.latent, seed)
        self._real = self._features(splits.val.inputs)
        self.facts: dict[str, Any] = {
            "classifier": self._classifier.digest,
            "classifier_accuracy": self._classifier.accuracy,
        }

    @torch.no_grad()
    def images(self, generator: nn.Module) -> Tensor:
        """Images of a generator that is in evaluation mode.

        Args:
            generator: from vectors to images.

        Shape:
            - output: ``(samples, channels, size, size)``, float32
        """
        dtype = next(generator.parameters()).dtype
        parts = self._noise.to(self.device, dtype).split(_AT_ONCE)
        return torch.cat([generator(z).float() for z in parts])

    def look(self, images: Tensor) -> dict[str, float]:
        """Distances to the validation split; of all images, and of some where it is costly.

        Shape:
            - images: as :meth:`images`
        """
        found = self._features(images)
        few, real = found[:_QUICK], self._real[:_QUICK]
        precision, recall = coverage(real, few)
        return {
            "val_metric": frechet_distance(found, self._real),
            "kernel": kernel_distance(few, real),
            "precision": precision,
            "recall": recall,
        }

    def test(self, images: Tensor) -> tuple[float, dict[str, Any]]:
        """The distance to the test split, and all else that is told of it.

        Shape:
            - images: as :meth:`images`
        """
        count = self.setting.samples
        found, real = self._features(images), self._features(self.splits.test.inputs)
        precision, recall = coverage(real[:count], found)
        index = torch.randperm(
            len(self.splits.train), generator=torch.Generator().manual_seed(derived_seed("floor"))
        )[:count]
        other = self._features(self.splits.train.inputs[index])
        own = {
            "kernel": kernel_distance(found, real[:count]),
            "precision": precision,
            "recall": recall,
            "classes": self._shares(images),
            # Of as many real images: the least to be hoped for.
            "floor": frechet_distance(other, real),
            "floor_kernel": kernel_distance(other, real[:count]),
        }
        if self.setting.fid:
            own.update(published_metrics(images, self.splits.test.inputs))
        return frechet_distance(found, real), own

    def _features(self, images: Tensor) -> Tensor:
        return torch.cat(
            [
                self._classifier.features(part.to(self.device, torch.float32))
                for part in images.split(_AT_ONCE)
            ]
        )

    @torch.no_grad()
    def _shares(self, images: Tensor) -> list[float]:
        """Part of the images that the classifier gives to each class."""
        net = self._classifier.net.to(images.device)
        found = torch.cat([net(x).argmax(1) for x in images.split(_AT_ONCE)])
        counts = found.bincount(minlength=net.last.out_features)
        return [float(count) / len(images) for count in counts]
