"""Pictures of a generator: a grid of images, and strips between two of them; and its file."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sttp_manifold.experiments.models import SNGANGenerator
from sttp_manifold.experiments.specs import derived_seed

__all__ = ["GRID", "STRIPS", "grid_of", "noise", "png_of", "products", "strips_of", "tiled"]

GRID = "samples.png"
STRIPS = "interpolation.png"
GENERATOR = "generator.pt"

_SIDE = 8
_STRIPS = 6
_ZOOM = 2


def noise(count: int, latent: int, seed: int) -> Tensor:
    """Normal vectors, the same on every device.

    Shape:
        - output: ``(count, latent)``, float32, on the CPU
    """
    return torch.randn(count, latent, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def _images(net: SNGANGenerator, z: Tensor) -> Tensor:
    p = next(net.parameters())
    training = net.training
    net.eval()
    out: Tensor = net(z.to(p.device, p.dtype)).float().cpu()
    net.train(training)
    return out


def grid_of(net: SNGANGenerator) -> Tensor:
    """Eight rows of eight images, of the same vectors for every generator.

    Shape:
        - output: ``(channels, 8 size, 8 size)``, in [-1, 1]
    """
    return tiled(_images(net, noise(_SIDE**2, net.latent, derived_seed("grid"))), _SIDE)


def strips_of(net: SNGANGenerator) -> Tensor:
    """Six rows, each from one vector to another along a great circle, in eight images.

    Shape:
        - output: ``(channels, 6 size, 8 size)``, in [-1, 1]
    """
    ends = noise(2 * _STRIPS, net.latent, derived_seed("strips"))
    a, b = ends[:_STRIPS, None], ends[_STRIPS:, None]
    angle = torch.linspace(0, torch.pi / 2, _SIDE)[None, :, None]
    # Normal vectors of many dimensions are about orthogonal, and of one length.
    z = a * angle.cos() + b * angle.sin()
    return tiled(_images(net, z.flatten(0, 1)), _SIDE)


def tiled(images: Tensor, across: int) -> Tensor:
    """Images side by side.

    Shape:
        - images: ``(n, channels, h, w)``
        - output: ``(channels, (n / across) h, across w)``
    """
    n, channels, h, w = images.shape
    rows = images.view(n // across, across, channels, h, w).permute(2, 0, 3, 1, 4)
    return rows.reshape(channels, n // across * h, across * w)


def png_of(image: Tensor) -> bytes:
    """A PNG file of an image, at twice its size.

    Shape:
        - image: ``(channels, h, w)``, one channel or three, in [-1, 1]
    """
    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    picture = Image.fromarray(array.numpy())
    picture = picture.resize((picture.width * _ZOOM, picture.height * _ZOOM), 0)
    out = io.BytesIO()
    picture.save(out, "png")
    return out.getvalue()


def products(
    net: SNGANGenerator, setting: Mapping[str, Any], grid: Tensor, strips: Tensor
) -> dict[str, bytes]:
    """Files of a trained generator, by name: two pictures, and weights with their setting.

    Shape:
        - grid, strips: ``(channels, h, w)``, in [-1, 1]
    """
    out = io.BytesIO()
    state = {name: value.cpu() for name, value in net.state_dict().items()}
    torch.save({"setting": dict(setting), "state": state}, out)
    return {GRID: png_of(grid), STRIPS: png_of(strips), GENERATOR: out.getvalue()}
