"""Images, classifier, distances, constraints, and what is published: each against another hand."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.data import Examples, Splits
from sttp_manifold.experiments.gan import published
from sttp_manifold.experiments.gan.classifier import classifier_of
from sttp_manifold.experiments.gan.constraints import (
    SpectralRegularization,
    orthogonal_start,
    orthogonality_penalty,
)
from sttp_manifold.experiments.gan.distances import coverage, frechet_distance, kernel_distance
from sttp_manifold.experiments.gan.entrants import narrow_width, wide_discriminator
from sttp_manifold.experiments.gan.images import named_images, resized
from sttp_manifold.experiments.gan.samples import grid_of, strips_of, tiled
from sttp_manifold.experiments.gan.setting import GanSetting
from sttp_manifold.experiments.gan.tasks import gan_task_of
from sttp_manifold.experiments.models import SNGANGenerator
from sttp_manifold.experiments.tasks import TASKS

from .conftest import tiny_images

SEEDS = st.integers(0, 2**31)


def sets(seed: int, d: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=g, dtype=torch.float64)
    a = torch.randn(n, d, generator=g, dtype=torch.float64)
    return a, torch.randn(m, d, generator=g, dtype=torch.float64) @ mix + 0.3


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 6), st.integers(10, 40), st.integers(10, 40))
def test_the_frechet_distance_is_that_of_scipy(seed, d, n, m):
    from scipy.linalg import sqrtm

    a, b = sets(seed, d, n, m)
    ca, cb = (np.atleast_2d(np.cov(x.numpy().T)) for x in (a, b))
    root = np.real(sqrtm(ca @ cb))
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(ca + cb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6, abs=1e-8)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(a, a) < 1e-9


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(1, 6), st.integers(4, 20), st.integers(4, 20))
def test_the_kernel_distance_is_that_of_scikit_learn(seed, d, n, m):
    from sklearn.metrics.pairwise import polynomial_kernel

    a, b = sets(seed, d, n, m)
    kaa, kbb, kab = (
        polynomial_kernel(x.numpy(), y.numpy(), degree=3) for x, y in ((a, a), (b, b), (a, b))
    )
    expected = (
        (kaa.sum() - np.trace(kaa)) / (n * (n - 1))
        + (kbb.sum() - np.trace(kbb)) / (m * (m - 1))
        - 2 * kab.mean()
    )
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(2, 5), st.integers(6, 30), st.integers(6, 30))
def test_precision_and_recall_are_those_of_nearest_neighbours(seed, d, n, m):
    from sklearn.neighbors import NearestNeighbors

    a, b = sets(seed, d, n, m)

    def inside(x, among):
        radii = NearestNeighbors(n_neighbors=4).fit(among).kneighbors(among)[0][:, -1]
        distances = np.linalg.norm(x.numpy()[:, None] - among.numpy()[None], axis=2)
        return (distances <= radii).any(1).mean()

    precision, recall = coverage(a, b)
    assert precision == pytest.approx(inside(b, a))
    assert recall == pytest.approx(inside(a, b))
    assert coverage(a, a) == (1.0, 1.0)
    assert coverage(a, a + 1e6) == (0.0, 0.0)


def test_features_of_other_shapes_are_refused():
    with pytest.raises(ConfigError, match=r"shapes \(1, 3\) and \(5, 3\): expected two sets"):
        frechet_distance(torch.zeros(1, 3), torch.zeros(5, 3))
    with pytest.raises(ConfigError, match="vectors of one length, 4 or more"):
        coverage(torch.zeros(9, 3), torch.zeros(9, 2))


def test_the_classifier_is_trained_once_and_kept(gan_task, monkeypatch, tmp_path):
    monkeypatch.setenv("STTP_CACHE", str(tmp_path / "cache"))
    splits = tiny_images()
    first = classifier_of("corners", splits, 8)
    assert first.accuracy > 90
    monkeypatch.setattr(torch.optim, "Adam", lambda *_: pytest.fail("trained again"))
    again = classifier_of("corners", splits, 8)
    assert again.digest == first.digest
    assert again.features(splits.test.inputs).shape == (72, 64)
    monkeypatch.undo()
    monkeypatch.setenv("STTP_CACHE", str(tmp_path / "cache"))
    (file,) = (tmp_path / "cache").glob("*.pt")
    file.write_bytes(file.read_bytes()[:100])  # a damaged file is written anew, the same
    assert classifier_of("corners", splits, 8).digest == first.digest
    # Other images of the same name have another classifier.
    other = Splits(Examples(-splits.train.inputs, splits.train.targets), splits.val, splits.test)
    assert classifier_of("corners", other, 8).digest != first.digest
    bare = Splits(Examples(splits.train.inputs, splits.train.targets - 5), splits.val, splits.test)
    with pytest.raises(ConfigError, match="images without classes"):
        classifier_of("corners", bare, 8)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("STTP_CACHE", str(blocked))
    with pytest.raises(ConfigError, match="the variable STTP_CACHE"):
        classifier_of("corners", splits, 8)


@pytest.mark.parametrize(
    ("size", "to"), [(28, 16), (28, 32), (28, 28), (96, 48), (32, 16), (40, 16)]
)
def test_images_change_their_size_and_keep_their_range(size, to):
    images = torch.rand(3, 2, size, size) * 2 - 1
    out = resized(images, to)
    assert out.shape == (3, 2, to, to)
    assert out.min() >= -1
    assert out.max() <= 1
    flat = resized(torch.full((1, 1, size, size), 0.25), to)
    assert flat[..., to // 2, to // 2].item() == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(ConfigError, match="28 x 14 pixels; expected square ones"):
        resized(torch.zeros(1, 1, 28, 14), 16)


def test_an_image_set_of_hugging_face_becomes_a_task(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    def table(n):
        g = np.random.default_rng(n)
        images = [Image.fromarray(g.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(n)]
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
        )
        rows = {"img": images, "label": [k % 2 for k in range(n)]}
        return datasets.Dataset.from_dict(rows, features=features)

    folder = tmp_path / "set"
    datasets.DatasetDict(train=table(60), test=table(20)).save_to_disk(folder)
    splits = TASKS["gan-cifar10"].load(folder)
    assert splits.train.inputs.shape[1:] == (3, 32, 32)
    assert -1 <= splits.train.inputs.min() < splits.train.inputs.max() <= 1
    task = TASKS[f"gan-hf:{folder}@16"]
    assert task.gan == {"size": 16}
    assert task.load(None).test.inputs.shape == (20, 3, 16, 16)
    assert named_images(str(folder), 16, None) is task.load(None)
    for name in ("gan-hf:some/set", "gan-hf:some/set@20"):
        with pytest.raises(ConfigError, match="one of 16, 28, 32, 48"):
            gan_task_of(name)


@settings(deadline=None, max_examples=15)
@given(SEEDS, st.integers(2, 7), st.integers(2, 7))
def test_spectral_regularization_makes_all_singular_values_one(seed, rows, columns):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns, 1, dtype=torch.float64, requires_grad=True)
    out = SpectralRegularization()(weight)
    torch.testing.assert_close(
        torch.linalg.svdvals(out.flatten(1)), torch.ones(min(rows, columns)).double()
    )
    out.sum().backward()
    assert bool(weight.grad.isfinite().all())


def test_an_orthogonal_start_has_no_penalty():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(8, 5), nn.Linear(3, 9)).double()
    assert orthogonality_penalty(model) > 1
    assert orthogonality_penalty(orthogonal_start(model)) < 1e-20


@pytest.mark.parametrize(("size", "ndf", "rank"), [(16, 16, 16), (32, 64, 16), (48, 64, 8)])
def test_equal_count_is_the_widest_that_is_no_larger(size, ndf, rank):
    setting = GanSetting(size=size, ndf=ndf)
    width = narrow_width(setting, 3, rank)
    step = 16 if size == 48 else 1
    assert 0 < width < ndf
    assert width % step == 0

    def count(model):
        return sum(p.numel() for p in model.parameters())

    from sttp_manifold.experiments.methods import METHODS

    most = count(METHODS["sttp-identity-chart"].make(setting, 3, rank))
    assert count(wide_discriminator(setting, 3, width + step)) > most
    assert width == step or count(wide_discriminator(setting, 3, width)) <= most


def test_pictures_are_tiles_in_order_and_the_same_each_time():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    tiles = tiled(images, 3)
    assert tiles.shape == (1, 4, 6)
    assert tiles[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    net = SNGANGenerator((4, 4), bottom=4, channels=3, latent=8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert torch.equal(grid_of(net), grid_of(net))
    assert strips_of(net).shape == (3, 48, 64)
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_published_metrics_want_their_package_and_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sttp-manifold\[fidelity\]'"):
        published.inception_weights()
    monkeypatch.setattr(published.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("STTP_INCEPTION", str(tmp_path / "absent.pth"))
    with pytest.raises(ConfigError, match=r"absent.pth is not there: download https://"):
        published.inception_weights()
    (tmp_path / "absent.pth").write_bytes(b"")
    seen = {}

    def calculate(**given):
        seen.update(given, first=given["input1"][0], count=len(given["input2"]))
        return {
            "frechet_inception_distance": 1.0,
            "kernel_inception_distance_mean": 2.0,
            "inception_score_mean": 3.0,
        }

    fake = types.SimpleNamespace(calculate_metrics=calculate)
    monkeypatch.setitem(sys.modules, "torch_fidelity", fake)
    found = published.published_metrics(torch.zeros(70, 1, 16, 16), torch.zeros(80, 1, 16, 16))
    assert found == {"fid": 1.0, "kid": 2.0, "inception_score": 3.0}
    assert seen["first"].shape == (3, 16, 16)
    assert seen["first"].dtype == torch.uint8
    assert (seen["count"], seen["kid_subset_size"]) == (80, 70)
