from __future__ import annotations

from dataclasses import dataclass

import pytest

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.methods import METHODS
from sttp_manifold.experiments.registry import Registry
from sttp_manifold.experiments.tasks import TASKS

from .conftest import TRAINING


@dataclass(frozen=True)
class Thing:
    name: str


def test_names_keep_their_order_and_are_found():
    registry = Registry[Thing]("thing")
    b, a = registry.add(Thing("b")), registry.add(Thing("a"))
    assert registry.names() == ["b", "a"]
    assert registry["a"] is a
    assert list(registry) == [b, a]
    assert "a" in registry
    assert "c" not in registry
    assert len(registry) == 2


def test_a_name_can_be_taken_once():
    registry = Registry[Thing]("thing")
    registry.add(Thing("a"))
    with pytest.raises(ConfigError, match="'a' is registered already"):
        registry.add(Thing("a"))


def test_an_unknown_name_is_answered_with_the_names_there_are():
    with pytest.raises(ConfigError, match=r"unknown task 'digts'.*mean 'digits'.*digits, fashion"):
        TASKS["digts"]
    with pytest.raises(ConfigError, match=r"unknown method 'nothing-\*'.*The methods are: dense"):
        METHODS.select(["dense-adam", "nothing-*"])


def test_select_takes_names_wildcards_and_all_and_repeats_nothing():
    assert METHODS.select(["sttp-*-sgd", "dense-adam", "sttp-chart-sgd"]) == [
        "sttp-chart-sgd",
        "sttp-riemannian-sgd",
        "dense-adam",
    ]
    assert METHODS.select(["all"]) == METHODS.names()


def test_the_methods_that_train_and_the_tasks():
    kinds = {(m.kind, m.parameterization, m.optimizer) for m in TRAINING}
    held = {"dense": ["dense"], "svdp": ["householder", "riemannian"]}
    held["sttp"] = held["svdp"]
    optimizers = {"dense": ["adam", "sgd"], "householder": ["adam", "sgd"]}
    optimizers["riemannian"] = ["adam", "adam-elementwise", "sgd", "muon"]
    usual = {(k, p, o) for k, ps in held.items() for p in ps for o in optimizers[p]}
    extra = {(k, "fixed-rank", o) for k in ("svdp", "sttp") for o in ("adam", "muon")}
    extra |= {(k, "riemannian", "muon-adaptive") for k in ("svdp", "sttp")}
    assert kinds == usual | extra
    assert {
        (m.kind, m.parameterization, m.optimizer) for m in TRAINING if getattr(m, "extra", False)
    } == extra
    assert TASKS.names() == [
        "digits",
        "fashion-mnist",
        "cifar10",
        "stl10",
        "completion",
        "completion-tensor",
        "completion-matrix",
        "gan-fashion-mnist-16",
        "gan-fashion-mnist-28",
        "gan-fashion-mnist-32",
        "gan-cifar10",
        "gan-stl10",
    ]
