"""Generator and discriminator of SNGAN, the residual networks of its paper.

Upsampling is bilinear and convolutions have biases, as in the experiments of [STTP]. What holds the
discriminator's weights (spectral normalization, a spectral layer) is put on afterwards.

References:
    Miyato, Kataoka, Koyama & Yoshida, *Spectral normalization for generative adversarial networks*,
    2018, Appendix B.4, Figure 9 and Tables 4 (32 x 32) and 5 (48 x 48).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.fx
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.models.sizes import check_images, check_sizes, check_vectors

__all__ = ["SNGANDiscriminator", "SNGANGenerator"]

torch.fx.wrap("check_images")
torch.fx.wrap("check_vectors")


@dataclass(frozen=True)
class _Preset:
    """Networks for one size of image; widths as fractions of the largest one.

    Attributes:
        bottom: height and width of the generator's first image.
        generator: channels of that image, and behind each block that doubles its size.
        ngf: channels that 1 stands for in the generator.
        discriminator: channels behind each block.
        ndf: channels that 1 stands for in the discriminator.
        down: the first so many blocks halve height and width.
    """

    bottom: int
    generator: tuple[float, ...]
    ngf: int
    discriminator: tuple[float, ...]
    ndf: int
    down: int


_TABLE_4 = ((1.0,) * 4, 128, 2)
# Tables 4 and 5 have 32 and 48 pixels; below, the generator has a block less.
_PRESETS = {
    16: _Preset(4, (1.0,) * 3, 256, *_TABLE_4),
    28: _Preset(7, (1.0,) * 3, 256, *_TABLE_4),
    32: _Preset(4, (1.0,) * 4, 256, *_TABLE_4),
    48: _Preset(6, (1.0, 1 / 2, 1 / 4, 1 / 8), 512, (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0), 1024, 4),
}


def _preset(size: int) -> _Preset:
    if size not in _PRESETS:
        raise ConfigError(
            f"no SNGAN for images of {size!r} pixels; the sizes are "
            f"{', '.join(map(str, _PRESETS))}. Others are made from their widths"
        )
    return _PRESETS[size]


def _scaled(fractions: Sequence[float], largest: int, name: str) -> tuple[int, ...]:
    check_sizes(f"{name}=64", **{name: largest})
    least = round(1 / min(fractions))
    if largest % least:
        raise ConfigError(f"{name} must be a multiple of {least} at this size, got {largest}")
    return tuple(round(f * largest) for f in fractions)


def _start(model: nn.Module) -> None:
    """Weights of Glorot & Bengio (2010), sqrt(2) times as large on residual branches; no biases."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            branch = name.rpartition(".")[2] in ("conv1", "conv2")
            nn.init.xavier_uniform_(module.weight, math.sqrt(2) if branch else 1.0)
            assert module.bias is not None
            nn.init.zeros_(module.bias)


