"""Weights, layers, and the conversion of whole networks."""

from sttp_manifold.nn.adapted_layer import AdaptedLayer
from sttp_manifold.nn.adapted_tensor import AdaptedTensor
from sttp_manifold.nn.adapter_file import load_adapter, save_adapter
from sttp_manifold.nn.adapter_switches import (
    adapters,
    merge,
    remove_adapter,
    set_adapter,
    unmerge,
    without_adapters,
)
from sttp_manifold.nn.adapting import adapt
from sttp_manifold.nn.aligned import align_adapters
from sttp_manifold.nn.by_name import hold
from sttp_manifold.nn.capture import CapturedStep, capture_step
from sttp_manifold.nn.collapse import CollapseRule, SpectrumAlarm
from sttp_manifold.nn.conv import SpectralConv1d, SpectralConv2d, SpectralConv3d
from sttp_manifold.nn.conv_transpose import (
    SpectralConvTranspose1d,
    SpectralConvTranspose2d,
    SpectralConvTranspose3d,
)
from sttp_manifold.nn.convert import compress, decompress, switch
from sttp_manifold.nn.distributed import keep_whole
from sttp_manifold.nn.embedding import SpectralEmbedding
from sttp_manifold.nn.embedding_bag import SpectralEmbeddingBag
from sttp_manifold.nn.householder import HouseholderWeight
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.left import SkippedLayerWarning
from sttp_manifold.nn.linear import SpectralLinear
from sttp_manifold.nn.linear_transposed import SpectralTransposedLinear
from sttp_manifold.nn.methods import make_weight
from sttp_manifold.nn.monitor import (
    SpectrumCollapseWarning,
    SpectrumMonitor,
    SpectrumReading,
)
from sttp_manifold.nn.penalty import spectral_penalty
from sttp_manifold.nn.ranks import grow_, truncate_
from sttp_manifold.nn.recipe import Recipe
from sttp_manifold.nn.registered import register, unregister
from sttp_manifold.nn.riemannian import OffManifoldWarning, RiemannianWeight
from sttp_manifold.nn.saving import load, save
from sttp_manifold.nn.spectral_update import SpectralUpdate
from sttp_manifold.nn.stack import MatrixView, WeightStack
from sttp_manifold.nn.summary import Summary, SummaryRow, summary
from sttp_manifold.nn.together import together
from sttp_manifold.nn.weight import SpectralWeight
from sttp_manifold.nn.weights_of import weights_of

__all__ = [
    "AdaptedLayer",
    "AdaptedTensor",
    "CapturedStep",
    "CollapseRule",
    "HouseholderWeight",
    "MatrixView",
    "OffManifoldWarning",
    "Recipe",
    "RiemannianWeight",
    "SkippedLayerWarning",
    "SpectralConv1d",
    "SpectralConv2d",
    "SpectralConv3d",
    "SpectralConvTranspose1d",
    "SpectralConvTranspose2d",
    "SpectralConvTranspose3d",
    "SpectralEmbedding",
    "SpectralEmbeddingBag",
    "SpectralLayer",
    "SpectralLinear",
    "SpectralTransposedLinear",
    "SpectralUpdate",
    "SpectralWeight",
    "SpectrumAlarm",
    "SpectrumCollapseWarning",
    "SpectrumMonitor",
    "SpectrumReading",
    "Summary",
    "SummaryRow",
    "WeightStack",
    "adapt",
    "adapters",
    "align_adapters",
    "capture_step",
    "compress",
    "decompress",
    "grow_",
    "hold",
    "keep_whole",
    "load",
    "load_adapter",
    "make_weight",
    "merge",
    "register",
    "remove_adapter",
    "save",
    "save_adapter",
    "set_adapter",
    "spectral_penalty",
    "summary",
    "switch",
    "together",
    "truncate_",
    "unmerge",
    "unregister",
    "weights_of",
    "without_adapters",
]
