"""`capture_step`: a training step as one graph of kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, OptimizerError, ShapeError

__all__ = ["CapturedStep", "capture_step"]

_WARM_UP = 3
"""Steps before a capture, in which state is made and libraries open their handles."""

LossFunction = Callable[..., Tensor]


class CapturedStep:
    """A training step that is called with a batch; made by :func:`capture_step`.

    Attributes:
        graph: the captured graph; None on the CPU, where each call is an ordinary step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFunction,
        example: Sequence[Tensor],
    ) -> None:
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._inputs = [tensor.detach().clone() for tensor in example]
        self.graph: torch.cuda.CUDAGraph | None = None
        self._loss = torch.zeros(())
        if self._inputs[0].device.type == "cuda":
            self._capture()

    def _one_step(self) -> Tensor:
        loss = self._loss_fn(self._model, *self._inputs)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _capture(self) -> None:
        device = self._inputs[0].device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream), rewound(self._model, self._optimizer):
            for _ in range(_WARM_UP):
                self._optimizer.zero_grad(set_to_none=True)
                self._one_step()
        torch.cuda.current_stream(device).wait_stream(stream)
        # So that the gradients lie in the memory of the graph, and are written, not added to.
        self._optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._loss = self._one_step()
        self.graph = graph

    @explained
    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step.

        Args:
            batch: tensors of the shapes, dtypes and device of the example.

        Shape:
            - batch: as the example
            - output: ``()``

        Returns:
            The loss before the step, without gradient; the next call overwrites it.

        Raises:
            ShapeError: a batch that is not like the example.
        """
        found = [(tuple(t.shape), t.dtype) for t in batch]
        wanted = [(tuple(t.shape), t.dtype) for t in self._inputs]
        if found != wanted:
            raise ShapeError(
                f"a captured step takes a batch like its example, {wanted}, got {found}; drop a "
                "smaller last batch, as in DataLoader(..., drop_last=True)"
            )
        for kept, given in zip(self._inputs, batch, strict=True):
            kept.copy_(given, non_blocking=True)
        if self.graph is None:
            self._optimizer.zero_grad(set_to_none=True)
            return self._one_step()
        self.graph.replay()
        return self._loss


@explained
def capture_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFunction,
    example: Sequence[Tensor],
) -> CapturedStep:
    """Capture a training step, forward, backward and the optimizer's, as one graph of kernels.

    On CUDA a call of the result copies its batch to where the graph reads it and replays the graph:
    no time goes into Python or into launches. On the CPU, where there are no graphs, it takes an
    ordinary step, so that one script runs on both. The warm-up that a capture needs leaves no
    trace: parameters, buffers and the optimizer's state are what they were.

    What is a number when the graph is captured stays: give ``lr`` as a tensor on the device to
    change it in place. Capture again after whatever makes new tensors: ``load_state_dict`` of the
    optimizer, :func:`compress`, :func:`switch`, :func:`truncate_`. Inside of the step the host must
    not wait for the device.

    Args:
        model: the network.
        optimizer: over its parameters; those that have a flag ``capturable`` need it on CUDA.
        loss_fn: called as ``loss_fn(model, *batch)``, returns the loss.
        example: a batch, on the device of the model; each later one has its shapes and dtypes.

    Shape:
        - example: as ``loss_fn`` takes them
        - output of a step: ``()``

    Raises:
        ConversionError: an example that is empty or not on the device of the model.
        OptimizerError: an optimizer without the flag ``capturable`` that it needs.

    Example:
        >>> from sttp_manifold.nn import compress
        >>> model = compress(nn.Sequential(nn.Linear(64, 32)), rank=4)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> x, y = torch.randn(8, 64), torch.randn(8, 32)
        >>> def loss_fn(model, x, y):
        ...     return (model(x) - y).square().mean()
        >>> step = capture_step(model, optimizer, loss_fn, (x, y))
        >>> step(x, y).shape
        torch.Size([])

    References:
        https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """
    batch = list(example)
    if not batch or not all(torch.is_tensor(t) for t in batch):
        raise ConversionError(
            "the example of capture_step is a sequence of tensors, as in "
            f"capture_step(model, optimizer, loss_fn, (x, y)); got {example!r:.80}"
        )
    devices = {p.device for p in model.parameters()} | {t.device for t in batch}
    if len(devices) > 1:
        raise ConversionError(
            f"capture_step needs the model and the example on one device, got "
            f"{', '.join(sorted(map(str, devices)))}; call model.to(device) and move the example"
        )
    if batch[0].device.type == "cuda":
        for group in optimizer.param_groups:
            if group.get("capturable") is False:
                name = type(optimizer).__name__
                raise OptimizerError(
                    f"{name} counts its steps on the host, and a captured graph does not ask it; "
                    f"make it by {name}(model.parameters(), lr=..., capturable=True)"
                )
    return CapturedStep(model, optimizer, loss_fn, batch)


@contextmanager
def rewound(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Undo what steps inside do, in place: every tensor keeps its address.

    State that they have made becomes zero, as moments and counts begin.
    """
    before = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    states: dict[int, dict[str, Any]] = {
        id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        for p, state in optimizer.state.items()
    }
    yield
    with torch.no_grad():
        for tensor, value in before:
            tensor.copy_(value)
        for p, state in optimizer.state.items():
            old = states.get(id(p), {})
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    state[name] = old.get(name, value)
                elif isinstance(old.get(name), Tensor):
                    value.copy_(old[name])
                else:
                    value.zero_()