class GeneratorBlock(nn.Module):
    """Norm, ReLU, upsampling, convolution, norm, ReLU, convolution; a 1 x 1 shortcut beside them.

    The shortcut is convolved before it is upsampled: the two commute, and there are fewer pixels.

    Shape:
        - x: ``(n, c_in, h, w)``
        - output: ``(n, c_out, 2 h, 2 w)``
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.conv1(_doubled(self.norm1(x).relu()))
        residual: Tensor = self.conv2(self.norm2(y).relu())
        return residual + _doubled(self.shortcut(x))


def _doubled(x: Tensor) -> Tensor:
    return interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class SNGANGenerator(nn.Module):
    """From a normal vector to an image between -1 and 1.

    A linear layer, blocks that each double height and width, norm, ReLU, convolution, tanh.

    Args:
        widths: channels behind the linear layer and behind each block.
        bottom: height and width behind the linear layer.
        channels: of the images.
        latent: length of the vector.

    Shape:
        - z: ``(n, latent)``
        - output: ``(n, channels, size, size)`` with ``size = bottom * 2 ** (len(widths) - 1)``

    Raises:
        ConfigError: no widths, or a size that is no positive integer.

    References:
        Miyato et al., *Spectral normalization for generative adversarial networks*, 2018, Tables 4
        and 5; bilinear upsampling as in Obukhov et al. 2021.

    Example:
        >>> SNGANGenerator((32, 16), bottom=4, channels=1).size
        8
    """

    def __init__(
        self, widths: Sequence[int], bottom: int, channels: int = 3, latent: int = 128
    ) -> None:
        super().__init__()
        example = "SNGANGenerator((256, 256, 256, 256), bottom=4)"
        if not widths:
            raise ConfigError(f"widths is empty; as in {example}")
        sizes = {f"widths[{k}]": width for k, width in enumerate(widths)}
        check_sizes(example, bottom=bottom, channels=channels, latent=latent, **sizes)
        self.widths, self.bottom, self.latent = tuple(widths), bottom, latent
        self.linear = nn.Linear(latent, widths[0] * bottom**2)
        self.blocks = nn.Sequential(*(GeneratorBlock(a, b) for a, b in pairwise(widths)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1)
        _start(self)

    @classmethod
    def for_images(
        cls, size: int, channels: int = 3, *, ngf: int | None = None, latent: int = 128
    ) -> SNGANGenerator:
        """The published network for 32 or 48 pixels, or its like for 16 or 28.

        Args:
            size: height and width of the images.
            channels: of the images.
            ngf: channels behind the linear layer; 256, and 512 for 48 pixels.
            latent: length of the normal vector.

        Raises:
            ConfigError: another size, or an ``ngf`` that its widths do not divide.
        """
        preset = _preset(size)
        widths = _scaled(preset.generator, preset.ngf if ngf is None else ngf, "ngf")
        return cls(widths, preset.bottom, channels, latent)

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.bottom << (len(self.widths) - 1)

    def forward(self, z: Tensor) -> Tensor:
        """Images of normal vectors.

        Shape:
            - z: ``(n, latent)``
            - output: ``(n, channels, size, size)``

        Raises:
            ShapeError: vectors of another length.
        """
        check_vectors(z, self.latent)
        x = self.linear(z).unflatten(1, (self.widths[0], self.bottom, self.bottom))
        image: Tensor = self.conv(self.norm(self.blocks(x)).relu())
        return image.tanh()


class DiscriminatorBlock(nn.Module):
    """ReLU, convolution, ReLU, convolution, average pooling; a 1 x 1 shortcut beside them.

    The first block of a network has no first ReLU. There is a shortcut of its own where the size or
    the channels change; it is pooled before it is convolved, for the two commute.

    Shape:
        - x: ``(n, c_in, h, w)``
        - output: ``(n, c_out, h / 2, w / 2)`` if ``down``, else ``(n, c_out, h, w)``
    """

    def __init__(self, c_in: int, c_out: int, *, down: bool, first: bool) -> None:
        super().__init__()
        self.down, self.first = down, first
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if down or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = x if self.first else x.relu()
        y = self.conv2(self.conv1(y).relu())
        if self.down:
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        return y + (x if self.shortcut is None else self.shortcut(x))


class SNGANDiscriminator(nn.Module):
    """From an image to one number: blocks, ReLU, the sum over all pixels, a linear layer.

    Args:
        widths: channels behind each block.
        down: the first so many blocks halve height and width.
        channels: of the images.

    Shape:
        - x: ``(n, channels, h, w)``, ``h`` and ``w`` multiples of ``2 ** down``
        - output: ``(n, 1)``

    Raises:
        ConfigError: no widths, more halvings than blocks, or a size that is no positive integer.

    References:
        Miyato et al., *Spectral normalization for generative adversarial networks*, 2018, Tables 4
        and 5.

    Example:
        >>> sum(p.numel() for p in SNGANDiscriminator.for_images(32).parameters())
        1053825
    """

    def __init__(self, widths: Sequence[int], down: int, channels: int = 3) -> None:
        super().__init__()
        example = "SNGANDiscriminator((128, 128, 128, 128), down=2)"
        sizes = {f"widths[{k}]": width for k, width in enumerate(widths)}
        check_sizes(example, channels=channels, **sizes)
        if not widths or down not in range(len(widths) + 1):
            raise ConfigError(
                f"{len(widths)} blocks, of which {down!r} halve the image; as in {example}"
            )
        self.channels, self.down = channels, int(down)
        blocks = [
            DiscriminatorBlock(a, b, down=k < down, first=k == 0)
            for k, (a, b) in enumerate(pairwise((channels, *widths)))
        ]
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(widths[-1], 1)
        _start(self)

    @classmethod
    def for_images(
        cls, size: int, channels: int = 3, *, ndf: int | None = None
    ) -> SNGANDiscriminator:
        """The published network for 32 or 48 pixels, or that of 32 for 16 or 28.

        Args:
            size: height and width of the images.
            channels: of the images.
            ndf: channels of the last block; 128, and 1024 for 48 pixels.

        Raises:
            ConfigError: another size, or an ``ndf`` that its widths do not divide.
        """
        preset = _preset(size)
        widths = _scaled(preset.discriminator, preset.ndf if ndf is None else ndf, "ndf")
        return cls(widths, preset.down, channels)

    def forward(self, x: Tensor) -> Tensor:
        """One number an image, large where it looks real.

        Shape:
            - x: ``(n, channels, h, w)``
            - output: ``(n, 1)``

        Raises:
            ShapeError: images of another number of channels, or whose size cannot be halved.
        """
        check_images(x, self.channels, 1 << self.down)
        score: Tensor = self.linear(self.blocks(x).relu().sum((-2, -1)))
        return score
