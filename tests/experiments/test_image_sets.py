"""Image sets by name, from tiny sets of the hub's schema on disk: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments import image_sets
from sttp_manifold.experiments.compare import Settings, plan, run_plan
from sttp_manifold.experiments.image_models import ImageModel, with_model
from sttp_manifold.experiments.image_sets import image_splits, read_image_set, scaled_splits
from sttp_manifold.experiments.tasks import TASKS

datasets = pytest.importorskip("datasets")
from PIL import Image  # noqa: E402


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield
    image_splits.cache_clear()
    scaled_splits.cache_clear()


def arrays(count: int, size: int = 8, channels: int = 3, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (size, size, channels) if channels > 1 else (size, size)
    return [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]


def table(pictures: list[np.ndarray], image: str = "img", label: str = "label", classes: int = 3):
    names = [f"class {k}" for k in range(classes)]
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    rows = {
        image: [Image.fromarray(a) for a in pictures],
        label: [k % classes for k in range(len(pictures))],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def save(folder: Path, how: str, train, test=None) -> Path:
    splits = {"train": train} if test is None else {"train": train, "test": test}
    if how == "disk":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        for name, split in splits.items():
            split.to_parquet(str(folder / "data" / f"{name}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("how", ["disk", "parquet"])
@pytest.mark.parametrize("image", ["img", "image"])
def test_a_set_of_the_hubs_schema_is_read_as_it_is(tmp_path, how, image):
    pictures, tests = arrays(60), arrays(12, seed=1)
    folder = save(tmp_path / "set", how, table(pictures, image), table(tests, image))
    found = read_image_set("some/name", folder)
    assert set(found) == {"train", "test"}
    assert found["train"].classes == ("class 0", "class 1", "class 2")
    expected = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    assert torch.equal(found["train"].images, expected)
    assert found["test"].labels.tolist() == [0, 1, 2] * 4
    # The name may be the folder itself.
    assert torch.equal(read_image_set(str(folder))["train"].images, expected)


def test_splits_are_disjoint_stratified_and_the_same_again(tmp_path):
    folder = save(tmp_path / "set", "disk", table(arrays(60)), table(arrays(12, seed=1)))
    splits = image_splits("some/name", folder)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [54, 6, 12]
    assert torch.bincount(splits["val"].labels).tolist() == [2, 2, 2]
    rows = [{row.numpy().tobytes() for row in part.images} for part in splits.values()]
    assert len(rows[0] | rows[1] | rows[2]) == 72
    image_splits.cache_clear()
    again = image_splits("some/name", folder)
    assert all(torch.equal(again[name].images, splits[name].images) for name in splits)


def test_a_set_without_a_test_split_gives_some_of_its_own(tmp_path):
    folder = save(tmp_path / "set", "disk", table(arrays(60)))
    splits = image_splits("some/name", folder)
    assert [len(part) for part in splits.values()] == [44, 6, 10]


def test_floats_are_standardized_by_the_training_images(tmp_path):
    folder = save(tmp_path / "set", "disk", table(arrays(60)), table(arrays(12, seed=1)))
    splits = scaled_splits("some/name", None, folder)
    x = splits.train.inputs.double()
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), unbiased=False), torch.ones(3).double())
    raw = image_splits("some/name", folder)["test"].images.double()
    train = image_splits("some/name", folder)["train"].images.double()
    mean = train.mean((0, 2, 3), keepdim=True)
    spread = train.std((0, 2, 3), keepdim=True, unbiased=False)
    torch.testing.assert_close(
        splits.test.inputs.double(), (raw - mean) / spread, atol=1e-5, rtol=0
    )


def test_sizes_grey_images_and_unlabelled_ones(tmp_path):
    mixed = [*arrays(30, size=8), *arrays(30, size=12, channels=1)]
    folder = save(tmp_path / "mixed", "disk", table(mixed))
    with pytest.raises(ConfigError, match=r"60 images of 2 sizes, 8 x 8 and 12 x 12.*@64"):
        read_image_set("some/name", folder)
    found = read_image_set("some/name", folder, size=6)["train"]
    assert found.images.shape == (60, 3, 6, 6)
    # A grey picture among colours has three equal channels.
    assert torch.equal(found.images[-1, 0], found.images[-1, 2])
    # By Pillow, of the middle square.
    wide = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    middle = Image.fromarray(wide).crop((2, 0, 10, 8)).resize((4, 4), Image.Resampling.BILINEAR)
    assert np.array_equal(image_sets._pixels(Image.fromarray(wide), 4), np.asarray(middle))
    grey = save(tmp_path / "grey", "disk", table(arrays(30, channels=1)))
    assert read_image_set("some/name", grey)["train"].images.shape == (30, 1, 8, 8)
    rows = table(arrays(12)).map(
        lambda row, k: {"label": -1 if k < 3 else k % 3}, with_indices=True
    )
    assert len(read_image_set("some/name", save(tmp_path / "holes", "disk", rows))["train"]) == 9


def test_what_is_wrong_with_a_set_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the image set 'some/absent'.*--data-dir"):
        read_image_set("some/absent")
    folder = save(tmp_path / "set", "disk", table(arrays(6)).remove_columns("label"))
    with pytest.raises(ConfigError, match="columns img; expected one of images"):
        read_image_set("some/name", folder)
    few = save(tmp_path / "few", "disk", table(arrays(12)))
    with pytest.raises(ConfigError, match="12 training images do not split"):
        image_splits("some/name", few)
    only = tmp_path / "only"
    datasets.DatasetDict({"test": table(arrays(6))}).save_to_disk(str(only))
    with pytest.raises(ConfigError, match="labelled splits test; expected one named train"):
        image_splits("some/name", only)


@pytest.mark.parametrize("text", ["", "a@", "a@0", "a@12345", "a@b@3"])
def test_a_source_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match=r"as in hf:tanganke/stl10@48"):
        image_sets.parse_source(text)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'sttp-manifold\[data\]'"):
        read_image_set("some/name")


def test_networks_are_fitted_to_the_images(tmp_path):
    folder = save(tmp_path / "set", "disk", table(arrays(60)), table(arrays(12, seed=1)))
    task = with_model(TASKS["cifar10"], "wrn-10-1", folder)
    model = task.model()
    assert (model.channels, model.linear.out_features) == (3, 3)
    assert type(with_model(TASKS["cifar10"], None, folder).model()).__name__ == "ResNet"
    assert with_model(TASKS["digits"], None, None) is TASKS["digits"]
    with pytest.raises(ConfigError, match="expected a task of images"):
        with_model(TASKS["digits"], "wrn-10-1", None).model()
    with pytest.raises(ConfigError, match="trains no network"):
        with_model(TASKS["completion-tensor"], "wrn-10-1", None)
    assert isinstance(TASKS["stl10"].model, ImageModel)


def test_a_set_by_name_is_a_task(tmp_path):
    folder = save(tmp_path / "set", "disk", table(arrays(120)), table(arrays(12, seed=1)))
    settings = Settings(
        tmp_path / "out",
        f"hf:{folder}@4",
        ["dense-adam", "sttp-chart-adam"],
        ranks=[2],
        seeds=[0],
        epochs=1,
        device="cpu",
        jobs=1,
    )
    records = run_plan(plan(settings), settings)
    assert [record["status"] for record in records] == ["ok", "ok"]
    assert records[0]["examples"] == {"train": 108, "val": 12, "test": 12}
    assert "hf:" not in TASKS.names()
    with pytest.raises(ConfigError, match="unknown task"):
        TASKS["hg:some"]
