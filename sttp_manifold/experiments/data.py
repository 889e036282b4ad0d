"""Data of the tasks: fixed splits, the same on every machine."""

from __future__ import annotations

import functools
import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.specs import derived_seed

__all__ = [
    "COMPLETION_MODES",
    "COMPLETION_RANK",
    "FASHION_MNIST_VARIABLE",
    "Examples",
    "Splits",
    "completion",
    "completion_truth",
    "digits",
    "fashion_mnist",
    "read_idx",
    "stratified",
]

FASHION_MNIST_VARIABLE = "STTP_FASHION_MNIST"
_FASHION_MNIST_HOME = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


_MOST_DIMENSIONS = 8
_MOST_BYTES = 2**31
_A_FEW_MORE = 2**16


@dataclass(frozen=True)
class Examples:
    """Inputs and targets of one split.

    Shape:
        inputs: (n, ...). Images are (n, features) or (n, channels, height, width) floats; places
            in a matrix are (n, 2) integers.
        targets: (n,).
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device, dtype: torch.dtype) -> Examples:
        """Floats to the dtype, all to the device.

        Args:
            device: where to.
            dtype: of what is floating; integers stay integers.
        """

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        return Examples(move(self.inputs), move(self.targets))

    def __getitem__(self, index: Tensor) -> Examples:
        return Examples(self.inputs[index], self.targets[index])


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of a data set.

    Attributes:
        train: what steps are made of.
        val: what learning rates are chosen by.
        test: looked at once a run, after its last step.
    """

    train: Examples
    val: Examples
    test: Examples


