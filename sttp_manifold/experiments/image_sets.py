"""Image classification sets by name: Hugging Face ``datasets``, from the hub or from a folder.

Any set with a column of images and one of labels will do. Sets are read whole, as bytes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.data import Examples, Splits, stratified

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CIFAR10",
    "PREFIX",
    "STL10",
    "ImageSet",
    "image_splits",
    "parse_source",
    "read_image_set",
    "scaled_splits",
]

PREFIX = "hf:"
CIFAR10 = "uoft-cs/cifar10"
STL10 = "tanganke/stl10"

_TESTS = ("test", "validation", "valid", "val")
_LABELS = ("label", "fine_label", "labels", "target")
_SEED = 2021
_EXTRA = "pip install 'sttp-manifold[data]'"


@dataclass(frozen=True)
class ImageSet:
    """Images of one split, and what is on them.

    Attributes:
        classes: names of the labels.

    Shape:
        images: (n, channels, height, width) bytes; 1 channel where all are grey, else 3.
        labels: (n,) integers.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


def parse_source(text: str) -> tuple[str, int | None]:
    """A name or folder, and the size that images are brought to, if one is asked for.

    Raises:
        ConfigError: the name is empty, or the size is none.

    Example:
        >>> parse_source("uoft-cs/cifar100"), parse_source("tanganke/stl10@48")
        (('uoft-cs/cifar100', None), ('tanganke/stl10', 48))
    """
    found = re.fullmatch(r"([^@]+)(?:@([1-9]\d{0,3}))?", text)
    if found is None:
        raise ConfigError(
            f"image set {text!r}: expected the name of a Hugging Face data set or a folder, and a "
            f"size where images have several, as in {PREFIX}{STL10}@48"
        )
    return found[1], None if found[2] is None else int(found[2])


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"image sets by name need the package datasets, which is not installed: {_EXTRA}"
        ) from error
    return datasets


def _from_folder(folder: Path) -> Mapping[str, Any]:
    """Splits of a folder: of ``save_to_disk``, of Parquet files, or of images in class folders."""
    datasets = _datasets()
    if (folder / "dataset_dict.json").is_file():
        return dict(datasets.load_from_disk(str(folder)))
    if (folder / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(folder))}
    tables = sorted(folder.rglob("*.parquet"))
    # The hub's file names begin with their split: train-00000-of-00001.parquet.
    named: dict[str, list[str]] = {}
    for path in tables:
        split = re.split(r"[-_.]", path.name)[0]
        named.setdefault(split, []).append(str(path))
    if named:
        return dict(datasets.load_dataset("parquet", data_files=named))
    return dict(datasets.load_dataset("imagefolder", data_dir=str(folder)))


def _opened(source: str, root: Path | None) -> Mapping[str, Any]:
    """Splits of a set by name.

    Raises:
        ConfigError: there is no such set, here or on the hub.
    """
    folder = root or (Path(source) if Path(source).is_dir() else None)
    try:
        if folder is not None:
            return _from_folder(folder)
        return dict(_datasets().load_dataset(source))
    except ConfigError:
        raise
    except Exception as error:
        # What the library raises depends on how a set is stored, and on the network.
        why = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"cannot read the image set {str(folder or source)!r} ({type(error).__name__}: {why}). "
            "Without a network, download it elsewhere and name its folder with --data-dir: "
            "Parquet files as on the hub, or what save_to_disk wrote"
        ) from error


def _columns(name: str, split: Any) -> tuple[str, str, tuple[str, ...]]:
    """Column of the images, column of the labels, names of the classes.

    Raises:
        ConfigError: one of them is not there.
    """
    datasets = _datasets()
    features = split.features
    images = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    classes = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [key for key in _LABELS if key in features] or classes
    if not images or not labels:
        raise ConfigError(
            f"image set {name!r} has the columns {', '.join(features)}; expected one of images "
            f"(image, img) and one of labels ({', '.join(_LABELS)})"
        )
    kind = features[labels[0]]
    if isinstance(kind, datasets.ClassLabel):
        return images[0], labels[0], tuple(kind.names)
    values = split[labels[0]]
    return images[0], labels[0], tuple(map(str, range(int(max(values)) + 1)))


def _pixels(image: Image, size: int | None) -> np.ndarray:
    """Bytes of an image, ``(h, w)`` where it is grey, else ``(h, w, 3)``; a square of a size."""
    from PIL.Image import Resampling

    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.crop(box).resize((size, size), Resampling.BILINEAR)
    return np.asarray(image, np.uint8)


