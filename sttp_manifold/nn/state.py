"""What a state dict says of a spectral weight beside its numbers, and whether it fits another one.

Two weights of one plan may mean different things by the same numbers: the spectrum, its bound and
the method are no tensors. They travel as torch's *extra state*, JSON in a ``uint8`` tensor, which
files that hold tensors alone take as well (``torch.load(weights_only=True)``, safetensors).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.nn.torch_state import has_values
from sttp_manifold.tt.shape import TTShape

__all__ = ["EXTRA", "from_tensor", "held_by", "misfit", "not_finite", "to_tensor", "warn_once"]

EXTRA = "_extra_state"
"""Torch's key, behind the prefix of a module."""

_VERSION = 1
_BLOCK = 256


def held_by(method: str, shape: TTShape, spectrum: str, bound: float) -> dict[str, Any]:
    """What is to be said of a weight."""
    held = {
        "sttp": _VERSION,
        "method": method,
        "spectrum": spectrum,
        "out_modes": list(shape.out_modes),
        "in_modes": list(shape.in_modes),
        "ranks": list(shape.ranks),
    }
    return held | ({"bound": bound} if spectrum == "bounded" else {})


def to_tensor(held: Mapping[str, Any]) -> Tensor:
    """As bytes of JSON.

    Shape:
        - output: ``(n,)``
    """
    text = json.dumps(held, separators=(",", ":"))
    # Of one length for most: who loads into tensors of a size (distributed checkpoints) gets to the
    # comparison, and is not stuck at the length of a text.
    text = text.ljust(-(-len(text) // _BLOCK) * _BLOCK)
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def from_tensor(state: object) -> dict[str, Any] | None:
    """Back from bytes, also where an average has made floats of them; None for anything else.

    Shape:
        - state: ``(n,)``
    """
    if not isinstance(state, Tensor) or not has_values(state):
        return None
    try:
        held = json.loads(bytes(state.detach().cpu().double().round().to(torch.uint8).tolist()))
    except (ValueError, RuntimeError):
        return None
    return held if isinstance(held, dict) and "sttp" in held else None


def misfit(state: object, own: Mapping[str, Any], prefix: str) -> str | None:
    """Why a state does not fit a weight, with the call that works; None if it does.

    Args:
        state: the extra state that was stored.
        own: what the weight itself would say.
        prefix: of the weight's keys in the state dict.
    """
    key = f"{prefix}{EXTRA}"
    held = from_tensor(state)
    if held is None:
        if isinstance(state, Tensor) and not has_values(state):
            return None
        return f"{key} cannot be read: it is not what get_extra_state() of a spectral weight gave"
    if held["sttp"] > _VERSION:
        return (
            f"{key} was written by a later version of this package (format {held['sttp']}, here "
            f"{_VERSION}); update the package"
        )
    names = [n for n in own if n != "bound" and held.get(n) != own[n]]
    bounds = [float(d.get("bound", math.nan)) for d in (held, own)]
    if not names and "bound" in own and not math.isclose(*bounds, rel_tol=1e-12):
        names = ["bound"]
    if not names:
        return None
    where = f"the weight {prefix[:-1]!r}" if prefix else "this weight"
    return f"{where} does not fit: the state holds {_said(held)}, the module {_said(own)}; " + (
        f"call switch(model, {held.get('method')!r}) before loading, and switch back after it"
        if names == ["method"]
        else f"make the module with {_options(held)}, as in compress(model, ...), and load again; "
        "to go over to other options, encode_ the loaded weight's tt() into another weight"
    )


def _said(held: Mapping[str, Any]) -> str:
    modes = " | ".join("·".join(map(str, held.get(n, ()))) for n in ("out_modes", "in_modes"))
    bound = f", bound={held['bound']!r}" if "bound" in held else ""
    return (
        f"modes {modes}, ranks {'-'.join(map(str, held.get('ranks', ())))}, "
        f"method={held.get('method')!r}, spectrum={held.get('spectrum')!r}{bound}"
    )


def _options(held: Mapping[str, Any]) -> str:
    ranks, out, inside = (held.get(n) or [0] for n in ("ranks", "out_modes", "in_modes"))
    kind = "svdp" if len(out) == len(inside) == 1 else "sttp"
    bound = f", bound={held['bound']!r}" if "bound" in held else ""
    return (
        f"rank={max(ranks)}, kind={kind!r}, method={held.get('method')!r}, "
        f"spectrum={held.get('spectrum')!r}{bound}"
    )


def not_finite(state_dict: Mapping[str, Any], prefix: str, names: Sequence[str]) -> str | None:
    """Name tensors of a state that hold NaN or infinity.

    Args:
        state_dict: the state dict.
        prefix: of the weight's keys in it.
        names: its tensors.
    """
    for name in names:
        value = state_dict.get(prefix + name)
        if isinstance(value, Tensor) and has_values(value) and not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            return (
                f"{prefix}{name} has {bad} of {value.numel()} entries that are not finite: the "
                "training that stored it had diverged; load an earlier state"
            )
    return None


_last: Sequence[str] | None = None


def warn_once(load: Sequence[str], text: str) -> None:
    """Warn once in each call of ``load_state_dict``.

    Args:
        load: the list in which that call collects its errors, the same for all modules.
        text: the warning.
    """
    global _last
    if load is not _last:
        _last = load
        warnings.warn(text, stacklevel=2)
