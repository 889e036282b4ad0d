"""Weights computed together in networks that are copied, nested, shared and interrupted."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from networks_together import DOUBLE, Heads, agree, alone, every_method, image, made, run, warm
from torch import Tensor, nn

from sttp_manifold.nn import (
    SpectralLinear,
    batch,
    compress,
    decompress,
    scope,
    together,
)
from sttp_manifold.nn.scope import is_together

pytestmark = pytest.mark.skip("weights of charts are computed alone for now")


def test_modules_called_on_their_own(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    other = alone(model)
    for _ in range(2):
        agree(run(model.blocks[0], x), run(other.blocks[0], x))
    weight = model.linears[0].spectral_weight
    torch.testing.assert_close(weight(), other.linears[0].spectral_weight())
    assert not taken


@every_method
def test_copies_and_pickles(method: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    model.middle = None  # a lambda cannot be pickled
    model.middle = print_nothing
    warm(model, x, taken)
    wanted = run(alone(model), x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert is_together(other)
        for _ in range(2):
            agree(run(other, x), wanted)
        with torch.no_grad():
            for p in other.linears[0].parameters():
                p.mul_(1.1)
        agree(run(model, x), wanted)
        assert all(taken)


def print_nothing() -> None:
    """A function that a pickle can name."""


def test_layers_moved_to_another_model(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    second = together(nn.Sequential(model.blocks[0], model.blocks[1], nn.Conv2d(8, 8, 1)).double())
    for _ in range(3):
        agree(run(second, x), run(alone(second), x))
        agree(run(model, x), run(alone(model), x))


def test_nested_roots(taken: list[bool]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = made()
            self.after = nn.ModuleList(SpectralLinear(60, 60, 6, **DOUBLE) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.after[1](self.after[0](self.inner(x)))

    model, x = Outer(), image()
    for root in (model, together(model)):
        for _ in range(3):
            taken.clear()
            agree(run(root, x), run(alone_inside(root), x))
        assert len(taken) == (12 if is_together(root) else 10)


def alone_inside(model: nn.Module) -> nn.Module:
    new = copy.deepcopy(model)
    for module in new.modules():
        together(module, False)
    return new


def test_shared_weights_and_layers_used_twice(taken: list[bool]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = SpectralLinear(12, 12, 4, init="random", **DOUBLE)
            self.b = SpectralLinear(12, 12, 4, weight=self.a.spectral_weight, **DOUBLE)
            self.c = SpectralLinear(12, 12, 4, init="random", **DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.c(self.a(self.c(x)).tanh())))

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    assert taken == [True] * 10


def test_what_is_given_out_belongs_to_the_caller(taken: list[bool]) -> None:
    """Writing into a weight is as harmless as if it had been computed for this call alone."""

    class Model(Heads):
        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0].weight
            first.data.zero_()
            second = self.parts[1].weight
            second.mul_(2)
            again = self.parts[0].weight + self.parts[1].weight
            return x @ again + self.parts[1](x) + x @ second + self.parts[2](x)

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    assert all(taken)


def test_an_error_or_an_interrupt_leaves_nothing_behind(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    wanted = run(alone(model), x)

    def fail(error: BaseException) -> Callable[[], None]:
        def raises() -> None:
            raise error

        return raises

    for error in (ValueError("no"), KeyboardInterrupt()):
        model.middle = fail(error)
        with pytest.raises(type(error)):
            model(x)
        model.middle = lambda: None
        taken.clear()
        for _ in range(2):  # a graph left over could not be used twice
            run(model.linears[0], torch.randn(50, 60, **DOUBLE))
        assert not taken
        agree(run(model, x), wanted)


def test_parametrized_weights_compute_their_own(taken: list[bool]) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model, x = made(), image()
    warm(model, x, taken)
    weight = model.linears[0].spectral_weight
    before = model(x).detach()
    nn.utils.parametrize.register_parametrization(weight, "coordinates", Double())
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    assert not torch.allclose(before, model(x))


def test_two_threads_run_one_model(taken: list[bool]) -> None:
    model = made()
    inputs = [image(2, seed=k) for k in range(2)]
    wanted = [alone(model)(x).detach() for x in inputs]
    errors: list[object] = []

    def work(k: int) -> None:
        try:
            for _ in range(15):
                y = model(inputs[k])
                torch.testing.assert_close(y.detach(), wanted[k], rtol=1e-10, atol=1e-12)
                grads = torch.autograd.grad(y.sum(), list(model.parameters()))
                assert all(g.isfinite().all() for g in grads)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert True in taken


def test_hooks_and_subclasses_of_parameters(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    seen: list[Tensor] = []
    parameter = next(model.linears[0].spectral_weight.parameters())
    parameter.register_hook(lambda g: seen.append(g.clone()))
    run(model, x)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], parameter.grad)
    post: list[object] = []
    parameter.register_post_accumulate_grad_hook(post.append)
    run(model, x)
    assert len(post) == 1


def test_a_model_is_freed_when_it_is_let_go(taken: list[bool]) -> None:
    model, x = made(), image()
    warm(model, x, taken)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(model.linears[0].spectral_weight)
        memory = weakref.ref(model)
        del model
        assert memory() is None
        assert gone() is None
    finally:
        gc.enable()


def test_on_and_off() -> None:
    stock = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    model = compress(copy.deepcopy(stock), 3)
    assert is_together(model)
    assert model is together(model)
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    together(model, False)
    assert not is_together(model)
    assert not model._forward_hooks_always_called
    together(model)
    decompress(model)
    assert not is_together(model)
    assert not is_together(compress(stock, 3, together=False))


def test_what_gains_nothing_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single layer, and layers that have nothing in common, compute their own weights."""
    monkeypatch.setattr(batch._Run, "forward", lambda self: pytest.fail("a batch of one"))
    sizes = ((12, 30), (30, 7), (7, 19))
    model = together(nn.Sequential(*(SpectralLinear(a, b, 3, kind="svdp") for a, b in sizes)))
    for _ in range(12):
        model(torch.randn(4, 12))
    memory = scope._memories[model][True, True]
    assert memory.rest > 0
    assert not scope._scopes.stack
    with torch.no_grad():
        points = (SpectralLinear(12, 12, 4, method="riemannian") for _ in range(2))
        pair = together(nn.Sequential(*points))
        for _ in range(5):
            pair(torch.randn(4, 12))


