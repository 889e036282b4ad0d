"""A network run on a few batches, to see what its weights are multiplied with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.moments import Moments

__all__ = ["repeatable", "runs_of", "second_moments", "undisturbed"]


def second_moments(model: nn.Module, parameters: Iterable[Tensor], data: object) -> Moments:
    """Second moments of what parameters of a network are multiplied with, from one pass.

    The network is run in evaluation mode without gradient; its modes, hooks, buffers and torch's
    generators are as they were before.

    Args:
        model: the network.
        parameters: those to watch.
        data: as for :func:`compress`, which takes the result in place of the data: one pass for
            several conversions of copies that share their parameters.

    Raises:
        ConversionError: data that is none, or has no batch.
    """
    moments = Moments(parameters)
    with undisturbed(model), moments:
        for run, mask in runs_of(model, data):
            with moments.only(mask):
                run()
    return moments


def repeatable(data: Any) -> Any:
    """Data that can be gone through more than once: an iterator, such as a loader's, as a list.

    Args:
        data: as for :func:`second_moments`.
    """
    return list(data) if isinstance(data, Iterator) else data


def runs_of(model: nn.Module, data: Any) -> Iterator[tuple[Callable[[], object], Tensor | None]]:
    """Calls of a network, one for each batch, with which of its places are no padding."""
    if callable(data):
        yield lambda: data(model), None
        return
    if isinstance(data, (Tensor, Mapping)):
        data = [data]
    if isinstance(data, str) or not isinstance(data, Iterable):
        raise ConversionError(
            "data is a list or a loader of batches, or a function that runs the model, as in "
            f"data=lambda model: model(x, mask); got {type(data).__name__}"
        )
    device = next((p.device for p in model.parameters()), None)
    count = 0
    for count, batch in enumerate(data, 1):  # noqa: B007
        batch = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if isinstance(batch, Mapping):
            given = {key: _moved(value, device) for key, value in batch.items()}
            yield lambda given=given: model(**given), _kept(given)  # type: ignore[misc]
        elif isinstance(batch, Tensor):
            yield lambda batch=batch: model(_moved(batch, device)), None  # type: ignore[misc]
        else:
            raise ConversionError(
                "a batch of data is a tensor, a mapping of arguments, or a tuple whose first is "
                f"the input, got {type(batch).__name__}; for other models give a function, as in "
                "data=lambda model: model(x, mask)"
            )
    if not count:
        raise ConversionError("data has no batches; a loader that was used up has to be made anew")


def _kept(batch: Mapping[str, Any]) -> Tensor | None:
    """Places of a batch that are no padding; None for all, and where that is not plain.

    With inputs of a decoder beside it, a mask cannot be told from one of theirs by its size.
    """
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.is_floating_point():
        return None
    if any("decoder" in key for key in batch):
        return None
    mask = mask.bool()
    if not mask.any():
        raise ConversionError("the attention_mask of a batch of data keeps nothing; leave it out")
    return mask


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value


@contextmanager
def _quiet(flags: AbstractContextManager[object]) -> Iterator[None]:
    """Flags of a backend without a word on what else it lacks on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation without gradient, by the plain ways of torch, after which all is as before."""
    modes = {module: module.training for module in model.modules()}
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        for kind in {device.type for device in devices} & {"cuda", "xpu"}:
            places = [d.index or 0 for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(places, device_type=kind))
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(torch.no_grad())
        # Recurrent layers and the encoder of torch have kernels that show no product.
        stack.enter_context(_quiet(torch.backends.mkldnn.flags(enabled=False)))
        stack.enter_context(_quiet(torch.backends.cudnn.flags(enabled=False)))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            model.eval()
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes.items():
                module.training = mode
