"""What torch is doing around a computation: the doors to its state, some of them private.

Where a door is missing in a version of torch, `circumstances` says that nothing may be shared.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from sttp_manifold.tt.precision import autocast_is_on

__all__ = [
    "Circumstances",
    "circumstances",
    "graph_is_kept",
    "has_values",
    "in_onnx_export",
    "is_batched",
    "outside_autocast",
]

Circumstances = tuple[bool, bool, int, object]


def outside_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Frames need solves, which refuse bfloat16, and an accuracy that autocast would lose."""
    kind = device.type
    if autocast_is_on(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def has_values(*tensors: Tensor) -> bool:
    """Whether tensors hold numbers: those on ``meta`` and fake ones have but a shape."""
    return not any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_onnx_export() -> bool:
    """Whether a network is being written down for ONNX.

    Asked where it runs: in a trace, ``torch.onnx.is_in_onnx_export()`` is always False.
    """
    exporting = getattr(torch.compiler, "is_exporting", None)
    watched = torch.jit.is_tracing() or (exporting is not None and exporting())
    return watched and torch.onnx.is_in_onnx_export()


def circumstances() -> Circumstances | None:
    """What a tensor computed now depends on beside its inputs; None if it is not to be shared.

    Equal answers mean that one computation can stand for another: the same grad mode, inference
    mode, running backward pass and CUDA stream. There is none under transforms of ``torch.func``,
    tracing, forward-mode differentiation, dispatch modes (fake tensors, counters), and hooks on
    saved tensors: gradient checkpointing counts what a region saves, and repeats the region alone.
    """
    try:
        if (
            torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            or forward_ad._current_level >= 0
        ):
            return None
        task = torch._C._current_graph_task_id()
    except (AttributeError, TypeError):
        return None
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), task, stream


def graph_is_kept() -> bool:
    """Whether the backward pass that is running keeps its graph; True where torch cannot tell."""
    try:
        return bool(torch._C._autograd._get_current_graph_task_keep_graph())
    except AttributeError:
        return True


def is_batched(tensor: Tensor) -> bool:
    """Whether vmap holds a batch in a tensor; True where torch cannot tell."""
    try:
        functorch = torch._C._functorch
        return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)
    except AttributeError:
        return True
