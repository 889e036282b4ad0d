"""Ways that torch allows to change a parameter of the network in `networks_together`."""

from __future__ import annotations

import copy

import torch
from networks_together import DOUBLE, Net
from torch import nn
from ways_to_hold import METHODS

from sttp_manifold.nn import make_weight, switch
from sttp_manifold.optim import RiemannianSGD


def first_weight(model: Net) -> nn.Module:
    return model.linears[0].spectral_weight


def parameter(model: Net) -> nn.Parameter:
    return next(first_weight(model).parameters())


def owner(model: Net) -> tuple[nn.Module, str]:
    weight = first_weight(model)
    return weight, "point" if hasattr(weight, "point") else "coordinates"


def by_optimizer(model: Net) -> None:
    p = parameter(model)
    before, p.grad = p.grad, torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1).step()
    p.grad = before


def by_data(model: Net) -> None:
    parameter(model).data.mul_(1.5)


def by_new_data(model: Net) -> None:
    parameter(model).data = parameter(model).data * 1.5


def by_copy(model: Net) -> None:
    with torch.no_grad():
        parameter(model).copy_(parameter(model) * 1.5)


def in_place(model: Net) -> None:
    with torch.no_grad():
        parameter(model)[:3] += 0.25


def by_detached_alias(model: Net) -> None:
    parameter(model).detach().add_(0.25)


def by_numpy(model: Net) -> None:
    parameter(model).detach().numpy()[:3] += 0.25


def by_state_dict(model: Net) -> None:
    weight = first_weight(model)
    state = {k: v.clone() for k, v in weight.state_dict().items()}
    for name, value in state.items():
        if name == "point":
            value.copy_(weight.manifold.random(value.shape, **DOUBLE))
        elif value.is_floating_point():
            value.mul_(1.5)
    weight.load_state_dict(state)


def by_assigned_state_dict(model: Net) -> None:
    weight = first_weight(model)
    state = {k: v.clone() for k, v in weight.state_dict().items()}
    if "point" in state:
        state["point"] = weight.manifold.random(state["point"].shape, **DOUBLE).clone()
    else:
        state["coordinates"].mul_(1.5)
    weight.load_state_dict(state, assign=True)


def by_swap(model: Net) -> None:
    p = parameter(model)
    new = copy.deepcopy(p)
    new.data.mul_(1.5)
    torch.utils.swap_tensors(p, new)


def by_new_parameter(model: Net) -> None:
    module, name = owner(model)
    new = copy.deepcopy(module._parameters[name])
    new.data.mul_(1.5)
    setattr(module, name, new)


def by_encode(model: Net) -> None:
    weight = first_weight(model)
    weight.encode_(make_weight(weight.method, weight.shape, init="random", **DOUBLE).tt())


def by_resize(model: Net) -> None:
    """The same values in other memory, then others: neither version nor identity changes."""
    p = parameter(model)
    p.data = p.data.clone()
    p.data.add_(0.25)


def by_same_memory(model: Net) -> None:
    """Another parameter in the same memory: nothing but its identity tells, and its gradient."""
    module, name = owner(model)
    old = module._parameters[name]
    new = copy.copy(old)
    new.data = old.data
    assert new is not old
    assert new.data_ptr() == old.data_ptr()
    setattr(module, name, new)


def by_freezing(model: Net) -> None:
    first_weight(model).requires_grad_(False)


def by_new_weight(model: Net) -> None:
    switch(model.linears[0], METHODS[first_weight(model).method == "householder"])


CHANGES = [
    by_optimizer, by_data, by_new_data, by_copy, in_place, by_detached_alias, by_numpy,
    by_state_dict, by_assigned_state_dict, by_swap, by_new_parameter, by_encode, by_resize,
    by_same_memory, by_freezing, by_new_weight,
]  # fmt: skip


def by_set(model: Net) -> None:
    with torch.no_grad():
        parameter(model).set_(parameter(model).detach() * 1.5)


def by_storage(model: Net) -> None:
    p = parameter(model).detach()
    p.untyped_storage().copy_((p * 1.5).untyped_storage())


def by_dlpack(model: Net) -> None:
    torch.from_dlpack(parameter(model).detach()).mul_(1.5)


def by_preserved_version(model: Net) -> None:
    p = parameter(model)
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
        p.mul_(1.5)


def in_inference_mode(model: Net) -> None:
    with torch.inference_mode():
        parameter(model).mul_(1.5)


def by_vector(model: Net) -> None:
    parameters = list(first_weight(model).parameters())
    vector = nn.utils.parameters_to_vector(parameters).detach()
    nn.utils.vector_to_parameters(1.5 * vector, parameters)


def by_fused_optimizer(model: Net) -> None:
    p = parameter(model)
    p.grad = torch.ones_like(p)
    torch.optim.Adam([p], lr=0.1, fused=True).step()
    p.grad = None


def by_our_optimizer(model: Net) -> None:
    p = parameter(model)
    p.grad = torch.ones_like(p).cumsum(0)
    RiemannianSGD([p], lr=0.1).step()
    p.grad = None


def by_negative_view(model: Net) -> None:
    """The same bytes in the same memory, read with another sign."""
    parameter(model).data = torch._neg_view(parameter(model).data)


def by_rounding(model: Net) -> None:
    first_weight(model).float()
    first_weight(model).double()


# For forwards without gradient, where no graph refers to what is changed.
MORE_CHANGES = [
    by_set, by_storage, by_dlpack, by_preserved_version, in_inference_mode, by_vector,
    by_fused_optimizer, by_our_optimizer, by_negative_view, by_rounding,
]  # fmt: skip
