"""Networks: published sizes, images of any size, gradients, every layer compressed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, interpolate

from sttp_manifold.errors import ConfigError, ShapeError
from sttp_manifold.experiments.models import (
    ResNet,
    SNGANDiscriminator,
    SNGANGenerator,
    WideResNet,
    classifier,
    network,
    weights,
)
from sttp_manifold.experiments.models.sngan import DiscriminatorBlock, GeneratorBlock
from sttp_manifold.nn import compress, decompress

# He et al. (2016), Table 6; Zagoruyko & Komodakis (2016), Tables 2, 4 and 5: millions.
PUBLISHED = {
    "resnet-20": 0.27,
    "resnet-32": 0.46,
    "resnet-44": 0.66,
    "resnet-56": 0.85,
    "resnet-110": 1.7,
    "wrn-40-1": 0.6,
    "wrn-40-2": 2.2,
    "wrn-40-4": 8.9,
    "wrn-40-8": 35.7,
    "wrn-28-10": 36.5,
    "wrn-28-12": 52.5,
    "wrn-22-8": 17.2,
    "wrn-22-10": 26.8,
    "wrn-16-8": 11.0,
    "wrn-16-10": 17.1,
}


def on_meta(name: str) -> nn.Module:
    return network(name, device="meta")


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    digits = 2 if name.startswith("resnet") and name != "resnet-110" else 1
    assert round(size(on_meta(name)) / 1e6, digits) == PUBLISHED[name]
    depth = int(name.split("-")[1])
    layers = [k for k, m in weights(on_meta(name)).items() if "shortcut" not in k]
    assert len(layers) == (depth if name.startswith("resnet") else depth - 2)


def conv(c_out: int, c_in: int, k: int = 3) -> int:
    return c_out * c_in * k * k + c_out


def test_sizes_of_sngan_by_hand() -> None:
    """Tables 4 and 5 of Miyato et al. (2018), biases included."""
    d32 = conv(128, 3) + conv(128, 3, 1) + 7 * conv(128, 128) + conv(128, 128, 1) + 129
    assert size(on_meta("sngan-32-discriminator")) == d32
    g32 = 4096 * 129 + 3 * (2 * conv(256, 256) + conv(256, 256, 1) + 4 * 256) + 512 + conv(3, 256)
    assert size(on_meta("sngan-32-generator")) == g32
    d48, c_in = 1025, 3
    for width in (64, 128, 256, 512, 1024):
        d48 += conv(width, c_in) + conv(width, width) + conv(width, c_in, 1)
        c_in = width
    assert size(on_meta("sngan-48-discriminator")) == d48
    g48, c_in = 512 * 36 * 129 + 128 + conv(3, 64), 512
    for width in (256, 128, 64):
        g48 += conv(width, c_in) + conv(width, width) + conv(width, c_in, 1) + 2 * (c_in + width)
        c_in = width
    assert size(on_meta("sngan-48-generator")) == g48


CLASSIFIERS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet": lambda channels, classes: ResNet(8, channels, classes, width=4),
    "wide": lambda channels, classes: WideResNet(10, 1, channels, classes, dropout=0.1),
    "wider": lambda channels, classes: classifier("wrn-10-2", channels, classes),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pixels", [(28, 28), (32, 32), (15, 9), (1, 1)])
def test_classifiers_take_images_of_any_size(
    name: str, channels: int, pixels: tuple[int, int]
) -> None:
    model = CLASSIFIERS[name](channels, 7)
    scores = model(torch.randn(2, channels, *pixels))
    assert scores.shape == (2, 7)
    scores.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("pixels", "channels", "ngf", "ndf"),
    [(16, 1, 8, 8), (28, 1, 8, 8), (32, 3, 8, 8), (48, 3, 16, 32)],
)
def test_generator_and_discriminator_fit_each_other(
    pixels: int, channels: int, ngf: int, ndf: int
) -> None:
    generator = SNGANGenerator.for_images(pixels, channels, ngf=ngf, latent=5)
    discriminator = SNGANDiscriminator.for_images(pixels, channels, ndf=ndf)
    images = generator(torch.randn(3, 5))
    assert images.shape == (3, channels, pixels, pixels)
    assert generator.size == pixels
    assert images.abs().max() <= 1
    score = discriminator(images)
    assert score.shape == (3, 1)
    score.sum().backward()
    for model in (generator, discriminator):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def small() -> Iterator[tuple[nn.Module, Tensor]]:
    """One network of each kind, and an input."""
    yield ResNet(8, width=4), torch.randn(2, 3, 8, 8)
    yield WideResNet(10, 1), torch.randn(2, 3, 8, 8)
    yield SNGANDiscriminator.for_images(32, ndf=8), torch.randn(2, 3, 8, 8)
    yield SNGANGenerator.for_images(32, ngf=8, latent=6), torch.randn(2, 6)


def test_networks_can_be_traced_exported_and_compiled() -> None:
    for model, x in small():
        model.eval()
        batch = ({0: torch.export.Dim("batch", min=2)},)
        exported = torch.export.export(model, (x,), dynamic_shapes=batch).module()
        traced = torch.fx.symbolic_trace(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        for other in (exported, traced, compiled):
            for y in (x, torch.cat((x, x, x))):
                torch.testing.assert_close(other(y), model(y))
        with pytest.raises(ShapeError):
            traced(x[:, :1])


def test_networks_run_in_lower_precision_and_channels_last() -> None:
    for model, x in small():
        y = model.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
        assert z.dtype == torch.bfloat16
        torch.testing.assert_close(z.float(), y, atol=0.1, rtol=0.1)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)


def test_double_precision_and_evaluation() -> None:
    for model, x in small():
        model.eval()
        double = copy.deepcopy(model).double()(x.double())
        assert double.dtype == torch.float64
        torch.testing.assert_close(model(x).double(), double, atol=1e-4, rtol=1e-4)


def published_down(block: DiscriminatorBlock, x: Tensor) -> Tensor:
    """Figure 9 of the paper: the shortcut convolved, then pooled."""
    y = block.conv2(block.conv1(x if block.first else x.relu()).relu())
    assert block.shortcut is not None
    return avg_pool2d(y, 2) + avg_pool2d(block.shortcut(x), 2)


def published_up(block: GeneratorBlock, x: Tensor) -> Tensor:
    """Figure 9 of the paper: the shortcut upsampled, then convolved."""

    def up(t: Tensor) -> Tensor:
        return interpolate(t, scale_factor=2, mode="bilinear", align_corners=False)

    y = block.conv1(up(block.norm1(x).relu()))
    return block.conv2(block.norm2(y).relu()) + block.shortcut(up(x))


@pytest.mark.parametrize("first", [True, False])
def test_shortcuts_commute_with_pooling_and_upsampling(first: bool) -> None:
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    down = DiscriminatorBlock(3, 5, down=True, first=first).double()
    nn.init.normal_(down.shortcut.bias)
    torch.testing.assert_close(down(x), published_down(down, x))
    up = GeneratorBlock(3, 5).double()
    nn.init.normal_(up.shortcut.bias)
    torch.testing.assert_close(up(x), published_up(up, x))


def test_the_shortcut_of_a_resnet_has_no_parameters() -> None:
    """Every other pixel, and zeros in the new channels."""
    block = ResNet(8, width=4).blocks[1].eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 6, 6)
    expected = torch.cat((x[:, :, ::2, ::2], torch.zeros(2, 4, 3, 3)), 1).relu()
    torch.testing.assert_close(block(x), expected)


def test_the_shortcut_of_a_wide_block_begins_behind_its_first_relu() -> None:
    block = WideResNet(10, 2).blocks[0].eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 16, 6, 6)
    expected = conv2d(block.norm1(x).relu(), block.shortcut.weight)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("method", ["householder", "riemannian"])
def test_every_layer_can_be_compressed(method: str) -> None:
    for model, x in small():
        layers = weights(model)
        compress(model, rank=2, method=method, grow="allow")
        assert not weights(model)
        model.eval()
        y = model(x)
        y.sum().backward()
        decompress(model)
        assert list(weights(model)) == list(layers)
        torch.testing.assert_close(model(x), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ResNet(18),
            r"the depth of a ResNet is 6 n \+ 2 layers \(8, 14, 20, ...\), got 18",
        ),
        (lambda: ResNet(2), "got 2"),
        (lambda: ResNet(-4), "depth must be a positive integer, got -4; as in ResNet"),
        (lambda: ResNet(20.0), "depth must be a positive integer, got 20.0"),
        (lambda: ResNet(20, classes=0), "classes must be a positive integer, got 0"),
        (lambda: ResNet(20, channels=True), "channels must be a positive integer, got True"),
        (lambda: ResNet(20, width=0), "width must be a positive integer"),
        (lambda: WideResNet(20, 2), r"WideResNet is 6 n \+ 4 layers \(10, 16, 22, ...\), got 20"),
        (lambda: WideResNet(10, 0), "widen must be a positive integer, got 0"),
        (lambda: WideResNet(10, 1, dropout=1.0), "dropout must be a probability below 1, got 1.0"),
        (lambda: SNGANGenerator((), 4), "widths is empty"),
        (lambda: SNGANGenerator((8, 0), 4), r"widths\[1\] must be a positive integer, got 0"),
        (lambda: SNGANGenerator((8,), 4, latent=0), "latent must be a positive integer"),
        (lambda: SNGANGenerator.for_images(64), "no SNGAN for images of 64 pixels; the sizes are"),
        (lambda: SNGANGenerator.for_images(48, ngf=12), "ngf must be a multiple of 8 at this size"),
        (lambda: SNGANDiscriminator.for_images(48, ndf=24), "ndf must be a multiple of 16"),
        (lambda: SNGANDiscriminator.for_images(32, ndf=-1), "ndf must be a positive integer"),
        (lambda: SNGANDiscriminator((), 0), "0 blocks"),
        (lambda: SNGANDiscriminator((8, 8), 3), "2 blocks, of which 3 halve the image"),
        (lambda: classifier("resnet20"), "unknown model 'resnet20'; expected resnet-D or wrn-D-K"),
        (
            lambda: network("sngan-32"),
            "unknown network 'sngan-32'; expected resnet-D, wrn-D-K, sngan",
        ),
        (lambda: network("wrn-28"), "unknown model 'wrn-28'"),
    ],
)
def test_sizes_that_make_no_network(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (
            ResNet(8),
            torch.zeros(2, 1, 8, 8),
            r"images of shape \(n, 3, height, width\), got \(2, 1",
        ),
        (WideResNet(10, 1), torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
        (SNGANDiscriminator((4, 4), 2), torch.zeros(2, 3, 8, 6), "multiples of 4, got 8 x 6"),
        (SNGANDiscriminator((4, 4), 0), torch.zeros(2, 3, 0, 6), "got 0 x 6"),
        (SNGANGenerator((4,), 4, latent=8), torch.zeros(2, 7), r"\(n, 8\), got \(2, 7\)"),
    ],
)
def test_images_that_do_not_fit(model: nn.Module, x: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        model(x)


def test_networks_start_with_signals_of_moderate_size() -> None:
    torch.manual_seed(0)
    for model in (ResNet(20), WideResNet(16, 2)):
        assert 0.05 < model(torch.randn(16, 3, 16, 16)).std() < 20
    generator, discriminator = SNGANGenerator.for_images(32), SNGANDiscriminator.for_images(32)
    images = generator(torch.randn(8, 128))
    assert 0.05 < images.std() < 0.95
    assert discriminator(images).isfinite().all()
