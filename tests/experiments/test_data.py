from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import data
from sttp_manifold.tt import TTShape

HOME = data._FASHION_MNIST_HOME
HERE = all((HOME / f"{name}.gz").is_file() for name in data._FASHION_MNIST_FILES)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion(folder: Path, n_train: int = 240, n_test: int = 30, suffix: str = ".gz") -> None:
    rng = np.random.default_rng(0)
    for name, n in (("train", n_train), ("t10k", n_test)):
        images = rng.integers(0, 256, (n, 28, 28))
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(n) % 10)


def rows_of(examples: data.Examples) -> set[bytes]:
    return {row.numpy().tobytes() for row in examples.inputs}


def test_digits_have_fixed_disjoint_splits():
    splits = data.digits()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (1197, 300, 300)
    parts = [rows_of(part) for part in (splits.train, splits.val, splits.test)]
    assert len(parts[0] | parts[1] | parts[2]) == sum(map(len, parts)) == 1797
    # The split is part of the task: these sums change when anyone's split does.
    sums = [int((part.inputs + 0.5).mul(16).sum()) for part in (splits.train, splits.val)]
    assert sums == [374609, 92932]
    counts = torch.bincount(splits.test.targets)
    assert counts.min() >= 29


def test_completion_is_a_matrix_of_tt_rank_four():
    matrix = data.completion_truth()
    assert matrix.shape == (64, 60)
    s = torch.linalg.svdvals(matrix)
    expected = torch.cat((4 * torch.logspace(0, -1, 4, dtype=torch.float64), torch.zeros(56)))
    torch.testing.assert_close(s, expected)
    tensor = matrix.reshape(*data.COMPLETION_MODES[0], *data.COMPLETION_MODES[1])
    ranks = [
        int(torch.linalg.matrix_rank(tensor.reshape(math.prod(tensor.shape[:k]), -1)))
        for k in range(1, tensor.ndim)
    ]
    assert ranks == list(TTShape.for_matrix(64, 60, rank=4).ranks[1:-1])


