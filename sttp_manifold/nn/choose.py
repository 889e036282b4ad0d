"""Which layers of a network are meant, by names, wildcards, classes, predicates; their ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.weights_of import held_of
from sttp_manifold.tt.factors import positive_integer

__all__ = ["Choice", "Ranks", "chosen", "own_tensors", "rank_rule"]

One: TypeAlias = "str | type[nn.Module] | Callable[[str, nn.Module], bool]"
Choice: TypeAlias = "One | Iterable[One]"
Ranks: TypeAlias = "int | Mapping[str, int] | Callable[[str, nn.Module], int | None]"


def chosen(model: nn.Module, argument: str, choice: Choice, ends: bool = False) -> set[nn.Module]:
    """Modules that a choice means, with all that is in them.

    Args:
        model: the network.
        argument: what the choice was given as, for errors.
        choice: one or several of: a qualified name; a wildcard over names, in which ``*`` takes
            dots as well; a class; a function of name and module that says yes or no.
        ends: whether a name also means those that end with it after a dot.

    Raises:
        ConversionError: a name or wildcard that this network has nothing for, or something else.
    """
    names = [(n, m) for n, m in model.named_modules(remove_duplicate=False)]
    wanted = [choice] if isinstance(choice, (str, type)) or callable(choice) else list(choice)
    found: set[nn.Module] = set()
    for one in wanted:
        if isinstance(one, str):
            tails = (f".{one}",) if ends else ()
            these = [m for n, m in names if n == one or n.endswith(tails) or fnmatchcase(n, one)]
            if not these:
                raise _unknown(argument, one, names)
        elif isinstance(one, type):
            these = [m for _, m in names if isinstance(m, one)]
        elif callable(one):
            these = [m for n, m in names if one(n, m)]
        else:
            raise ConversionError(
                f"{argument} takes names, wildcards, classes of modules and functions of name and "
                f"module, as in {argument}=['head', 'blocks.*.mlp', nn.Embedding], got {one!r}"
            )
        found.update(inner for module in these for inner in module.modules())
    return found


def _unknown(argument: str, name: str, names: Iterable[tuple[str, nn.Module]]) -> ConversionError:
    there = [repr(n) for n, m in names if held_of(m) or any(p.ndim > 1 for p in own_tensors(m))]
    more = f" and {len(there) - 40} more" if len(there) > 40 else ""
    return ConversionError(
        f"{argument} names {name!r}, which this network does not have; its layers are "
        f"{', '.join(there[:40]) or 'none'}{more}",
        layer=name,
    )


def own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters of a module itself that have a shape already."""
    own: list[Any] = [p for p in module._parameters.values() if p is not None]
    return [p for p in own if not nn.parameter.is_lazy(p)]


def rank_rule(model: nn.Module, rank: Ranks) -> Callable[[str, nn.Module], int | None]:
    """The rank of each layer; None for those that have none and are left as they are.

    Args:
        model: the network.
        rank: one for all; a dict of names or wildcards, of which the first counts that means the
            layer or a module that it is in; or a function of name and layer.

    Raises:
        ShapeError: a rank that is no positive integer.
        ConversionError: a name or wildcard that this network has nothing for.
    """
    if isinstance(rank, Mapping):
        rules = [
            (chosen(model, "rank", pattern), positive_integer(value, f"the rank of {pattern!r}"))
            for pattern, value in rank.items()
        ]

        def of_patterns(name: str, layer: nn.Module) -> int | None:
            return next((value for those, value in rules if layer in those), None)

        return of_patterns
    if callable(rank) and not isinstance(rank, int):
        function = rank

        def of_function(name: str, layer: nn.Module) -> int | None:
            value = function(name, layer)
            return None if value is None else positive_integer(value, f"the rank of {name!r}")

        return of_function
    one = positive_integer(rank, "rank")
    return lambda name, layer: one
