"""Residual networks of small images: ResNet-20, -32, ..., and the wide WRN-d-k.

References:
    He, Zhang, Ren & Sun, *Deep residual learning for image recognition*, 2016, Sec. 4.2 (ResNet);
    Zagoruyko & Komodakis, *Wide residual networks*, 2016, Table 1 (WRN).
"""

from __future__ import annotations

from itertools import pairwise

import torch.fx
from torch import Tensor, nn
from torch.nn.functional import pad

from sttp_manifold.errors import ConfigError
from sttp_manifold.experiments.models.sizes import check_images, check_sizes

__all__ = ["ResNet", "WideResNet"]

torch.fx.wrap("check_images")


def _conv(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


def _blocks_a_group(name: str, depth: int, rest: int) -> int:
    """Blocks of two convolutions in each of three groups, for ``depth = 6 n + rest``."""
    check_sizes(f"{name}({18 + rest}, ...)", depth=depth)
    blocks, left = divmod(depth - rest, 6)
    if left or blocks < 1:
        depths = ", ".join(str(6 * n + rest) for n in (1, 2, 3))
        raise ConfigError(
            f"the depth of a {name} is 6 n + {rest} layers ({depths}, ...), got {depth}"
        )
    return blocks


def _start(model: nn.Module) -> None:
    """Weights of He et al. (2015), by the number of outputs; the linear layer as torch has it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """Two convolutions with batch norms; the shortcut is padded with zeros where channels grow.

    Shape:
        - x: ``(n, c_in, h, w)``
        - output: ``(n, c_out, ceil(h / stride), ceil(w / stride))``
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.grown = stride, c_out - c_in
        self.conv1 = _conv(c_in, c_out, stride)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = _conv(c_out, c_out)
        self.norm2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        shortcut = x[..., :: self.stride, :: self.stride]
        return (y + pad(shortcut, (0, 0, 0, 0, 0, self.grown))).relu()


class ResNet(nn.Module):
    """ResNet of ``6 n + 2`` layers, shortcuts without parameters (option A of the paper).

    For colour images and ten classes it has 0.27 M parameters at depth 20, 0.46 M at 32,
    0.66 M at 44, 0.85 M at 56 and 1.7 M at 110.

    Args:
        depth: layers, ``6 n + 2``.
        channels: of the images.
        classes: outputs.
        width: channels of the first group; the others have twice and four times as many.

    Shape:
        - x: ``(n, channels, h, w)``, of any size; 32 x 32 in the paper
        - output: ``(n, classes)``

    Raises:
        ConfigError: another depth, or a size that is no positive integer.

    References:
        He, Zhang, Ren & Sun, *Deep residual learning for image recognition*, 2016, Sec. 4.2.

    Example:
        >>> sum(p.numel() for p in ResNet(20).parameters())
        269722
    """

    def __init__(
        self, depth: int, channels: int = 3, classes: int = 10, *, width: int = 16
    ) -> None:
        super().__init__()
        count = _blocks_a_group("ResNet", depth, 2)
        check_sizes(f"ResNet({depth})", channels=channels, classes=classes, width=width)
        self.channels = channels
        widths = [width, *(width << group for group in range(3) for _ in range(count))]
        self.stem = _conv(channels, width)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(BasicBlock(a, b, b // a) for a, b in pairwise(widths)))
        self.linear = nn.Linear(widths[-1], classes)
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes.

        Shape:
            - x: ``(n, channels, h, w)``
            - output: ``(n, classes)``

        Raises:
            ShapeError: images of another number of channels.
        """
        check_images(x, self.channels)
        scores: Tensor = self.linear(self.blocks(self.norm(self.stem(x)).relu()).mean((-2, -1)))
        return scores


class WideBlock(nn.Module):
    """Norms and ReLUs before the convolutions; a 1 x 1 shortcut where channels change.

    Where there is such a shortcut it begins behind the first ReLU, as the residual branch does.

    Shape:
        - x: ``(n, c_in, h, w)``
        - output: ``(n, c_out, ceil(h / stride), ceil(w / stride))``
    """

    def __init__(self, c_in: int, c_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(c_in)
        self.conv1 = _conv(c_in, c_out, stride)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv(c_out, c_out)
        same = c_in == c_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.norm1(x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(y)
        residual: Tensor = self.conv2(self.dropout(self.norm2(self.conv1(y)).relu()))
        return residual + shortcut


class WideResNet(nn.Module):
    """WRN-d-k: ``d = 6 n + 4`` layers, ``k`` times as wide as a ResNet.

    36.5 M parameters for WRN-28-10, 11.0 M for WRN-16-8, 8.9 M for WRN-40-4, 2.2 M for WRN-40-2.

    Args:
        depth: layers ``d``; the paper counts the three shortcuts, and not the linear layer.
        widen: factor ``k``; the groups have ``16 k``, ``32 k`` and ``64 k`` channels.
        channels: of the images.
        classes: outputs.
        dropout: probability between the convolutions of a block; 0.3 in some of the paper's runs.

    Shape:
        - x: ``(n, channels, h, w)``, of any size; 32 x 32 in the paper
        - output: ``(n, classes)``

    Raises:
        ConfigError: another depth, a size that is no positive integer, or a dropout that is no
            probability below one.

    References:
        Zagoruyko & Komodakis, *Wide residual networks*, 2016, Table 1 and Sec. 2.

    Example:
        >>> sum(p.numel() for p in WideResNet(10, 2).parameters())
        303706
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        channels: int = 3,
        classes: int = 10,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        count = _blocks_a_group("WideResNet", depth, 4)
        example = f"WideResNet({depth}, 10)"
        check_sizes(example, widen=widen, channels=channels, classes=classes)
        if not 0 <= dropout < 1:
            raise ConfigError(
                f"dropout must be a probability below 1, got {dropout!r}; "
                f"as in WideResNet({depth}, {widen}, dropout=0.3)"
            )
        self.channels = channels
        self.stem = _conv(channels, 16)
        blocks, inside = [], 16
        for group in range(3):
            width = 16 * widen << group
            for k in range(count):
                stride = 2 if group and not k else 1
                blocks.append(WideBlock(inside, width, stride, dropout))
                inside = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inside)
        self.linear = nn.Linear(inside, classes)
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes.

        Shape:
            - x: ``(n, channels, h, w)``
            - output: ``(n, classes)``

        Raises:
            ShapeError: images of another number of channels.
        """
        check_images(x, self.channels)
        scores: Tensor = self.linear(self.norm(self.blocks(self.stem(x))).relu().mean((-2, -1)))
        return scores
