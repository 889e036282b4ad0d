"""All weights of a network, forward + backward: together, one by one, and the alternative.

The alternative makes one call of `torch-householder` for each frame shape of the network, its
parameters stacked beforehand, and contracts each chain by a cached `opt_einsum` expression. It is
given the chain twice: as the modes are written (prime factors, the published method) and merged as
this package stores it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import peer
from timing import Comparison, Timer, Work, cells, markdown, parser, started
from torch import Tensor, nn

from sttp_manifold import TTShape
from sttp_manifold.experiments.models import network, weight_sizes
from sttp_manifold.nn import HouseholderWeight, RiemannianWeight, SpectralWeight, together

NETWORKS = {
    "ResNet-20": "resnet-20",
    "ResNet-32": "resnet-32",
    "SNGAN-32 discriminator": "sngan-32-discriminator",
    "WRN-28-10": "wrn-28-10",
}


class Weights(nn.Module):
    """Nothing but the weights of a network: its forward forms all of them."""

    def __init__(self, weights: list[SpectralWeight]) -> None:
        super().__init__()
        self.weights = nn.ModuleList(weights)

    def forward(self) -> list[Tensor]:
        return [weight() for weight in self.weights]


TOGETHER = "together"
ALTERNATIVE = "torch-householder + opt_einsum"
CHAINS = ("merged", "as written")


def step(weights: Callable[[], list[Tensor]], parameters: list[Tensor], g: list[Tensor]) -> None:
    """Form all weights, and the gradients of what they are made of."""
    for parameter in parameters:
        parameter.grad = None
    torch.autograd.backward(weights(), g)


class Alternative:
    """`torch-householder` a frame shape, `opt_einsum` a chain."""

    def __init__(self, shapes: list[TTShape]) -> None:
        householder, self.einsum = peer("torch-householder"), peer("opt_einsum")
        assert householder is not None
        assert self.einsum is not None
        self.orgqr = householder.torch_householder_orgqr
        self.shapes = shapes
        places: dict[tuple[int, int], int] = {}
        self.where = []
        for shape in shapes:
            self.where.append([((d, r), _next(places, (d, r))) for d, r in shape.frame_shapes])
        self.parameters = {
            (d, r): (torch.randn(count, d, r).tril(-1) / d**0.5).requires_grad_()
            for (d, r), count in places.items()
        }
        self.spectra = [torch.ones(shape.rank, requires_grad=True) for shape in shapes]
        self.paths = [self._path(shape) for shape in shapes]

    @staticmethod
    def there() -> bool:
        """Whether both packages are installed."""
        return None not in (peer("torch-householder"), peer("opt_einsum"))

    def _path(self, shape: TTShape) -> Callable[..., Tensor]:
        bonds = [self.einsum.get_symbol(k) for k in range(len(shape.ranks))]
        modes = [self.einsum.get_symbol(100 + k) for k in range(len(shape.ranks) - 1)]
        split = len(shape.out_modes)
        terms = [a + m + b for a, m, b in zip(bonds[:-1], modes, bonds[1:], strict=True)]
        sizes = list(shape.core_shapes)
        terms.insert(split, bonds[split])
        spectrum = (shape.rank,)
        path = ",".join(terms) + "->" + bonds[0] + "".join(modes) + bonds[-1]
        return self.einsum.contract_expression(path, *sizes[:split], spectrum, *sizes[split:])

    def all_parameters(self) -> list[Tensor]:
        return [*self.parameters.values(), *self.spectra]

    def __call__(self) -> list[Tensor]:
        frames = {key: self.orgqr(value).unbind(0) for key, value in self.parameters.items()}
        weights = []
        chains = zip(self.shapes, self.where, self.spectra, self.paths, strict=True)
        for shape, where, s, path in chains:
            cores = []
            split = len(shape.out_modes)
            for k, (key, place) in enumerate(where):
                frame, size = frames[key][place], shape.core_shapes[k]
                cores.append((frame if k < split else frame.mT).reshape(size))
            weights.append(path(*cores[:split], s, *cores[split:]).reshape(shape.d_out, shape.d_in))
        return weights


def _next(places: dict[tuple[int, int], int], key: tuple[int, int]) -> int:
    places[key] = places.get(key, 0) + 1
    return places[key] - 1


def weights_case(
    name: str, rank: int, method: str, timer: Timer, backward: bool = True
) -> Comparison:
    """All weights of one network, by us and, for charts, by the alternative."""
    sizes = weight_sizes(network(NETWORKS[name], device="meta"))
    shapes = [TTShape.for_weight(size, rank) for size in sizes]
    make = {"householder": HouseholderWeight, "riemannian": RiemannianWeight}[method]
    model = Weights([make(shape, init="random") for shape in shapes])
    alone = Weights(list(model.weights))
    together(model)
    g = [torch.randn(shape.d_out, shape.d_in) for shape in shapes]
    parameters = list(model.parameters())
    step(model, parameters, g)
    step(model, parameters, g)
    ours = [p.grad.clone() for p in parameters]
    step(alone, parameters, g)
    for mine, p in zip(ours, parameters, strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-4)

    def work(weights: Callable[[], list[Tensor]], parameters: list[Tensor]) -> Work:
        def forward() -> None:
            with torch.no_grad():
                weights()

        return (lambda: step(weights, parameters, g)) if backward else forward

    competitors: dict[str, Work | None] = {
        TOGETHER: work(model, parameters),
        "one by one": work(alone, parameters),
    }
    if method == "householder":
        for label, chain in zip(CHAINS, ([s.merged for s in shapes], shapes), strict=True):
            other = Alternative(chain) if Alternative.there() else None
            competitors[f"{ALTERNATIVE}, {label}"] = other and work(other, other.all_parameters())
    return timer.compare(competitors)


def main() -> None:
    """Print the table."""
    options = parser(__doc__, turns=15)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--networks", nargs="+", default=list(NETWORKS))
    arguments = options.parse_args()
    timer = started(arguments)
    rows = [
        [name, method, *row]
        for name in arguments.networks
        for method in ("householder", "riemannian")
        for row in cells(weights_case(name, arguments.rank, method, timer))
    ]
    header = ["network", "held by", "who", "median ms", "against ours"]
    print(f"rank {arguments.rank}\n\n{markdown(header, rows, numbers=2)}")


if __name__ == "__main__":
    main()
