"""Ranks of a chain: what its modes can carry, and which of its cores carry nothing of their own."""

from __future__ import annotations

from collections.abc import Sequence

from sttp_manifold.errors import RankError, ShapeError

__all__ = ["check_ranks", "clip_ranks", "merge_square"]


def clip_ranks(modes: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    """Largest admissible ranks that are at most ``wanted``."""
    ranks = list(wanted)
    for k, mode in enumerate(modes):
        ranks[k + 1] = min(ranks[k + 1], ranks[k] * mode)
    for k in range(len(modes) - 1, -1, -1):
        ranks[k] = min(ranks[k], ranks[k + 1] * modes[k])
    return tuple(ranks)


def check_ranks(modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Refuse ranks that the modes of a chain cannot carry.

    Raises:
        ShapeError: a wrong number of ranks.
        RankError: a rank over what its bond can carry, or an outer one that is not 1.
    """
    if len(ranks) != len(modes) + 1:
        raise ShapeError(
            f"{len(modes)} modes {modes} have {len(modes) + 1} ranks, the outer two being 1; "
            f"got {len(ranks)} ranks {ranks}"
        )
    for bond in (0, len(modes)):
        if ranks[bond] != 1:
            raise RankError(
                f"the outer ranks are 1, got {ranks[bond]} at bond {bond} of ranks {ranks}",
                bond=bond,
                rank=ranks[bond],
                bound=1,
            )
    for bond in range(1, len(modes)):
        left = ranks[bond - 1] * modes[bond - 1]
        right = ranks[bond + 1] * modes[bond]
        if ranks[bond] > min(left, right):
            raise RankError(
                f"rank {ranks[bond]} at bond {bond} is over {min(left, right)}, the most that "
                f"modes {modes[bond - 1]} and {modes[bond]} with neighbouring ranks "
                f"{ranks[bond - 1]} and {ranks[bond + 1]} can carry; rank={max(ranks)} instead "
                "of ranks=... lowers ranks where needed",
                bond=bond,
                rank=ranks[bond],
                bound=min(left, right),
            )


def merge_square(
    modes: Sequence[int], ranks: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Modes and ranks of a half chain, outermost first, whose square cores have been merged."""
    merged_modes, merged_ranks, mode = [], [ranks[0]], 1
    for k, size in enumerate(modes):
        mode *= size
        is_square = merged_ranks[-1] * mode == ranks[k + 1]
        if is_square and k < len(modes) - 1:
            continue
        merged_modes.append(mode)
        merged_ranks.append(ranks[k + 1])
        mode = 1
    return tuple(merged_modes), tuple(merged_ranks)
