"""What cannot be honoured is refused, before anything has moved, with the call that works."""

from __future__ import annotations

import pytest
import torch

from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ManifoldParameter, geoopt
from sttp_manifold.errors import OptimizerError
from sttp_manifold.manifolds.spectral_tt import SpectralTTManifold
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, check_optimizer
from sttp_manifold.tt.shape import TTShape


def parameter(kind):
    if kind == "ours":
        return SpectralTTManifold(TTShape((4, 3), (5, 2), rank=3)).random_parameter()
    if kind == "stiefel":
        return ManifoldParameter(EuclideanStiefel().random(6, 2))
    manifold = geoopt.Sphere()
    return ManifoldParameter(manifold.projx(torch.randn(4)), manifold=manifold)


def plain(*shape):
    return torch.nn.Parameter(torch.ones(shape or (3,)))


REFUSED = [
    (RiemannianAdam, "differentiable"),
    (RiemannianAdam, "fused"),
    (RiemannianSGD, "differentiable"),
    (RiemannianSGD, "fused"),
    (RiemannianMuon, "fused"),
]


@pytest.mark.parametrize("kind", ["ours", "stiefel", "sphere"])
@pytest.mark.parametrize(("cls", "flag"), REFUSED)
def test_flags_that_manifold_parameters_cannot_honour(cls, flag, kind):
    match = rf"{cls.__name__} cannot honour {flag}=True.*call {cls.__name__}\(params, lr=...\)"
    with pytest.raises(OptimizerError, match=match):
        cls([plain(), parameter(kind)], lr=0.1, **{flag: True})


@pytest.mark.parametrize(("cls", "flag"), REFUSED)
def test_the_call_that_the_message_names_works(cls, flag):
    """The flag for plain parameters, in a group of their own."""
    x = parameter("ours")
    optimizer = cls([dict(params=[plain()], **{flag: True}), dict(params=[x])], lr=0.1)
    x.grad = torch.ones_like(x)
    optimizer.step()


@pytest.mark.parametrize(("cls", "flag"), REFUSED)
def test_flags_stay_for_plain_parameters(cls, flag):
    cls([plain(), ManifoldParameter(torch.ones(3), manifold=Euclidean())], lr=0.1, **{flag: True})


@pytest.mark.parametrize(("cls", "flag"), REFUSED)
def test_a_group_added_later_is_refused_and_left_out(cls, flag):
    optimizer = cls([plain()], lr=0.1, **{flag: True})
    with pytest.raises(OptimizerError, match=flag):
        optimizer.add_param_group({"params": [parameter("ours")]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(("cls", "flag"), REFUSED)
def test_a_flag_set_later_is_refused_at_the_step(cls, flag):
    x, p = parameter("ours"), plain()
    optimizer = cls([p, x], lr=0.1)
    for q in (p, x):
        q.grad = torch.ones_like(q)
    optimizer.param_groups[0][flag] = True
    start = p.detach().clone(), x.detach().clone()
    with pytest.raises(OptimizerError, match=flag):
        optimizer.step()
    assert torch.equal(p.detach(), start[0])
    assert torch.equal(x.detach(), start[1])


# --- check_optimizer. ---


class Net(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.inner = torch.nn.Module()
        self.inner.point = parameter(kind)


@pytest.mark.parametrize("kind", ["ours", "stiefel", "sphere"])
@pytest.mark.parametrize(
    ("euclidean", "call"),
    [
        (torch.optim.Adam, "RiemannianAdam"),
        (torch.optim.AdamW, "RiemannianAdam"),
        (torch.optim.RMSprop, "RiemannianAdam"),
        (torch.optim.SGD, "RiemannianSGD"),
    ],
)
def test_a_euclidean_optimizer_over_manifold_parameters_is_caught(kind, euclidean, call):
    model = Net(kind)
    optimizer = euclidean(model.parameters(), lr=0.1)
    works = rf"sm\.optim\.{call}\(model\.parameters\(\), lr=\.\.\.\)"
    with pytest.raises(
        OptimizerError, match=rf"{euclidean.__name__} holds 'inner\.point'.*{works}"
    ):
        check_optimizer(optimizer, model)
    with pytest.raises(OptimizerError, match=rf"holds parameter 2 of group 0.*{works}"):
        check_optimizer(optimizer)
    check_optimizer(getattr(geoopt.optim, call)(model.parameters(), lr=0.1), model)
    check_optimizer(
        {"RiemannianAdam": RiemannianAdam, "RiemannianSGD": RiemannianSGD}[call](
            model.parameters(), lr=0.1
        )
    )


def test_a_later_group_is_looked_at_too():
    model = Net("ours")
    optimizer = torch.optim.SGD([dict(params=list(model.linear.parameters()))], lr=0.1)
    check_optimizer(optimizer, model)
    optimizer.add_param_group({"params": [model.inner.point]})
    with pytest.raises(OptimizerError, match="group 1"):
        check_optimizer(optimizer)


def test_plain_and_euclidean_parameters_are_nobodys_business():
    euclidean = ManifoldParameter(torch.ones(3), manifold=Euclidean())
    check_optimizer(torch.optim.Adam([plain(), euclidean]))
