"""`save` and `load`: a network in one safetensors file, its spectral weights by their recipes.

The file holds as many numbers as the network has dimensions, and the recipe of each spectral weight
in its metadata. Nothing in it is code: it can be read from anybody.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sttp_manifold._arguments import explained
from sttp_manifold._files import replacing
from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.loading import dense_tensors, load_network, place_of
from sttp_manifold.nn.modules import naming
from sttp_manifold.nn.stack import parts_of
from sttp_manifold.nn.stored_network import KEY, StoredLayer, StoredNetwork
from sttp_manifold.nn.together import is_together
from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.weight_file import pack
from sttp_manifold.nn.weights_of import held_of, views_of

__all__ = ["load", "opened", "save"]


@explained
@torch.no_grad()
def save(model: nn.Module, path: str | os.PathLike[str], *, exact: bool = False) -> None:
    """Write a network to a safetensors file, with the recipe of each spectral weight.

    A spectral weight is stored by the coordinates of its chart, as many as it has dimensions
    (and one more for a normalized spectrum); dense tensors as they are, shared ones once. Plan,
    method, spectrum, bound, signs and given singular values are in the metadata. Nothing is
    pickled. A file that was there is replaced when the new one is whole.

    A weight on a manifold comes back as the same matrix to rounding, and perhaps by other frames
    (another gauge). ``exact=True`` stores its point as it is, bit for bit, with more numbers: do
    that where an optimizer's state is kept as well, which speaks of those frames.

    Args:
        model: a network with spectral weights, or without.
        path: the file, mostly ``*.safetensors``; folders are made.
        exact: whether points of manifolds are stored as they are.

    Raises:
        ConversionError: tensors without numbers (on ``meta``), or of a type that a file of tensors
            cannot hold (quantized, sparse, sharded), extra state that is no tensor, or a spectral
            weight with numbers that are not finite.

    Example:
        >>> import tempfile
        >>> from sttp_manifold.nn import compress, load
        >>> model = compress(nn.Sequential(nn.Linear(64, 32)), rank=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/model.safetensors")
        ...     other = load(f"{folder}/model.safetensors", into=nn.Sequential(nn.Linear(64, 32)))
        >>> x = torch.randn(3, 64)
        >>> bool(torch.equal(other(x), model(x)))
        True
    """
    model = _inside(model)
    weights, first, tensors = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, SpectralWeight):
            with naming(name):
                weights[name], numbers = pack(module, exact=exact)
            first[module] = name
            tensors[f"{name}.{weights[name].tensor}".removeprefix(".")] = numbers
    layers = {
        name: _stored(module, first) for name, module in model.named_modules() if held_of(module)
    }
    dense, aliases = _each_once(dense_tensors(model))
    network = StoredNetwork(weights, layers, aliases, is_together(model))
    ready = _apart({name: _storable(name, tensor) for name, tensor in (tensors | dense).items()})
    with replacing(Path(path)) as temporary:
        save_file(ready, str(temporary), {"format": "pt", KEY: network.to_text()})


@explained
@torch.no_grad()
def load(path: str | os.PathLike[str], *, into: nn.Module) -> nn.Module:
    """Read a network that :func:`save` wrote.

    Stock layers become the spectral ones that the file says, as :func:`compress` would make them;
    layers that are spectral already have to be on the same plan. Dtypes, devices, frozen
    parameters, training mode and hooks are those of ``into``; a network on ``meta`` takes the
    dtypes of the file, on the CPU. Tied layers of the file are tied afterwards where their weight
    is spectral. If anything does not fit, nothing has changed.

    Args:
        path: the file.
        into: the network as it was before it was compressed, or compressed as the file says.

    Returns:
        The network; the new layer if the network itself is a layer.

    Raises:
        ConversionError: a file that :func:`save` did not write, or a later version of it did; a
            network that does not fit, by layers, plans, spectra, methods, shapes or ties; numbers
            that are not finite, or frames that are not orthonormal.
        FileNotFoundError: no such file.
    """
    with opened(Path(path)) as file:
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise ConversionError(
                f"{path} says nothing of spectral weights: sm.nn.save did not write it; for the "
                "dense weights of a stock network call model.load_state_dict("
                f"safetensors.torch.load_file({str(path)!r})), then compress(model, ...)"
            )
        try:
            return load_network(StoredNetwork.from_text(text), file, _inside(into))
        except ConversionError as error:
            error.args = (f"{path}: {error}",)
            raise


def _stored(module: nn.Module, first: dict[SpectralWeight, str]) -> StoredLayer:
    """What is said of a module that holds parameters in spectral form."""
    kind = parametrize.type_before_parametrizations(module).__name__
    weights = {
        key: tuple(first[part] for part in parts_of(held)) for key, held in held_of(module).items()
    }
    is_layer = isinstance(module, SpectralLayer)
    return StoredLayer(kind, weights, {} if is_layer else views_of(module))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open file of tensors.

    Raises:
        ConversionError: a file that is none, or not whole.
    """
    try:
        file = safe_open(str(path), framework="pt", device="cpu")
    except SafetensorError as error:
        raise ConversionError(
            f"{path} is no whole safetensors file ({error}); save the network anew by "
            "sm.nn.save(model, path)"
        ) from error
    with file:
        yield file


def _inside(model: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped."""
    inner = model._modules.get("_orig_mod")
    return inner if type(model).__name__ == "OptimizedModule" and inner is not None else model


def _each_once(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors without those that are an earlier one, and the names of these."""
    names: dict[object, str] = {}
    once, aliases = {}, {}
    for name, tensor in tensors.items():
        first = names.setdefault(place_of(tensor), name)
        if first == name:
            once[name] = tensor
        else:
            aliases[name] = first
    return once, aliases


def _storable(name: str, tensor: object) -> Tensor:
    """A tensor as a file holds it, or why it cannot."""
    if not isinstance(tensor, Tensor):
        raise ConversionError(
            f"{name!r} is no tensor but {type(tensor).__name__}, which only a pickle could hold; "
            "let get_extra_state() of that module give a tensor"
        )
    if nn.parameter.is_lazy(tensor) or not has_values(tensor):
        raise ConversionError(
            f"{name!r} holds no numbers (it is on 'meta' or uninitialized); load the model first"
        )
    is_subclass = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if tensor.layout != torch.strided or tensor.is_quantized or is_subclass:
        raise ConversionError(
            f"{name!r} is a {type(tensor).__name__} of layout {tensor.layout} and {tensor.dtype}, "
            "which a file of plain tensors does not hold; make it a dense one (a sharded one by "
            "its full_tensor())"
        )
    return tensor.detach().cpu().contiguous()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which the format asks for."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        apart[name] = tensor if whole else tensor.clone()
    return apart
