"""Parameters that took the place of others, and an optimizer that goes on with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.errors import OptimizerError

__all__ = ["replace_parameters", "succeed"]

# Kept with the old parameter, which an optimizer holds, and which is gone as soon as none does.
_SUCCESSOR = "_sttp_successor"


def succeed(old: Iterable[Tensor], new: Iterable[Tensor]) -> None:
    """Note that parameters have taken the place of others, one for one.

    Args:
        old: parameters that are in the model no more.
        new: those that stand for the same there.

    Shape:
        - old, new: any
    """
    for before, after in zip(old, new, strict=True):
        setattr(before, _SUCCESSOR, after)


def _latest(p: Tensor) -> Tensor:
    while (after := getattr(p, _SUCCESSOR, None)) is not None:
        p = after
    return p


def replace_parameters(
    optimizer: Any, model: nn.Module, carry: Callable[..., dict[str, Any] | None] | None
) -> None:
    """Put the parameters of a model in the place of those that they have succeeded.

    Groups are the same objects with as many parameters in the same order, which is what schedulers
    and states go by. If anything is wrong, nothing has changed.

    Args:
        optimizer: with torch's ``param_groups`` and ``state``.
        model: holds the parameters of now.
        carry: makes the state of a new parameter of a group, ``carry(group, old, new, state)``;
            None, or one that returns None, to start anew.

    Raises:
        OptimizerError: what is no such optimizer; a parameter whose successor the model does not
            have, or that is held already; parameters of the model that stand for none of the
            optimizer's, while it holds others that are not the model's.
    """
    name = type(optimizer).__name__
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list) or hasattr(optimizer, "get_last_lr"):
        raise OptimizerError(
            f"follow takes an optimizer, but got {name}, which has no parameter groups of its own; "
            f"call follow(torch.optim.Adam(model.parameters()), model)"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise OptimizerError(
            "follow cannot take LBFGS along, whose history is of vectors of all parameters; make "
            "it anew, torch.optim.LBFGS(model.parameters())"
        )
    names = {id(p): n for n, p in model.named_parameters()}
    moves = _moves(groups, names, model, name)
    carried = []
    state = optimizer.state
    for group in groups:
        for old, new in (moves[id(p)] for p in group["params"] if id(p) in moves):
            before = state.get(old)  # whoever asks a defaultdict makes an entry
            after = carry(group, old, new, before) if carry is not None and before else None
            carried.append((old, new, after))
    for group in groups:
        group["params"][:] = [moves[id(p)][1] if id(p) in moves else p for p in group["params"]]
    for old, new, after in carried:
        state.pop(old, None)
        if after is not None:
            state[new] = after


def _moves(
    groups: list[dict[str, Any]], names: dict[int, str], model: nn.Module, name: str
) -> dict[int, tuple[Tensor, Tensor]]:
    """The parameters to replace, by identity, each with its successor."""
    held = [p for group in groups for p in group["params"]]
    ids = set(map(id, held))
    moves: dict[int, tuple[Tensor, Tensor]] = {}
    strangers = []
    kind = type(model).__name__
    anew = f"make it anew, {name}(model.parameters(), lr=...)"
    for p in held:
        if id(p) in names:
            continue
        after = _latest(p)
        if after is p:
            strangers.append(p)
            continue
        if id(after) not in names:
            raise OptimizerError(
                f"{name} holds a parameter of shape {tuple(p.shape)} whose successor, of shape "
                f"{tuple(after.shape)}, is in no module of this {kind}; call follow(optimizer, "
                f"model) with the model that truncate_, grow_ or switch changed, or {anew}"
            )
        if id(after) in ids:
            raise OptimizerError(
                f"{name} holds {names[id(after)]!r} and a parameter of shape {tuple(p.shape)} that "
                f"it took the place of; {anew}"
            )
        moves[id(p)] = p, after
    ids |= {id(after) for _, after in moves.values()}
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ids]
    # Either alone may be meant: a loss with parameters of its own, a part that is not trained.
    if strangers and left_out:
        raise OptimizerError(
            f"{name} holds a parameter of shape {tuple(strangers[0].shape)} that is in no module "
            f"of this {kind}, and does not hold {left_out[0]!r}, which is: follow knows what "
            f"truncate_, grow_ and switch replaced, not compress and decompress; {anew}"
        )
    return moves
