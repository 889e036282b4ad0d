"""`SpectralEmbedding`, and what tables have in common: rows are looked up, not formed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sttp_manifold._arguments import explained
from sttp_manifold.errors import ConversionError, ShapeError
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.recipe import WeightOptions, takes
from sttp_manifold.nn.torch_state import outside_autocast
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.tt.contract import right_matrix, scaled_left
from sttp_manifold.tt.lookup import look_up, lookup_plan

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["SpectralEmbedding", "Table"]

# Indices of a batch, where they are not to be counted.
_USUAL = 1024


class Table(SpectralLayer):
    r"""A table of vectors, ``W`` with a row for each index.

    A row is :math:`W_i = (U S)_i V^\top`: the rows of :math:`U S` at the indices are contracted
    core by core, or taken from the whole of it where that is cheaper, and multiplied by
    :math:`V^\top`.

    Attributes:
        padding_row: what an index of padding gives, ``(embedding_dim,)``: the row that the stock
            layer had, zero in most, which training leaves alone. None without ``padding_idx``, and
            where another layer shares the weight: then it is the row of the weight, which the other
            layer trains, and lookups pass no gradient to it, as torch has it.
        settings: names of what torch's constructor takes beside the sizes.
    """

    settings: ClassVar[tuple[str, ...]] = ("padding_idx", "scale_grad_by_freq")
    bias = None
    own_buffers = ("padding_row",)

    spectral_weight: SpectralWeight
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    scale_grad_by_freq: bool
    padding_row: Tensor | None

    # Of the stock layer, for the way back; without meaning as long as there is no max_norm.
    norm_type: float = 2.0

    def _make(
        self,
        sizes: tuple[int, int],
        settings: Mapping[str, Any],
        rank: int | None,
        weight: Any,
        options: Mapping[str, Any],
        **where: Any,
    ) -> None:
        """Set all that a constructor is given: sizes, settings, and the weight."""
        _check_padding(type(self).__name__, settings["padding_idx"], sizes[0])
        stock: Any = self._kind().stock(*sizes, **settings, device="meta")
        for name in ("num_embeddings", "embedding_dim", *self.settings):
            setattr(self, name, getattr(stock, name))
        if weight is None:
            # With frames next to an identity nearly all rows would start at zero.
            options = {"init": "random", **options}
        self._hold(self.weight_shape, rank, weight, None, options, **where)
        row = None
        if self.padding_idx is not None and weight is None:
            held = self.spectral_weight
            row = torch.zeros(self.embedding_dim, dtype=held.dtype, device=held.device)
        self.register_buffer("padding_row", row)

    @classmethod
    def _around(cls, layer: Any, weights: Mapping[str, Any]) -> Self:
        settings = {name: getattr(layer, name) for name in cls.settings}
        made = cls(layer.num_embeddings, layer.embedding_dim, **settings, weight=weights["weight"])
        return made._keep(layer)

    def _stock(self) -> Any:
        return self._kind().stock(
            self.num_embeddings,
            self.embedding_dim,
            norm_type=self.norm_type,
            **{name: getattr(self, name) for name in self.settings},
            device="meta",
        )

    def _keep(self, layer: Any) -> Self:
        """Keep what a stock layer says of its rows."""
        for name, harmless, why in (
            ("max_norm", None, "shortens rows of a stored table in place"),
            ("sparse", False, "needs a gradient for each row, and the parameters here are no rows"),
        ):
            if getattr(layer, name) != harmless:
                raise ConversionError(
                    f"this {type(layer).__name__} has {name}={getattr(layer, name)!r}, which "
                    f"{why}; set layer.{name} = {harmless} before, or convert the network without "
                    "this layer (skip=[its name])"
                )
        self.norm_type = layer.norm_type
        if self.padding_idx is not None:
            self.padding_row = layer.weight.detach()[self.padding_idx].clone()
        return self

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stock layer's weight, ``(num_embeddings, embedding_dim)``."""
        return (self.num_embeddings, self.embedding_dim)

    @property
    def weight(self) -> Tensor:
        """The table, ``(num_embeddings, embedding_dim)``, formed at each call; differentiable."""
        table = self.spectral_weight()
        if self.padding_row is None:
            return table
        place = torch.tensor([self.padding_idx], device=table.device)
        return table.index_copy(0, place, self.padding_row.to(table.dtype).unsqueeze(0))

    def _shared(self) -> None:
        # Another layer has the row of the weight, and the table can have but one.
        self.padding_row = None

    @property
    def _is_alone(self) -> bool:
        return self.padding_row is not None

    @torch.inference_mode(False)
    @torch.no_grad()
    def dense_layer(self) -> Any:
        """See the base class; the row for padding is as it is looked up."""
        layer = super().dense_layer()
        if self.padding_row is not None:
            layer.weight[self.padding_idx] = self.padding_row
        return layer

    def form_together(self, weight: SpectralWeight) -> str:
        """See the base class: ``U`` is not formed where it consists of several cores."""
        form = super().form_together(weight)
        several = len(weight.shape.merged.out_modes) > 1
        return "cores" if form == "factors" and several else form

    def _form(self, x: object) -> str:
        shape = self.spectral_weight.shape.merged
        count = x.numel() if isinstance(x, Tensor) else 1
        if lookup_plan(shape, count).name == "dense":
            return "dense"
        return "cores" if len(shape.out_modes) > 1 else "factors"

    def _halves(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of ``U S`` at indices and ``V^T``; or rows of ``W``, and None.

        Shape:
            - index: ``(P,)``
            - first: ``(P, r)`` or ``(P, embedding_dim)``
            - second: ``(r, embedding_dim)``
        """
        weight, form = self.spectral_weight, self._form_for(index)
        if form == "dense":
            return nn.functional.embedding(index, weight()), None
        if form in ("factors", "rows"):
            us, vt = weight.factors()
            return nn.functional.embedding(index, us), vt
        tt = weight.tt()
        # What follows from the number of indices would be frozen, or compiled anew for each.
        fixed = torch.compiler.is_compiling() or torch.jit.is_tracing()
        formed = lookup_plan(weight.shape.merged, _USUAL if fixed else index.shape[0]).formed
        return look_up(scaled_left(tt.left, tt.spectrum), index, formed), right_matrix(tt.right)

    def _flat(self, x: object) -> Tensor:
        """Indices in one dimension."""
        if isinstance(x, Tensor) and x.dtype in (torch.int64, torch.int32):
            return x.flatten()
        raise ShapeError(
            f"{type(self).__name__} takes a tensor of indices of dtype int64 or int32, as in "
            f"x.long(); got {x.dtype if isinstance(x, Tensor) else type(x).__name__}"
        )

    def _scaled_by_frequency(self, rows: Tensor, index: Tensor) -> Tensor:
        """The same rows, whose gradient is divided by how often each index occurs."""
        if not self.scale_grad_by_freq:
            return rows
        counts = rows.new_zeros(self.num_embeddings)
        counts = counts.index_add(0, index, torch.ones_like(index, dtype=rows.dtype))
        return torch.lerp(rows.detach(), rows, counts[index].reciprocal().unsqueeze(-1))

    def extra_repr(self) -> str:
        """As torch's, with rank, method and spectrum."""
        text = f"{self.num_embeddings}, {self.embedding_dim}"
        if self.padding_idx is not None:
            text += f", padding_idx={self.padding_idx}"
        if self.scale_grad_by_freq:
            text += ", scale_grad_by_freq=True"
        return f"{text}, {self._weight_repr()}"


def _check_padding(caller: str, padding_idx: int | None, count: int) -> None:
    """Raise for padding that is none of so many rows.

    Raises:
        ShapeError: such an index.
    """
    if padding_idx is not None and not -count <= padding_idx < count:
        raise ShapeError(
            f"padding_idx of {caller} is one of the {count} rows, from {-count} to {count - 1}; "
            f"got {padding_idx}"
        )


class SpectralEmbedding(Table):
    r"""A table of vectors for tokens, of which those asked for are computed.

    The rank bounds the dimension that the vectors span. The same weight may serve an output layer
    (``SpectralLinear(..., weight=embedding.spectral_weight)``); :func:`compress` keeps such ties.

    Args:
        num_embeddings: number of vectors.
        embedding_dim: size of each.
        rank: rank of all bonds, lowered where a bond cannot carry it.
        padding_idx: an index that gives a constant vector, zero in a new layer, which training
            leaves alone.
        scale_grad_by_freq: divide the gradient of a vector by how often it occurs in the batch.
        weight: a weight to use, perhaps shared, instead of making one. Padding then gives its row.
        dtype: floating dtype.
        device: device.
        **options: those of a weight (:class:`Recipe`): ``kind``, ``method``, ``spectrum``,
            ``init`` (``"random"`` by default), ``bound``, ``init_std``, ``project``.

    Shape:
        - input: ``(*)``, integers
        - output: ``(*, embedding_dim)``

    Raises:
        ShapeError: sizes or ranks that are not positive integers, an unknown ``kind`` or ``init``,
            a ``weight`` of another size or rank, or a ``padding_idx`` that is no row.
        ConversionError: an unknown ``method``, or a ``weight`` beside options that make one.
        SpectrumError: an unknown ``spectrum``.

    References:
        [STTP] Sec. 3 (spectral tensor trains in layers).

    Example:
        >>> layer = SpectralEmbedding(1000, 64, rank=8, padding_idx=0)
        >>> layer(torch.tensor([[5, 7, 0]])).shape
        torch.Size([1, 3, 64])
    """

    stock = nn.Embedding

    @explained
    @takes(WeightOptions, init="random")
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int | None = None,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        *,
        weight: SpectralWeight | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Unpack[WeightOptions],
    ) -> None:
        super().__init__()
        settings = {"padding_idx": padding_idx, "scale_grad_by_freq": scale_grad_by_freq}
        sizes = (num_embeddings, embedding_dim)
        self._make(sizes, settings, rank, weight, options, dtype=dtype, device=device)

    def _thin(self) -> nn.Sequential | None:
        row, rank = self.padding_row, self.spectral_weight.shape.rank
        if self.scale_grad_by_freq or (row is not None and bool(row.any())):
            return None
        first = nn.Embedding(self.num_embeddings, rank, self.padding_idx, device="meta")
        second = nn.Linear(rank, self.embedding_dim, bias=False, device="meta")
        return nn.Sequential(first, second)

    thin_roles = ("us", "v")

    def _thin_factors(self, us: Tensor, vt: Tensor) -> tuple[Tensor, Tensor]:
        if self.padding_row is not None:
            us = us.clone()
            us[self.padding_idx] = 0
        return us, vt.mT

    def forward(self, x: Tensor) -> Tensor:
        """The vectors of indices.

        Shape:
            - x: ``(*)``, integers
            - output: ``(*, embedding_dim)``

        Raises:
            ShapeError: indices that are no integers.
        """
        index = self._flat(x)
        with outside_autocast(x.device):  # which leaves the vectors of a stock table alone, too
            rows, vt = self._halves(index)
            rows = rows if vt is None else rows @ vt
        rows = self._scaled_by_frequency(rows, index)
        if self.padding_idx is not None:
            row = rows.detach() if self.padding_row is None else self.padding_row.to(rows.dtype)
            rows = torch.where((index == self.padding_idx).unsqueeze(-1), row, rows)
        return rows.reshape(*x.shape, self.embedding_dim)
