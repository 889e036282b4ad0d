"""Networks of the tasks. Every weight matrix in them can be compressed, so that rank matters."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["EntryModel", "digits_mlp", "fashion_convnet"]


def digits_mlp() -> nn.Module:
    """64 - 128 - 64 - 10 with ReLU: weights of 128 x 64, 64 x 128 and 10 x 64.

    Shape:
        in: (n, 64).
        out: (n, 10).
    """
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def fashion_convnet() -> nn.Module:
    """Two convolutions of stride two and two linear layers.

    Shape:
        in: (n, 1, 28, 28).
        out: (n, 10).
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


class EntryModel(nn.Module):
    """A matrix as a model: a place goes in, the entry there comes out.

    The matrix is the weight of a linear layer, so that methods treat it like any other.

    Shape:
        in: (n, 2) rows and columns.
        out: (n,).
    """

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.matrix = nn.Linear(columns, rows, bias=False)

    def forward(self, places: Tensor) -> Tensor:
        """The entries at the places.

        Shape:
            - places: ``(n, 2)``, rows and columns
            - output: ``(n,)``
        """
        weight: Tensor = self.matrix.weight
        return weight[places[:, 0], places[:, 1]]
