"""`SpectralEmbeddingBag`: sums, means and maxima of rows that are looked up, not formed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ShapeError
from sttp_manifold.nn.embedding import Table
from sttp_manifold.nn.recipe import WeightOptions, takes
from sttp_manifold.nn.torch_state import outside_autocast
from sttp_manifold.nn.weight import SpectralWeight

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SpectralEmbeddingBag"]


class SpectralEmbeddingBag(Table):
    r"""Sums, means or maxima of vectors of bags of tokens.

    Sums and means are taken in the ``r`` coordinates of the rows of :math:`U S`, and multiplied by
    :math:`V^\top` afterwards: a bag costs what a single vector costs.

    Args:
        num_embeddings: number of vectors.
        embedding_dim: size of each.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        scale_grad_by_freq: divide the gradient of a vector by how often it occurs in the batch; not
            for ``mode="max"``.
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        include_last_offset: whether offsets end with the number of indices.
        padding_idx: an index that bags leave out.
        weight: a weight to use, perhaps shared, instead of making one.
        dtype: floating dtype.
        device: device.
        **options: those of a weight, as for :class:`SpectralEmbedding`.

    Shape:
        - input: ``(b, n)``, or ``(n,)`` with offsets ``(b,)``, integers
        - output: ``(b, embedding_dim)``

    Raises:
        ShapeError: as :class:`SpectralEmbedding`, or an unknown ``mode``.
        ConversionError, SpectrumError: as :class:`SpectralEmbedding`.

    References:
        [STTP] Sec. 3 (spectral tensor trains in layers).

    Example:
        >>> layer = SpectralEmbeddingBag(1000, 64, rank=8, mode="sum")
        >>> layer(torch.tensor([[5, 7, 0], [1, 1, 2]])).shape
        torch.Size([2, 64])
    """

    stock = nn.EmbeddingBag
    settings = (*Table.settings, "mode", "include_last_offset")

    mode: str
    include_last_offset: bool

    @explained
    @takes(WeightOptions, init="random")
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int | None = None,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        weight: SpectralWeight | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[WeightOptions],
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        if mode not in ("sum", "mean", "max"):
            raise ShapeError(f"mode of {caller} is 'sum', 'mean' or 'max', got {mode!r}")
        if scale_grad_by_freq and mode == "max":
            raise ShapeError(f"{caller} has no scale_grad_by_freq for mode='max', as torch has not")
        settings = {
            "padding_idx": padding_idx,
            "scale_grad_by_freq": scale_grad_by_freq,
            "mode": mode,
            "include_last_offset": include_last_offset,
        }
        sizes = (num_embeddings, embedding_dim)
        self._make(sizes, settings, rank, weight, options, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """The vectors of bags.

        Args:
            x: indices.
            offsets: where bags begin, for indices in one dimension.
            per_sample_weights: a factor for each index, for ``mode="sum"``.

        Shape:
            - x: ``(b, n)``, or ``(n,)``, integers
            - offsets: ``(b,)``, integers
            - per_sample_weights: as ``x``
            - output: ``(b, embedding_dim)``

        Raises:
            ShapeError: indices that are no integers, or weights of samples that do not fit.
        """
        index = self._flat(x)
        with outside_autocast(x.device):
            rows, vt = self._halves(index)
            # A maximum is none of coordinates, and a gradient scaled in them would miss V.
            if vt is not None and (self.mode == "max" or self.scale_grad_by_freq):
                rows, vt = rows @ vt, None
            rows = self._scaled_by_frequency(rows, index)
            if x.ndim == 2 and offsets is None:
                bags = self._even_bags(rows.view(*x.shape, rows.shape[-1]), x, per_sample_weights)
            else:
                bags = self._bags(rows, x, offsets, per_sample_weights)
            return bags if vt is None else bags @ vt

    def _even_bags(self, rows: Tensor, x: Tensor, factors: Tensor | None) -> Tensor:
        """What each bag gives of its rows, by operations that have derivatives of every order.

        Shape:
            - rows: ``(b, n, r)``
            - x: ``(b, n)``
        """
        if factors is not None:
            if self.mode != "sum" or factors.shape != x.shape:
                raise ShapeError(
                    f"per_sample_weights are for mode='sum' and of the shape of the indices, "
                    f"{tuple(x.shape)}; got mode={self.mode!r} and {tuple(factors.shape)}"
                )
            rows = rows * factors.unsqueeze(-1)
        if self.padding_idx is None and x.shape[1]:
            if self.mode == "max":
                return rows.max(1).values
            return rows.sum(1) if self.mode == "sum" else rows.mean(1)
        kept = (torch.ones_like(x) if self.padding_idx is None else x != self.padding_idx).bool()
        kept = kept.unsqueeze(-1)
        if self.mode == "max" and x.shape[1]:
            top = rows.masked_fill(~kept, -math.inf).max(1).values
            return torch.where(kept.any(1), top, 0.0)
        total = rows.masked_fill(~kept, 0.0).sum(1)
        return total / kept.sum(1).clamp_min(1) if self.mode == "mean" else total

    def _bags(
        self, rows: Tensor, x: Tensor, offsets: Tensor | None, factors: Tensor | None
    ) -> Tensor:
        """The same for bags of any sizes."""
        places = torch.arange(rows.shape[0], device=rows.device).view(x.shape)
        padding = None
        if self.padding_idx is not None:
            # A row before the others, which torch leaves out.
            padding = 0
            places = torch.where(x == self.padding_idx, 0, places + 1)
            rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
        return nn.functional.embedding_bag(
            places,
            rows,
            offsets if offsets is None else offsets.to(places.dtype),
            mode=self.mode,
            per_sample_weights=factors,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