def stratified(targets: np.ndarray, sizes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    """Disjoint index sets of the given sizes, and the rest first, with equal shares of classes."""
    from sklearn.model_selection import train_test_split

    rest = np.arange(len(targets))
    parts = []
    for size in sizes:
        rest, part = train_test_split(
            rest, test_size=size, random_state=seed, stratify=targets[rest]
        )
        parts.append(part)
    return [rest, *parts]


@functools.cache
def digits(root: Path | None = None) -> Splits:
    """scikit-learn's 1,797 images of digits: 1,197 / 300 / 300.

    Shape:
        inputs: (n, 64), in [-0.5, 0.5].
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    inputs = torch.from_numpy(bunch.data / 16.0 - 0.5)
    targets = torch.from_numpy(bunch.target.astype(np.int64))
    whole = Examples(inputs, targets)
    # Any fixed number will do; 2021 is the year of the method.
    train, val, test = (
        whole[torch.from_numpy(part)] for part in stratified(bunch.target, (300, 300), 2021)
    )
    return Splits(train, val, test)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of bytes, gzipped or not: MNIST's format.

    Two zero bytes, a type byte (8: unsigned bytes), the number of dimensions, then each dimension
    as a big-endian 32-bit integer, then the elements in row-major order. No more is read, or
    unfolded, than the header promises.

    Raises:
        ConfigError: the file is no such file, is not whole, or promises more than
            2 GiB.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\x00\x00\x08":
                raise ConfigError(f"{path} is no IDX file of unsigned bytes: it starts {start!r}")
            ndim = start[3]
            header = file.read(4 * ndim)
            if len(header) < 4 * ndim:
                raise ConfigError(f"{path} ends within its header")
            shape = struct.unpack(f">{ndim}I", header)
            size = math.prod(shape)
            promise = f"its header says {' x '.join(map(str, shape[:8]))} = {size}"
            if not 1 <= ndim <= _MOST_DIMENSIONS or size > _MOST_BYTES:
                raise ConfigError(
                    f"{path} has {ndim} dimensions, and {promise} bytes; expected 1 to "
                    f"{_MOST_DIMENSIONS} dimensions and {_MOST_BYTES:,} bytes at most"
                )
            content = _read(file, size + _A_FEW_MORE)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if len(content) != size:
        more = " or more" if len(content) == size + _A_FEW_MORE else ""
        raise ConfigError(f"{path} holds {len(content)} elements{more} where {promise}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read(file: BinaryIO | gzip.GzipFile, size: int) -> bytes:
    """At most ``size`` bytes, in memory of what is there rather than of what is asked for."""
    parts: list[bytes] = []
    while size and (part := file.read(min(size, 2**20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _fashion_mnist_folder(root: Path | None) -> Path:
    given = root or os.environ.get(FASHION_MNIST_VARIABLE)
    folder = Path(given) if given else _FASHION_MNIST_HOME
    for name in _FASHION_MNIST_FILES:
        if not any((folder / f"{name}{suffix}").is_file() for suffix in ("", ".gz")):
            raise ConfigError(
                f"no Fashion-MNIST in {folder}: {name}.gz is missing. On Debian and Ubuntu: "
                "`sudo apt install dataset-fashion-mnist`; elsewhere put the four IDX files in a "
                f"folder and name it with --data-dir or the variable {FASHION_MNIST_VARIABLE}"
            )
    return folder


def fashion_mnist(root: Path | None = None) -> Splits:
    """Fashion-MNIST from its IDX files: 55,000 / 5,000 of the training file, 10,000 for the test.

    Args:
        root: folder of the four files; by default the variable ``STTP_FASHION_MNIST``, then
            where Debian's package puts them.

    Shape:
        inputs: (n, 1, 28, 28), scaled to about zero mean and unit variance.

    Raises:
        ConfigError: the files are not there, or are no IDX files.
    """
    return _fashion_mnist(_fashion_mnist_folder(root))


@functools.cache
def _fashion_mnist(folder: Path) -> Splits:
    def load(name: str) -> np.ndarray:
        path = folder / name
        return read_idx(path if path.is_file() else path.with_name(f"{name}.gz"))

    train_x, train_y, test_x, test_y = (load(name) for name in _FASHION_MNIST_FILES)

    def examples(x: np.ndarray, y: np.ndarray) -> Examples:
        if x.shape[1:] != (28, 28) or y.shape != x.shape[:1] or not len(x):
            raise ConfigError(
                f"{folder}: images of shape {x.shape} with labels of shape {y.shape}; expected "
                "(n, 28, 28) and (n,), n at least 1"
            )
        if y.max() > 9:
            raise ConfigError(f"{folder}: a label is {y.max()}; expected 0 to 9")
        # Mean and standard deviation of the pixels of the training images.
        scaled = (torch.from_numpy(x.copy()).float() / 255 - 0.2860) / 0.3530
        return Examples(scaled[:, None], torch.from_numpy(y.astype(np.int64)))

    whole = examples(train_x, train_y)
    # 5,000 of the 60,000; a twelfth of a smaller set.
    try:
        train, val = stratified(train_y, (len(whole) // 12,), 2021)
    except ValueError as error:
        raise ConfigError(
            f"{folder}: {len(whole)} training images do not split in equal shares of classes "
            f"({error})"
        ) from error
    return Splits(
        whole[torch.from_numpy(train)], whole[torch.from_numpy(val)], examples(test_x, test_y)
    )


# The prime factors of 64 and 60, as a layer of that size has them by default: the truth must lie in
# the set that is searched.
COMPLETION_MODES = ((2, 2, 2, 2, 2, 2), (2, 2, 3, 5))
COMPLETION_RANK = 4


def _random_side(modes: tuple[int, ...], rank: int, generator: torch.Generator) -> Tensor:
    """A frame that is a product of random frames, outermost mode first.

    Shape:
        out: (prod(modes), rank).
    """
    frame = torch.ones(1, 1, dtype=torch.float64)
    for k, mode in enumerate(modes):
        left = frame.shape[1]
        right = min(rank, left * mode) if k + 1 < len(modes) else rank
        sample = torch.randn(left * mode, right, dtype=torch.float64, generator=generator)
        core, upper = torch.linalg.qr(sample)
        core = core * upper.diagonal().sign()
        frame = (frame @ core.reshape(left, mode * right)).reshape(-1, right)
    return frame


def completion_truth() -> Tensor:
    """The matrix that the task ``completion`` hides: ``U diag(s) V^T`` of TT rank 4.

    Modes (2, 2, 2, 2, 2, 2 | 2, 2, 3, 5), random frames, singular values that fall from 4 to 0.4 in
    equal ratios: about the norm of the weight that torch draws for a layer of this size.

    Shape:
        out: (64, 60), float64.
    """
    generator = torch.Generator().manual_seed(derived_seed("completion", "truth"))
    out_modes, in_modes = COMPLETION_MODES
    u = _random_side(out_modes, COMPLETION_RANK, generator)
    # The right side is a mirror: its outermost mode is its last, which varies fastest.
    v = _random_side(in_modes[::-1], COMPLETION_RANK, generator)
    v = v.reshape(*in_modes[::-1], -1).movedim(-1, 0).permute(0, *range(len(in_modes), 0, -1))
    s = 4 * torch.logspace(0, -1, COMPLETION_RANK, dtype=torch.float64)
    return (u * s) @ v.reshape(COMPLETION_RANK, -1)


@functools.cache
def completion(root: Path | None = None) -> Splits:
    """Entries of :func:`completion_truth`: 960 of 3,840 seen, 240 for validation, 2,640 hidden.

    A matrix of TT rank 4 with these modes has 148 degrees of freedom, one of rank 4 has 480.

    Shape:
        inputs: (n, 2) rows and columns.
        targets: (n,) entries.
    """
    matrix = completion_truth()
    generator = torch.Generator().manual_seed(derived_seed("completion", "entries"))
    order = torch.randperm(matrix.numel(), generator=generator)
    places = torch.stack((order // matrix.shape[1], order % matrix.shape[1]), dim=1)
    whole = Examples(places, matrix.flatten()[order])
    train, val, test = (
        Examples(*parts)
        for parts in zip(
            whole.inputs.split((960, 240, 2640)), whole.targets.split((960, 240, 2640)), strict=True
        )
    )
    return Splits(train, val, test)
