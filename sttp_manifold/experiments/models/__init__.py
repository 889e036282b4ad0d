"""Networks: small ones of the tasks, ResNets of small images, and SNGAN.

Every weight matrix in them can be compressed, so that rank matters.
"""

from sttp_manifold.experiments.models.layers import weight_sizes, weights
from sttp_manifold.experiments.models.names import classifier, network
from sttp_manifold.experiments.models.resnet import ResNet, WideResNet
from sttp_manifold.experiments.models.small import EntryModel, digits_mlp, fashion_convnet
from sttp_manifold.experiments.models.sngan import SNGANDiscriminator, SNGANGenerator

__all__ = [
    "EntryModel",
    "ResNet",
    "SNGANDiscriminator",
    "SNGANGenerator",
    "WideResNet",
    "classifier",
    "digits_mlp",
    "fashion_convnet",
    "network",
    "weight_sizes",
    "weights",
]
