"""Weights computed together in networks that are copied, nested, shared and interrupted."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from networks_together import (
    DOUBLE,
    Heads,
    agree,
    alone,
    gradients,
    image,
    made,
    run,
    warm,
)
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold.errors import FrameOverflowError
from sttp_manifold.nn import (
    SpectralConv2d,
    SpectralLinear,
    SpectralWeight,
    compress,
    decompress,
    together,
)
from sttp_manifold.nn.together import is_together

# The name in the package is the function's.
module = sys.modules["sttp_manifold.nn.together"]


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
    assert taken == [True] * 15


def test_what_is_given_out_belongs_to_the_caller(taken: list[bool]) -> None:
    """Writing into a weight is as harmless as if it had been computed for this call alone."""

    class Model(Heads):
        def forward(self, x: Tensor) -> Tensor:
            first = self.parts[0].spectral_weight()
            first.data.zero_()
            second = self.parts[1].spectral_weight()
            second.mul_(2)
            again = self.parts[0].weight + self.parts[1].weight
            return x @ again + self.parts[1](x) + x @ second + self.parts[2](x)

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    for _ in range(3):
        agree(run(model, x), run(alone(model), x))
    assert all(taken)


def test_nothing_wrong_is_seen_after_an_error_or_an_interrupt(taken: list[bool]) -> None:
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
        # torch tells hooks of an error, but not of an interrupt: what was formed stays until the
        # next forward of the model, and holds as long as the parameters do.
        rows = torch.randn(50, 60, **DOUBLE)
        for step in range(3):
            agree(run(model.linears[0], rows), run(alone(model).linears[0], rows))
            with torch.no_grad():
                parameter = next(model.linears[0].spectral_weight.parameters())
                parameter[-1] *= 2.0 if step == 1 else 1.0 if step == 0 else 0.5
        assert bool(taken) == isinstance(error, KeyboardInterrupt)
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


@every_method
def test_a_step_leaves_nothing_for_the_garbage_collector(method: str, taken: list[bool]) -> None:
    model, x = made(method), image()
    warm(model, x, taken)
    frozen = made(method).requires_grad_(False)
    gc.collect()
    gc.disable()
    try:
        run(model, x)
        frozen(x)
        with torch.no_grad():
            model(x)
        before = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        for _ in range(3):
            run(model, x)
            frozen(x)
            with torch.no_grad():
                model(x)
        assert sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()) == before
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


def test_large_weights_are_not_held_without_gradient(
    monkeypatch: pytest.MonkeyPatch, taken: list[bool]
) -> None:
    """They are formed one by one, where they are asked for."""
    monkeypatch.setattr(module, "_HELD", 2 * 12 * 12)
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    for k in range(3):
        model.parts[k] = SpectralLinear(12, 12, 12, **DOUBLE)
    wanted = [y.detach() for y in alone(model)(x)]
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-10, atol=1e-12)
    assert taken == [True] * 2
    taken.clear()
    torch.testing.assert_close(list(map(Tensor.detach, model(x))), wanted, rtol=1e-10, atol=1e-12)
    assert taken == [True] * 3


@every_method
def test_a_dense_weight_is_formed_once_a_forward_however_often_it_is_read(method: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SpectralConv2d(4, 4, 3, 4, padding=1, method=method, **DOUBLE)
            self.other = SpectralConv2d(4, 4, 3, 4, padding=1, method=method, **DOUBLE)

        def forward(self, x: Tensor) -> Tensor:
            norm = sum(self.layer.weight.square().sum() for _ in range(3))
            first, second = self.layer.spectral_weight(), self.layer.spectral_weight()
            assert first.data_ptr() == second.data_ptr()
            return self.other(self.layer(x)) * norm

    model, x = together(Model()), torch.randn(2, 4, 5, 5, **DOUBLE)
    assert model.layer.form_together(model.layer.spectral_weight) == "dense"
    with mock.patch.object(module, "form", wraps=module.form) as formed:
        run(model, x)
    assert formed.call_count == 1
    with mock.patch.object(SpectralWeight, "_in_form", side_effect=AssertionError):
        run(model, x)


# Linear layers take row_factors; factors are transposes of these, and a hook on one is on no more.
@pytest.mark.parametrize(("read", "refused"), [("row_factors", 1), ("factors", 0)])
def test_hooks_on_the_gradient_of_what_is_given_out_are_of_its_caller(
    taken: list[bool], read: str, refused: int
) -> None:
    class Model(Heads):
        def forward(self, x: Tensor) -> Tensor:
            out = self.parts[1](x).sum()
            for k, part in enumerate(self.parts[:2]):
                for factor in getattr(part.spectral_weight, read)():
                    factor.register_hook(torch.zeros_like)
                    out = out + k * factor.sum()
            return out + self.parts[0](x)

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    agree(run(model, x), run(alone(model), x))
    assert taken.count(False) == refused


def test_frozen_weights_that_are_given_out_take_changes_with_gradient(taken: list[bool]) -> None:
    class Model(Heads):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.how = how
            self.delta = nn.Parameter(torch.randn(12, 12, **DOUBLE))

        def forward(self, x: Tensor) -> Tensor:
            weight = self.parts[0].spectral_weight
            us, vt = weight.factors()
            if self.how == "in place":
                us += self.delta[:, :4]
                dense = self.parts[1].spectral_weight()
                dense[0] = self.delta[0]
                return x @ (us @ vt) + x @ dense + self.parts[0](x)
            us.requires_grad_()
            y = self.parts[0](x)
            assert not y.requires_grad
            return y + x @ self.delta

    for how in ("in place", "leaf"):
        model, x = together(Model(how)), torch.randn(4, 12, **DOUBLE)
        model.parts.requires_grad_(False)
        agree(run(model, x), run(alone(model), x))
    assert True in taken


def test_the_parts_of_a_weight_have_backward_passes_of_their_own(taken: list[bool]) -> None:
    class Model(Heads):
        def forward(self, x: Tensor) -> list[Tensor]:
            return list(self.parts[0].spectral_weight.factors())

    model, x = together(Model()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for m in (model, other):
        for part in m(x):
            part.square().sum().backward()
        core, *_, last = m.parts[1].spectral_weight.tt().right
        core.sum().backward()
        last.sin().sum().backward()
    agree((x, gradients(model)), (x, gradients(other)))


def test_a_diverged_weight_fails_where_it_is_used(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    wanted = [y.detach() for y in alone(model)(x)]
    with torch.no_grad():
        model.parts[1].spectral_weight.coordinates[0] = 1e200
    model.leave_out = {1}
    found = model(x)
    torch.testing.assert_close([y.detach() for y in found], wanted[::2], rtol=1e-10, atol=1e-12)
    model.leave_out = set()
    with pytest.raises(FrameOverflowError):
        model(x)


def test_a_layer_used_twice_is_used_in_separate_backward_passes(taken: list[bool]) -> None:
    class Twice(Heads):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.parts[0](x), self.parts[0](x.sin()), self.parts[1](x)]

    model, x = together(Twice()), torch.randn(4, 12, **DOUBLE)
    other = alone(model)
    for m in (model, other):
        first, second, third = m(x)
        first.square().sum().backward()
        third.sum().backward()
        second.cos().sum().backward()
    agree((x, gradients(model)), (x, gradients(other)))
    assert all(taken)


def test_replicas_of_data_parallel_form_their_own(taken: list[bool]) -> None:
    model, x = together(Heads()), torch.randn(4, 12, **DOUBLE)
    replica = model._replicate_for_data_parallel()
    for name, part in model.parts._modules.items():
        new = part._replicate_for_data_parallel()
        weight = part.spectral_weight._replicate_for_data_parallel()
        weight.coordinates = part.spectral_weight.coordinates * 1
        new.bias, new._modules["spectral_weight"] = part.bias * 1, weight
        if name == "0":
            replica._modules["parts"] = replica.parts._replicate_for_data_parallel()
        replica.parts._modules[name] = new
    torch.testing.assert_close(replica(x), alone(model)(x))
    assert not taken
