"""Plain parameters move exactly as torch moves them, whatever stands beside them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from sttp_manifold._geoopt import Euclidean, EuclideanStiefel, ManifoldParameter
from sttp_manifold.optim import RiemannianAdam, RiemannianSGD

ADAM = [
    dict(amsgrad=a, maximize=m, weight_decay=w, decoupled_weight_decay=d, foreach=f)
    for a, m, (w, d), f in itertools.product(
        (False, True),
        (False, True),
        ((0.0, False), (0.1, False), (0.1, True)),
        (None, True, False),
    )
] + [
    dict(capturable=False, fused=True),
    dict(betas=(0.5, 0.7), eps=1e-3),
    dict(betas=(torch.tensor(0.5), torch.tensor(0.7))),
    dict(lr=torch.tensor(0.02)),
]
SGD = [
    dict(momentum=mo, dampening=d, nesterov=n, maximize=m, weight_decay=w, foreach=f)
    for (mo, d, n), m, w, f in itertools.product(
        ((0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)),
        (False, True),
        (0.0, 0.1),
        (None, True, False),
    )
] + [dict(fused=True), dict(lr=torch.tensor(0.02))]


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))


def train(optimizer, model, steps=7):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 4, generator=generator)
        loss = (model(x) - x[:, :2].sin()).square().mean()
        loss.backward()
        if step == 3:
            next(iter(model.parameters())).grad = None  # its step count falls behind
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("beside_a_frame", [False, True])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [(RiemannianAdam, torch.optim.Adam, options) for options in ADAM]
    + [(RiemannianSGD, torch.optim.SGD, options) for options in SGD],
    ids=str,
)
def test_equal_to_torch_bit_for_bit(ours, theirs, options, beside_a_frame):
    if options.get("fused") and beside_a_frame:
        pytest.skip("refused, see test_flags")
    options = {"lr": 0.02, **options}
    model = network()
    twin = copy.deepcopy(model)
    params = list(model.parameters())
    if beside_a_frame:
        frame = ManifoldParameter(torch.eye(4, 2), manifold=EuclideanStiefel())
        frame.grad = torch.ones(4, 2)
        params.insert(1, frame)
    assert train(ours(params, **options), model) == train(
        theirs(twin.parameters(), **options), twin
    )
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_a_euclidean_manifold_is_plain(cls):
    start, grad = torch.randn(5), torch.randn(5)
    p = torch.nn.Parameter(start.clone())
    q = ManifoldParameter(start.clone(), manifold=Euclidean())
    for x in (p, q):
        x.grad = grad.clone()
        optimizer = cls([x], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.step()
    assert torch.equal(p, q.detach())
    assert not torch.equal(p, start)


def test_differentiable_reaches_torch():
    p = torch.zeros(3, requires_grad=True)
    scale = torch.ones(3, requires_grad=True)
    x = p.clone()
    x.grad = scale * torch.tensor([1.0, 2.0, 3.0])
    optimizer = RiemannianSGD([x], lr=0.5, differentiable=True)
    optimizer.step()
    (gradient,) = torch.autograd.grad(x.sum(), scale)
    torch.testing.assert_close(gradient, -0.5 * torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("cls", [RiemannianAdam, RiemannianSGD])
def test_complex_parameters(cls):
    start = torch.randn(4, dtype=torch.complex64)
    p, q = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    base = torch.optim.Adam if cls is RiemannianAdam else torch.optim.SGD
    for x, optimizer in ((p, cls([p], lr=0.1)), (q, base([q], lr=0.1))):
        for _ in range(3):
            x.grad = 2 * x.detach()
            optimizer.step()
    assert torch.equal(p, q)
