"""check_optimizer: wrappers, schedulers, and optimizers that are older than their model."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed

import sttp_manifold as sm
from sttp_manifold._geoopt import geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, check_optimizer


def network(method=None):
    model = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.ReLU(), torch.nn.Linear(20, 24))
    if method is None:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sm.nn.compress(model, rank=3, method=method)


# --- An optimizer of before. ---


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD, RiemannianMuon, torch.optim.Adam])
@pytest.mark.parametrize("change", ["compress", "decompress", "switch", "there and back"])
def test_parameters_of_before_are_noticed(cls, change):
    method = "householder" if cls is torch.optim.Adam else "riemannian"
    other = "riemannian" if method == "householder" else "householder"
    model = network(None if change == "compress" else method)
    optimizer = cls(model.parameters(), lr=0.1)
    check_optimizer(optimizer, model)
    if change == "compress":
        model = sm.nn.compress(model, rank=3, method="householder")
    elif change == "decompress":
        model = sm.nn.decompress(model)
    else:
        sm.nn.switch(model, method=other)
        if change == "there and back":
            sm.nn.switch(model, method=method)
    match = rf"{cls.__name__} holds parameter \d of group 0.*no module of this Sequential.*anew"
    with pytest.raises(OptimizerError, match=match):
        check_optimizer(optimizer, model)
    make = torch.optim.Adam if cls is torch.optim.Adam and change != "switch" else RiemannianAdam
    check_optimizer(make(model.parameters(), lr=0.1), model)


def test_parameters_of_a_loss_and_frozen_ones_are_nobodys_business():
    model = network("riemannian")
    loss = torch.nn.Parameter(torch.ones(()))
    check_optimizer(RiemannianAdam([*model.parameters(), loss]), model)
    model[0].requires_grad_(False)
    check_optimizer(RiemannianAdam([*model[2].parameters(), loss]), model)
    check_optimizer(RiemannianAdam(network("riemannian")[2].parameters()))
    # A part of the model alone.
    model[0].requires_grad_(True)
    check_optimizer(RiemannianAdam(model[2].parameters()), model)


# --- Wrappers. ---


class Lookahead:
    """Delegates, and is no torch optimizer."""

    def __init__(self, inner, name="optimizer"):
        setattr(self, name, inner)
        self.param_groups = inner.param_groups

    def step(self):
        raise NotImplementedError


class Bare:
    """Does not even show the groups."""

    def __init__(self, inner):
        self.base_optimizer = inner

    def step(self):
        raise NotImplementedError


class Accelerated(torch.optim.Optimizer):
    """As accelerate's: an optimizer by type, which shows what it holds by properties."""

    def __init__(self, inner):
        self.optimizer = inner

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state


WRAPPERS = [
    Lookahead,
    lambda o: Lookahead(o, "optim"),
    lambda o: Lookahead(o, "_optimizer"),
    Bare,
    Accelerated,
    lambda o: Lookahead(Accelerated(o)),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrappers_are_what_they_delegate_to(wrap):
    model = network("riemannian")
    for cls in (RiemannianAdam, RiemannianSGD, geoopt.optim.RiemannianAdam):
        check_optimizer(wrap(cls(model.parameters(), lr=0.1)), model)
    with pytest.raises(OptimizerError, match=r"Adam holds '0\."):
        check_optimizer(wrap(torch.optim.Adam(model.parameters())), model)
    with pytest.raises(OptimizerError, match="RiemannianSGD"):
        check_optimizer(wrap(torch.optim.SGD(model.parameters(), lr=0.1)))
    old = wrap(RiemannianAdam(model.parameters()))
    sm.nn.switch(model, method="householder")
    with pytest.raises(OptimizerError, match="made before"):
        check_optimizer(old, model)


def test_one_that_holds_itself_comes_to_an_end():
    model = network("riemannian")
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.optimizer = optimizer
    with pytest.raises(OptimizerError, match="Euclidean"):
        check_optimizer(optimizer)


@pytest.fixture
def one_process():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("no gloo")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_zero_redundancy(one_process):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = network("riemannian")
    optimizer = ZeroRedundancyOptimizer(model.parameters(), RiemannianAdam, lr=0.1)
    check_optimizer(optimizer, model)
    model(torch.randn(3, 24)).square().sum().backward()
    optimizer.step()
    sm.optim.check_points(model)
    with pytest.raises(OptimizerError, match="Euclidean"):
        check_optimizer(
            ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1), model
        )


# --- What is no optimizer. ---


def test_schedulers_are_refused_with_the_call_that_works():
    model = network("riemannian")
    optimizer = RiemannianAdam(model.parameters())
    for scheduler in (
        torch.optim.lr_scheduler.StepLR(optimizer, 3),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.1),
    ):
        with pytest.raises(OptimizerError, match=r"check_optimizer\(scheduler\.optimizer, model\)"):
            check_optimizer(scheduler, model)


@pytest.mark.parametrize("thing", [None, 3, "adam", network(), object()])
def test_other_things_are_refused(thing):
    with pytest.raises(OptimizerError, match="no parameter groups"):
        check_optimizer(thing)
