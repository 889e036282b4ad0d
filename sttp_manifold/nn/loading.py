"""A file's network into a module: everything is compared first, and then everything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold._geoopt import ManifoldParameter
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.carry import check_stock, mark_like
from sttp_manifold.nn.held import HeldWeight
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.modules import naming, show
from sttp_manifold.nn.stack import MatrixView, WeightStack, parts_of, rows_and_columns
from sttp_manifold.nn.state import EXTRA, from_tensor, misfit, to_tensor
from sttp_manifold.nn.stock import put_in_place, row_of
from sttp_manifold.nn.stored_network import StoredLayer, StoredNetwork
from sttp_manifold.nn.together import together
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.weight_file import unpack
from sttp_manifold.nn.weights_of import held_of, weights_of

__all__ = ["dense_tensors", "load_network", "place_of"]

_SHOWN = 5


def load_network(network: StoredNetwork, file: Any, model: nn.Module) -> nn.Module:
    """Load an open file into a network; see :func:`sttp_manifold.nn.load`."""
    fit = _Fit(network, model)
    keys = _keys_of_weights(network)
    dense = {key: key for key in _keys_of(file) if key not in keys}
    dense |= {alias: first for alias, first in network.aliases.items() if first in dense}
    _check_dense(dense, file, model, fit.replaced, fit.optional)
    made = {name: _read(network, file, name, fit.place_of(name)) for name in network.weights}
    new = fit.converted({name: fit.there.get(name, weight) for name, weight in made.items()})
    converted = put_in_place(model, new)
    for name, weight in fit.there.items():
        on_meta = not has_values(*weight._tensors())
        weight.load_state_dict(made[name].state_dict(), assign=on_meta)
    _fill(converted, {key: file.get_tensor(first) for key, first in dense.items()})
    if new and network.together and converted is model:
        together(model)
    return converted


class _Fit:
    """Which layers and weights of a network are those of a file.

    Attributes:
        names: first name of each module.
        stock: stock layers that become spectral ones.
        there: spectral weights that the network has, by their names in the file.
    """

    def __init__(self, network: StoredNetwork, model: nn.Module) -> None:
        self.network, self.model = network, model
        self.names = {module: name for name, module in model.named_modules()}
        self.stock: dict[nn.Module, StoredLayer] = {}
        self.there: dict[str, SpectralWeight] = {}
        self._tensors: dict[str, Tensor] = {}
        in_layers = {
            name
            for layer in network.layers.values()
            for names in layer.weights.values()
            for name in names
        }
        for name, layer in network.layers.items():
            with naming(name):
                self._take_layer(self._at(name, layer.kind), layer)
        for name in network.weights:
            if name not in in_layers:
                with naming(name):
                    self._take(name, self._at(name, "spectral weight"))
        self._check_rest()

    def _at(self, name: str, kind: str) -> nn.Module:
        try:
            return self.model.get_submodule(name)
        except AttributeError as error:
            raise ConversionError(
                f"the file holds a {kind} where the network has no module; load it into the "
                "network that was saved, as it was before compress(model, ...), and with the same "
                "adapters (adapt(model, ...)) if it had any",
                layer=name,
            ) from error

    def _take_layer(self, module: nn.Module, stored: StoredLayer) -> None:
        kind = parametrize.type_before_parametrizations(module)
        if held := held_of(module):
            if kind.__name__ != stored.kind or held.keys() != stored.weights.keys():
                raise self._other(module, stored)
            for key, names in stored.weights.items():
                parts = parts_of(held[key])
                if len(parts) != len(names):
                    raise self._other(module, stored)
                for name, weight in zip(names, parts, strict=True):
                    self._take(name, weight)
            return
        views = self._views(module, kind, stored)
        for key, names in stored.weights.items():
            tensor = module._parameters[key]
            assert tensor is not None
            sizes = rows_and_columns(views[key].sizes)
            shapes = [self.network.weights[name].shape for name in names]
            if len(names) != views[key].count or any((s.d_out, s.d_in) != sizes for s in shapes):
                said = " and ".join(sorted({f"{s.d_out} x {s.d_in}" for s in shapes}))
                raise ConversionError(
                    f"its {key} is of shape {tuple(tensor.shape)}, that of the file is "
                    f"{len(names)} times a matrix {said}; load it into a network of the sizes that "
                    "were saved"
                )
            for name in names:
                self._tensors.setdefault(name, tensor)
        self.stock[module] = stored

    def _views(
        self, module: nn.Module, kind: type[nn.Module], stored: StoredLayer
    ) -> Mapping[str, MatrixView]:
        """How a stock layer reads the parameters that become spectral."""
        row = row_of(module)
        if stored.views and kind.__name__ == stored.kind:
            check_stock(module, kind, stored.weights)
            views = stored.views
        elif row and row.spectral and row.spectral.__name__ == stored.kind and not stored.views:
            check_stock(module, row.stock, stored.weights)
            views = row.views_of(module)
        else:
            raise self._other(module, stored)
        shapes = {key: tuple(module._parameters[key].shape) for key in stored.weights}  # type: ignore[union-attr]
        if views.keys() != stored.weights.keys():
            raise self._other(module, stored)
        for key, view in views.items():
            if view.shape != shapes[key]:
                raise ConversionError(
                    f"its {key} is of shape {shapes[key]}, that of the file of {view.shape}; load "
                    "it into a network of the sizes that were saved"
                )
        return views

    def converted(
        self, made: Mapping[str, SpectralWeight]
    ) -> dict[nn.Module, nn.Module | dict[str, HeldWeight]]:
        """What takes the place of stock layers and of their parameters, of given weights."""
        stacks: dict[tuple[str, ...], SpectralWeight | WeightStack] = {}
        new: dict[nn.Module, nn.Module | dict[str, HeldWeight]] = {}
        for layer, stored in self.stock.items():
            held = {}
            for key, names in stored.weights.items():
                parts = [made[name] for name in names]
                if names not in stacks:
                    stacks[names] = parts[0] if len(parts) == 1 else WeightStack(parts)
                held[key] = stacks[names]
                tensor = layer._parameters[key]
                assert tensor is not None
                mark_like([tensor], held[key].parameters())
                held[key].requires_grad_(tensor.requires_grad)
            with naming(self.names[layer]):
                if stored.views:
                    new[layer] = {k: HeldWeight(h, stored.views[k]) for k, h in held.items()}
                else:
                    row = row_of(layer)
                    assert row is not None
                    assert row.spectral is not None
                    new[layer] = row.spectral.in_place_of(layer, held)
        return new

    def _other(self, module: nn.Module, stored: StoredLayer) -> ConversionError:
        return ConversionError(
            f"it is a {type(module).__name__}, and the file holds a {stored.kind} of "
            f"{', '.join(stored.weights)}; load it into the network that was saved, as it was "
            "before compress(model, ...) or after it"
        )

    def _take(self, name: str, weight: nn.Module) -> None:
        """Note that a weight of the network is that of a name, if it is on the same plan."""
        if not isinstance(weight, SpectralWeight):
            raise ConversionError(
                f"it is a {type(weight).__name__}, and the file holds a spectral weight; make it "
                "by make_weight(method, shape) first"
            )
        own = from_tensor(weight.get_extra_state())
        assert own is not None
        wrong = misfit(to_tensor(self.network.weights[name].held), own, f"{name}.")
        if wrong is not None:
            raise ConversionError(f"{wrong}. A network without spectral layers takes any file")
        before = {there: at for at, there in self.there.items()}
        if self.there.setdefault(name, weight) is not weight or before.get(weight, name) != name:
            raise ConversionError(
                f"the weight {name!r} of the file is shared by other layers than in this network; "
                "load it into the network as it was before compress(model, ...)"
            )

    def _check_rest(self) -> None:
        for module, name in self.names.items():
            if isinstance(module, SpectralWeight) and module not in self.there.values():
                raise ConversionError(
                    f"{show(name)} is a spectral weight, and the file holds none there; call "
                    "decompress(model) first, or load it into the network that was saved",
                    layer=name,
                )

    @property
    def optional(self) -> set[str]:
        """Names of buffers of spectral layers that may be None, and that stock layers have not."""
        found = set()
        for module, name in self.names.items():
            row = row_of(module)
            layer = module if isinstance(module, SpectralLayer) else row and row.spectral
            if layer and (module in self.stock or module is layer):
                found |= {f"{name}.{key}".removeprefix(".") for key in layer.own_buffers}
        return found

    @property
    def replaced(self) -> set[str]:
        """Names in the state dict of what is spectral, or will be."""
        found = set()
        for name, module in self.model.named_modules(remove_duplicate=False):
            keys: Iterable[str] = ()
            if module in self.stock:
                keys = self.stock[module].weights
            elif isinstance(module, SpectralWeight):
                keys = (*module._parameters, *module._buffers, EXTRA)
            found |= {f"{name}.{key}".removeprefix(".") for key in keys}
        return found

    def place_of(self, name: str) -> Tensor | None:
        """A tensor whose dtype and device a weight of the file is to have; None on ``meta``."""
        found = self._tensors.get(name)
        if name in self.there:
            found = self.there[name]._tensors()[0]
        return found if found is None or has_values(found) else None


def _keys_of(file: Any) -> list[str]:
    found: list[str] = file.keys()
    return found


def _keys_of_weights(network: StoredNetwork) -> set[str]:
    return {f"{name}.{w.tensor}".removeprefix(".") for name, w in network.weights.items()}


def _read(network: StoredNetwork, file: Any, name: str, place: Tensor | None) -> SpectralWeight:
    stored = network.weights[name]
    key = f"{name}.{stored.tensor}".removeprefix(".")
    with naming(name):
        if key not in _keys_of(file) or tuple(file.get_slice(key).get_shape()) != stored.size():
            raise ConversionError(
                f"the file holds no {stored.tensor} of {stored.size()[0]} numbers for it, as its "
                "recipe asks for: it is damaged"
            )
        dtype, device = (None, "cpu") if place is None else (place.dtype, place.device)
        return unpack(stored, file.get_tensor(key), dtype, torch.device(device))


def dense_tensors(model: nn.Module) -> dict[str, Any]:
    """What a state dict of a network holds beside its spectral weights, the objects themselves."""
    own = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SpectralWeight):
            tensors = (*module._parameters, *module._buffers, EXTRA)
            own |= {f"{name}.{key}".removeprefix(".") for key in tensors}
    state = model.state_dict(keep_vars=True)
    return {key: value for key, value in state.items() if key not in own}


def place_of(tensor: object) -> object:
    """What is equal for two tensors that are one."""
    if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor):
        return id(tensor)
    if tensor.layout != torch.strided or not tensor.numel() or not has_values(tensor):
        return id(tensor)
    return (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def _check_dense(
    dense: dict[str, str], file: Any, model: nn.Module, gone: set[str], optional: set[str]
) -> None:
    """Raise unless a network has the dense tensors of a file, of its shapes and ties."""
    own = {k: v for k, v in model.state_dict(keep_vars=True).items() if k not in gone}
    for what, names in (
        ("and not in the network", dense.keys() - own.keys() - optional),
        ("of the network and not in the file", own.keys() - dense.keys() - optional),
    ):
        if names:
            shown = ", ".join(map(repr, sorted(names)[:_SHOWN]))
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ConversionError(
                f"tensors {what}: {shown}{more}; load the file into the network that was saved"
            )
    tied: dict[object, str] = {}
    for key, first in dense.items():
        if key not in own:
            continue
        tensor = own[key]
        shape = tuple(file.get_slice(first).get_shape())
        if isinstance(tensor, Tensor) and (
            nn.parameter.is_lazy(tensor) or tuple(tensor.shape) != shape
        ):
            raise ConversionError(
                f"{key!r} is of shape {shape} in the file, and "
                f"{'not initialized' if nn.parameter.is_lazy(tensor) else tuple(tensor.shape)} in "
                "the network; load it into a network of the sizes that were saved"
            )
        other = tied.setdefault(place_of(tensor), first)
        if other != first and not torch.equal(file.get_tensor(other), file.get_tensor(first)):
            raise ConversionError(
                f"{key!r} is tied in the network to another tensor than in the file, which holds "
                f"{first!r} and {other!r} apart; untie them first"
            )
    _check_meta(model, own)


def _check_meta(model: nn.Module, own: dict[str, Any]) -> None:
    saved = {id(tensor) for tensor in own.values()}
    for name, buffer in model.named_buffers():
        if buffer.is_meta and id(buffer) not in saved and not _in_weight(model, name):
            raise ConversionError(
                f"the buffer {name!r} is on 'meta' and no file holds it (it is not persistent); "
                "make the network on the CPU, or compute that buffer first"
            )


def _in_weight(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), SpectralWeight)


def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load dense tensors; those on ``meta`` get memory first, tied ones the same."""
    made: dict[int, Tensor] = {}
    for name, module in model.named_modules():
        for key in module.own_buffers if isinstance(module, SpectralLayer) else ():
            stored = state.get(f"{name}.{key}".removeprefix("."))
            weight = next(iter(weights_of(module).values()))
            # As it was saved: of the network, none may be there, or another.
            module._buffers[key] = (
                None if stored is None else stored.to(weight.device, weight.dtype)
            )
        for store in (module._parameters, module._buffers):
            for key, tensor in store.items():
                stored = state.get(f"{name}.{key}".removeprefix("."))
                if tensor is not None and tensor.is_meta and stored is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = _like(tensor, stored)
                    store[key] = made[id(tensor)]
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys


def _like(tensor: Tensor, stored: Tensor) -> Tensor:
    """Memory for a tensor on ``meta``, of the kind that it is."""
    empty = torch.empty_like(stored)
    if isinstance(tensor, ManifoldParameter):
        return ManifoldParameter(
            empty, manifold=tensor.manifold, requires_grad=tensor.requires_grad
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