def _stacked(name: str, found: Iterable[np.ndarray]) -> Tensor:
    arrays = list(found)
    sizes = {array.shape[:2] for array in arrays}
    if len(sizes) != 1:
        first = " and ".join(f"{w} x {h}" for h, w in sorted(sizes)[:2])
        raise ConfigError(
            f"image set {name!r} has {len(arrays)} images of {len(sizes)} sizes"
            + (f", {first} among them; say which one they are brought to, as in " if sizes else "")
            + (f"--task {PREFIX}{name}@64" if sizes else "; expected one image at the least")
        )
    if len({array.ndim for array in arrays}) > 1:
        arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in arrays]
    stack = torch.from_numpy(np.stack(arrays))
    return stack[:, None] if stack.ndim == 3 else stack.permute(0, 3, 1, 2).contiguous()


def read_image_set(
    source: str, root: Path | None = None, *, size: int | None = None
) -> dict[str, ImageSet]:
    """Every labelled split of a set, by its name there.

    Args:
        source: name of a Hugging Face data set, or a folder.
        root: folder to read in place of that name.
        size: bring all images to squares of so many pixels: the middle square, bilinear.

    Raises:
        ConfigError: ``datasets`` is not installed, the set is not there, has no images and labels,
            or images of several sizes.
    """
    found = {}
    for split, table in _opened(source, root).items():
        image, label, classes = _columns(source, table)
        labels = torch.tensor(list(table[label]), dtype=torch.int64)
        keep = labels >= 0
        # Unlabelled images have the label -1 on the hub.
        table = table if bool(keep.all()) else table.select(keep.nonzero().flatten().tolist())
        if not len(table):
            continue
        images = _stacked(source, (_pixels(picture, size) for picture in table[image]))
        found[split] = ImageSet(images, labels[keep], classes)
    return found


@functools.cache
def image_splits(
    source: str, root: Path | None = None, *, size: int | None = None
) -> dict[str, ImageSet]:
    """A set as ``train``, ``val`` and ``test``, the same on every machine.

    The test split is the set's own, or its validation split where there is no other; else a sixth
    of the training images. For validation there are 5,000 of the training images, or a tenth of a
    set of fewer than 50,000, with equal shares of classes.

    Args:
        source: name of a Hugging Face data set, or a folder.
        root: folder to read in place of that name.
        size: bring all images to squares of so many pixels.

    Raises:
        ConfigError: as :func:`read_image_set`, or there is no training split, or too little in it.
    """
    found = read_image_set(source, root, size=size)
    if "train" not in found:
        raise ConfigError(
            f"image set {source!r} has the labelled splits {', '.join(found) or 'none'}; expected "
            "one named train"
        )
    whole = found["train"]
    test = next((found[name] for name in _TESTS if name in found), None)
    val = min(5000, len(whole) // 10)
    sizes = [val] if test else [val, len(whole) // 6]
    try:
        train, *parts = stratified(whole.labels.numpy(), tuple(sizes), _SEED)
    except ValueError as error:
        raise ConfigError(
            f"image set {source!r}: {len(whole)} training images do not split in equal shares of "
            f"classes ({error})"
        ) from error
    parts = [train, *parts]
    cut = [ImageSet(whole.images[i], whole.labels[i], whole.classes) for i in parts]
    test = test or cut.pop()
    if test.images.shape[1:] != whole.images.shape[1:]:
        raise ConfigError(
            f"image set {source!r}: images to train are {tuple(whole.images.shape[1:])}, images to "
            f"test {tuple(test.images.shape[1:])}; name a size, as in --task {PREFIX}{source}@32"
        )
    return dict(zip(("train", "val", "test"), (*cut, test), strict=True))


@functools.cache
def scaled_splits(source: str, size: int | None, root: Path | None = None) -> Splits:
    """The set as floats: zero mean and unit variance in each channel of the training images.

    Args:
        source: name of a Hugging Face data set, or a folder.
        size: bring all images to squares of so many pixels.
        root: folder to read in place of that name.

    Shape:
        inputs: (n, channels, height, width), float32.

    Raises:
        ConfigError: as :func:`image_splits`.
    """
    sets = image_splits(source, root, size=size)
    # Counts of 256 values a channel: exact, and the same however sums are added.
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack(
        [torch.bincount(c.flatten(), minlength=256) for c in sets["train"].images.unbind(1)]
    ).double()
    weights = counts / counts.sum(dim=1, keepdim=True)
    mean = weights @ values
    spread = ((weights * (values - mean[:, None]) ** 2).sum(dim=1)).sqrt().clamp_min(1.0)

    def scaled(part: ImageSet) -> Examples:
        shift, scale = (v.float().view(-1, 1, 1) for v in (mean, spread))
        return Examples(part.images.float().sub_(shift).div_(scale), part.labels)

    return Splits(*(scaled(sets[name]) for name in ("train", "val", "test")))
