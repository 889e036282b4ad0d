"""The classifier whose features metrics compare: trained here, on the task's own labels, and kept.

Its distances are those of this small network. They are no FID, and comparable only among runs of
one task and one classifier; records hold its digest.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.cache import CACHE_VARIABLE, cache_folder
from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.files import locked, named_errors, write_bytes
from sttp_manifold.experiments.specs import derived_seed

__all__ = ["Classifier", "FeatureNet", "classifier_of"]

_FEATURES = 64
_BATCH = 128
_LARGE_BATCH = 1024
_LR = 2e-3
_BOTTOM = 4
_MOST_PATIENCE = 3600.0


class FeatureNet(nn.Module):
    """Convolutions that each halve the image until it has 4 pixels or so, and two linear layers.

    Args:
        size: height and width of the images.
        channels: of the images.
        classes: to tell apart.
        width: channels of the first convolution; each further one has twice as many.

    Shape:
        - x: ``(n, channels, size, size)``
        - output: ``(n, classes)``
    """

    def __init__(self, size: int, channels: int, classes: int, width: int = 16) -> None:
        super().__init__()
        convolutions: list[nn.Module] = []
        here, side = channels, size
        while side >= 2 * _BOTTOM or not convolutions:
            convolutions.append(nn.Conv2d(here, width, 3, padding=1))
            here, width, side = width, 2 * width, side // 2
        self.convolutions = nn.ModuleList(convolutions)
        self.hidden = nn.Linear(here * side * side, _FEATURES)
        self.last = nn.Linear(_FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer sees.

        Shape:
            - x: ``(n, channels, size, size)``
            - output: ``(n, 64)``
        """
        for convolution in self.convolutions:
            x = max_pool2d(convolution(x).relu(), 2)
        out: Tensor = self.hidden(x.flatten(1)).relu()
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes.

        Shape:
            - x: ``(n, channels, size, size)``
            - output: ``(n, classes)``
        """
        out: Tensor = self.last(self.features(x))
        return out


@dataclass(frozen=True)
class Classifier:
    """A trained network, and how good it is.

    Attributes:
        net: on the CPU, for evaluation.
        accuracy: on the test split, in percent.
        digest: stands for its weights.
    """

    net: FeatureNet
    accuracy: float
    digest: str

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features of images, on the images' device.

        Shape:
            - images: ``(n, channels, size, size)``, in [-1, 1]
            - output: ``(n, 64)``, float32
        """
        net = self.net.to(images.device)
        return torch.cat([net.features(x.float()) for x in images.split(_LARGE_BATCH)])


def classifier_of(name: str, splits: Splits, epochs: int) -> Classifier:
    """The classifier of a task: from the cache if it is there, else trained and kept.

    One process trains, others wait for it. It is trained on the CPU in float32, the same for
    every device; the cache is the folder ``sttp-manifold`` where the system keeps caches, or that
    of the variable ``STTP_CACHE``.

    Args:
        name: of the task, with the version of its data.
        splits: images in [-1, 1], with labels.
        epochs: passes over the training split.

    Raises:
        ConfigError: images without labels, or the cache cannot be written.
    """
    train = splits.train
    targets = train.targets
    if targets.is_floating_point() or not len(targets) or int(targets.min()) < 0:
        raise ConfigError(
            f"the task {name!r} has images without classes: the metrics need a classifier of them; "
            "expected integer labels, 0 or more"
        )
    channels, size, width = train.inputs.shape[1:]
    assert size == width
    classes = 1 + int(max(s.targets.max() for s in (splits.train, splits.val, splits.test)))
    facts = (name, size, channels, classes, epochs, len(train), _image_digest(train))
    key = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    path = cache_folder() / f"classifier-{key}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed("classifier", name))
        net = FeatureNet(size, channels, classes)
    advice = f"name a folder that can be written with the variable {CACHE_VARIABLE}"
    with named_errors(path, advice), locked(path, patience=_MOST_PATIENCE):
        if not _load(net, path):
            _train(net, train, epochs, name)
            content = io.BytesIO()
            torch.save(net.state_dict(), content)
            write_bytes(path, content.getvalue())
    net.eval().requires_grad_(False)
    with torch.no_grad():
        test = splits.test
        right = [
            net(x.float()).argmax(1) == y
            for x, y in zip(
                test.inputs.split(_LARGE_BATCH), test.targets.split(_LARGE_BATCH), strict=True
            )
        ]
    accuracy = 100 * float(torch.cat(right).double().mean())
    whole = b"".join(t.numpy().tobytes() for t in net.state_dict().values())
    return Classifier(net, accuracy, hashlib.sha256(whole).hexdigest()[:16])


def _image_digest(examples: Examples) -> str:
    part = examples.inputs[:256].float().contiguous().numpy().tobytes()
    return hashlib.sha256(part + examples.targets.numpy().tobytes()).hexdigest()[:16]


def _load(net: FeatureNet, path: Path) -> bool:
    """Take the weights of a file; whether there were such."""
    if not path.is_file():
        return False
    try:
        net.load_state_dict(torch.load(path, weights_only=True))
    except Exception:
        # A damaged file is written anew; what it raises is not written down anywhere.
        return False
    return True


def _train(net: FeatureNet, train: Examples, epochs: int, name: str) -> None:
    optimizer = torch.optim.Adam(net.parameters(), _LR)
    order = torch.Generator().manual_seed(derived_seed("classifier order", name))
    for _ in range(epochs):
        for index in torch.randperm(len(train), generator=order).split(_BATCH):
            optimizer.zero_grad()
            loss = cross_entropy(net(train.inputs[index].float()), train.targets[index])
            loss.backward()
            optimizer.step()
