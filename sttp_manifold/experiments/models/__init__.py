"""Networks of the tasks. Every weight matrix in them can be compressed, so that rank matters."""

from sttp_manifold.experiments.models.layers import weights
from sttp_manifold.experiments.models.small import EntryModel, digits_mlp, fashion_convnet

__all__ = ["EntryModel", "digits_mlp", "fashion_convnet", "weights"]