def test_a_chart_without_a_partner_joins_a_batch_that_is_there() -> None:
    sizes = ((12, 12), (12, 12), (12, 7))
    for method, joins in (("householder", True), ("riemannian", False)):
        layers = [SpectralLinear(a, b, 3, kind="svdp", method=method) for a, b in sizes]
        members = [m for layer in layers if (m := batch._member(layer.spectral_weight, "dense"))]
        few = [2.0, 2.0]
        batch_of = dict(batch._PARTNERS, riemannian=few)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(batch, "_PARTNERS", batch_of)
            assert batch._gain(members, True) == [True, True, joins]
            assert batch._gain(members[2:], True) == [False]


def test_rest_ends_when_the_network_changes(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    model.leave_out = {0, 1}
    for _ in range(12):
        model(x)
    assert not taken
    model.leave_out = set()
    for _ in range(40):
        model(x)
    assert taken
    assert all(taken)


def test_large_weights_are_not_held_without_gradient(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    monkeypatch.setattr(batch, "_HELD", 2 * 12 * 12)
    model, x = together(Heads()), torch.randn(400, 12, **DOUBLE)
    for k in range(3):
        model.parts[k] = SpectralLinear(12, 12, 12, **DOUBLE)
    for _ in range(2):
        with torch.no_grad():
            model(x)
    assert len(taken) == 2
    taken.clear()
    for _ in range(2):
        model(x)
    assert len(taken) == 3


def test_large_products_are_the_same(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    model, x = made(), image()
    wanted = run(alone(model), x)
    monkeypatch.setattr(batch, "_LARGE", 1)
    for _ in range(2):
        agree(run(model, x), wanted)
    assert all(taken)


@pytest.mark.parametrize("method", ["householder", "riemannian"])
@pytest.mark.parametrize(("depth", "form"), [(3, "cores"), (6, "factors")])
def test_many_weights_of_one_plan_are_asked_for_as_factors(
    method: str, depth: int, form: str
) -> None:
    """By their cores each alone, and by their factors from the second forward on."""
    layers = [SpectralLinear(256, 256, 16, method=method, **DOUBLE) for _ in range(depth)]
    model, x = together(nn.Sequential(*layers)), torch.randn(32, 256, **DOUBLE)
    wanted = run(alone(model), x)
    for _ in range(5):
        agree(run(model, x), wanted)
    memory = scope._memories[model][True, True]
    assert [asked for _, asked in memory.asked] == [form] * depth
    assert memory.rest == 0 or form == "cores"
    assert scope.partners(layers[0].spectral_weight) == 1