def test_completion_has_fixed_disjoint_splits():
    splits = data.completion()
    # The first hidden places, by which anyone can tell that the split is this one.
    assert splits.test.inputs[:3].tolist() == [[22, 31], [19, 47], [11, 39]]
    places = [part.inputs for part in (splits.train, splits.val, splits.test)]
    assert [len(part) for part in places] == [960, 240, 2640]
    assert len(torch.cat(places).unique(dim=0)) == 3840
    matrix = data.completion_truth()
    for part in (splits.train, splits.val, splits.test):
        assert torch.equal(matrix[part.inputs[:, 0], part.inputs[:, 1]], part.targets)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_are_read_as_they_were_written(tmp_path, suffix):
    array = np.random.default_rng(0).integers(0, 256, (3, 4, 5))
    path = tmp_path / f"images{suffix}"
    write_idx(path, array)
    assert np.array_equal(data.read_idx(path), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "no IDX file of unsigned bytes"),
        (b"\x00\x00\x08\x03\x00\x00", "ends within its header"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x03ab", "holds 2 elements where its header says 3"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x01ab", "holds 2 elements where its header says 1"),
        (b"\x00\x00\x08\x00", "has 0 dimensions"),
        (b"\x00\x00\x08\x41" + b"\x00\x00\x00\x01" * 65 + b"a", "has 65 dimensions"),
        (b"\x00\x00\x08\xff" + b"\xff" * 1020, "has 255 dimensions"),
        (b"\x00\x00\x08\x04" + b"\xff" * 16, "expected 1 to 8 dimensions and 2,147,483,648 bytes"),
        (b"\x00\x00\x08\x02" + b"\x80\x00\x00\x00" * 2, "4611686018427387904 bytes"),
    ],
)
def test_files_that_are_no_idx_files_are_refused(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        data.read_idx(path)


def test_no_more_is_unfolded_than_the_header_promises(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    header = b"\x00\x00\x08\x01\x00\x00\x00\x05"
    path.write_bytes(gzip.compress(header + bytes(2**26)))
    read = []
    size = gzip.GzipFile.read

    def counted(file, count=-1):
        part = size(file, count)
        read.append(len(part))
        return part

    monkeypatch.setattr(gzip.GzipFile, "read", counted)
    with pytest.raises(ConfigError, match="65541 elements or more where its header says 5"):
        data.read_idx(path)
    assert sum(read) < 10**6


@pytest.mark.parametrize("spoil", ["deflate", "length", "checksum", "rubbish after"])
def test_gzip_files_that_do_not_unfold_are_refused(tmp_path, spoil):
    path = tmp_path / "file.gz"
    write_idx(path, np.random.default_rng(0).integers(0, 256, 5000))
    content = bytearray(path.read_bytes())
    if spoil == "deflate":
        content[30:60] = bytes(range(225, 255))
    elif spoil == "rubbish after":
        content += b"rubbish"
    else:
        content[-2 if spoil == "length" else -6] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot read"):
        data.read_idx(path)


def test_a_torn_gzip_file_is_refused(tmp_path):
    path = tmp_path / "file.gz"
    write_idx(path, np.arange(1000) % 256)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="cannot read"):
        data.read_idx(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_from_a_folder(tmp_path, monkeypatch, suffix):
    write_fashion(tmp_path, suffix=suffix)
    splits = data.fashion_mnist(tmp_path)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (220, 20, 30)
    assert splits.train.inputs.shape == (220, 1, 28, 28)
    assert splits.train.inputs.dtype == torch.float32
    assert len(rows_of(splits.train) | rows_of(splits.val)) == 240
    assert torch.bincount(splits.val.targets).tolist() == [2] * 10
    monkeypatch.setenv(data.FASHION_MNIST_VARIABLE, str(tmp_path))
    assert data.fashion_mnist() is splits


def test_fashion_mnist_with_images_and_labels_that_do_not_fit(tmp_path):
    write_fashion(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.zeros(7))
    with pytest.raises(ConfigError, match=r"\(30, 28, 28\) with labels of shape \(7,\)"):
        data.fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t10k-images-idx3-ubyte", np.zeros((30, 27, 28)), r"\(30, 27, 28\) with labels"),
        ("t10k-images-idx3-ubyte", np.zeros((30, 784)), r"\(30, 784\) with labels"),
        ("t10k-labels-idx1-ubyte", np.full(30, 10), "a label is 10; expected 0 to 9"),
        ("train-labels-idx1-ubyte", np.arange(240) // 200 * 9, "equal shares of classes"),
    ],
)
def test_fashion_mnist_that_is_another_set(tmp_path, name, array, message):
    write_fashion(tmp_path)
    write_idx(tmp_path / f"{name}.gz", array)
    if "shares" in message:
        # One example of a class has no share.
        write_idx(tmp_path / f"{name}.gz", np.arange(240) // 239)
    with pytest.raises(ConfigError, match=message):
        data.fashion_mnist(tmp_path)


def test_an_empty_test_split_is_said(tmp_path):
    write_fashion(tmp_path, n_test=0)
    with pytest.raises(ConfigError, match="n at least 1"):
        data.fashion_mnist(tmp_path)


def test_without_fashion_mnist_the_error_says_how_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match=r"apt install dataset-fashion-mnist.*--data-dir"):
        data.fashion_mnist(tmp_path)


@pytest.mark.skipif(not HERE, reason=f"Fashion-MNIST is not installed in {HOME}")
def test_the_real_fashion_mnist(monkeypatch):
    monkeypatch.delenv(data.FASHION_MNIST_VARIABLE, raising=False)
    splits = data.fashion_mnist()
    assert (len(splits.train), len(splits.val), len(splits.test)) == (55_000, 5_000, 10_000)
    assert torch.bincount(splits.val.targets).tolist() == [500] * 10
    assert splits.train.inputs.mean().abs().item() < 1e-2
    assert splits.train.inputs.std().item() == pytest.approx(1, abs=1e-2)


def test_examples_move_floats_to_a_dtype_and_leave_integers():
    examples = data.Examples(torch.zeros(2, 3), torch.tensor([0, 1]))
    moved = examples.to(torch.device("cpu"), torch.float64)
    assert moved.inputs.dtype == torch.float64
    assert moved.targets.dtype == torch.int64
