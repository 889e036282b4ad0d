"""Chart, product and fixed TT rank: what a step costs, and where each breaks.

``python tests/benchmarks/geometries.py`` prints the table of ``docs/which-geometry.md``;
``--figure docs/figures/which-geometry.png`` draws its figure as well. Competitors take turns in
one process; the table shows medians and their ratio to the cost and gradient of a dense weight.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize as scipy_minimize
from timing import Timer, Work, parser, started
from torch import Tensor

from sttp_manifold import (
    FixedTTRankManifold,
    SpectralTT,
    SpectralTTManifold,
    TTShape,
    minimize,
    tt_svd,
)
from sttp_manifold.chart import HouseholderChart
from sttp_manifold.manifolds.cost import ManifoldCost

SMALL = TTShape(out_modes=(3, 4, 2), in_modes=(2, 5, 3), rank=4)
SHAPES = {
    "64 x 64, rank 16": TTShape.for_matrix(64, 64, rank=16),
    "64 x 576, rank 16": TTShape.for_conv((64, 64, 3, 3), rank=16),
    "512 x 512, rank 32": TTShape.for_matrix(512, 512, rank=32),
}


# -- what a step costs ----------------------------------------------------------------------------


def step_works(shape: TTShape, dtype: torch.dtype) -> dict[tuple[str, str], Work]:
    """Value and gradient, the move to a new point, and a Hessian-vector product."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(shape.d_out, shape.d_in, generator=generator, dtype=dtype)
    tt = tt_svd(target, shape)

    def cost(value: SpectralTT) -> Tensor:
        return (value.to_matrix() - target).square().sum() / 2

    works: dict[tuple[str, str], Work] = {}
    chart = HouseholderChart(shape)
    z = chart.flatten(chart.encode(tt))

    def of_chart(leaf: Tensor) -> Tensor:
        return cost(chart.decode(chart.unflatten(leaf)))

    def chart_gradient() -> Tensor:
        leaf = z.clone().requires_grad_()
        return torch.autograd.grad(of_chart(leaf), leaf)[0]

    slope = chart_gradient()
    works["chart", "gradient"] = chart_gradient
    works["chart", "move"] = lambda: z - 1e-3 * slope
    leaf = z.clone().requires_grad_()
    (field,) = torch.autograd.grad(of_chart(leaf), leaf, create_graph=True)
    works["chart", "Hessian"] = lambda: torch.autograd.grad(field, leaf, slope, retain_graph=True)
    for name, manifold in (
        ("product", SpectralTTManifold(shape)),
        ("fixed rank", FixedTTRankManifold(shape)),
        ("fixed rank, QR", FixedTTRankManifold(shape, retraction="qr")),
    ):
        x, f = manifold.pack(tt), ManifoldCost(manifold, cost)
        g = f.gradient(x)[1]
        y, hessian = manifold.retr(x, -1e-3 * g), f.hessian(x)

        def move(manifold=manifold, x=x, g=g) -> Tensor:
            new = manifold.retr(x, -1e-3 * g)
            return manifold.transp(x, new, g)

        assert y.shape == x.shape
        works[name, "gradient"] = lambda f=f, x=x: f.gradient(x)
        works[name, "move"] = move
        works[name, "Hessian"] = lambda hessian=hessian, g=g: hessian(g)
    W = target.clone().requires_grad_()
    works["dense", "gradient"] = lambda: torch.autograd.grad((W - target).square().sum() / 2, W)
    return works


def print_table(timer: Timer, dtype: torch.dtype) -> None:
    """One row a geometry and plan."""
    print("| weight | geometry | cost and gradient, ms | move and transport, ms | Hessian, ms |")
    print("|---|---|---:|---:|---:|")
    for title, shape in SHAPES.items():
        medians = timer.compare(step_works(shape, dtype))
        for name in dict.fromkeys(name for name, _ in medians):
            cells = [medians.get((name, what)) for what in ("gradient", "move", "Hessian")]
            row = " | ".join("" if c is None else f"{1e3 * c.seconds:.2f}" for c in cells)
            print(f"| {title} | {name} | {row} |")


# -- where each breaks ----------------------------------------------------------------------------


def with_spectrum(shape: TTShape, spectrum: Tensor, seed: int = 0) -> SpectralTT:
    """A weight of random frames and given singular values."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape.d_out, shape.d_in, generator=generator, dtype=torch.float64)
    tt = tt_svd(W, shape)
    return SpectralTT(tt.left, spectrum, tt.right, shape)


def differentials(tt: SpectralTT) -> dict[str, Tensor]:
    """Singular values of the map from unit vectors of each geometry to velocities of ``W``."""
    shape = tt.shape
    found = {}
    for name, spectrum in (("chart", "free"), ("chart, full bond", "full")):
        chart = HouseholderChart(shape, spectrum)
        z = chart.flatten(chart.encode(tt))
        found[name] = torch.linalg.svdvals(
            torch.autograd.functional.jacobian(
                lambda y, chart=chart: chart.decode(chart.unflatten(y)).to_matrix().flatten(), z
            )
        )
    for name, spectrum in (("product", "free"), ("product, full bond", "full")):
        M = SpectralTTManifold(shape, spectrum)
        x = M.pack(tt)
        J = torch.autograd.functional.jacobian(lambda y, M=M: M.unpack(y).to_matrix().flatten(), x)
        eye = torch.eye(M.n_elements, dtype=x.dtype)
        horizontal = M.horizontal(x, M.proju(x, eye))
        basis = torch.linalg.svd(horizontal).U[:, : M.dim]
        found[name] = torch.linalg.svdvals(J @ basis)
    F = FixedTTRankManifold(shape)
    x = F.pack(tt)
    eye = torch.eye(F.n_elements, dtype=x.dtype)
    tangent = F.ambient_vector(x, F.proju(x, eye)).flatten(1)
    found["fixed rank"] = torch.linalg.svdvals(tangent)[: F.dim]
    return found


def curvature(tt: SpectralTT, target: Tensor) -> dict[str, float]:
    """Largest eigenvalue of the Hessian of half the squared distance to ``target``."""

    def cost(value: SpectralTT) -> Tensor:
        return (value.to_matrix() - target).square().sum() / 2

    shape, found = tt.shape, {}
    chart = HouseholderChart(shape)
    z = chart.flatten(chart.encode(tt))
    H = torch.autograd.functional.hessian(lambda y: cost(chart.decode(chart.unflatten(y))), z)
    found["chart"] = float(torch.linalg.eigvalsh(H).abs().max())
    for name, manifold in (
        ("product", SpectralTTManifold(shape)),
        ("fixed rank", FixedTTRankManifold(shape)),
    ):
        x = manifold.pack(tt)
        apply = ManifoldCost(manifold, cost).hessian(x)
        tangent = manifold.proju(x, torch.eye(manifold.n_elements, dtype=x.dtype))
        H = torch.stack([apply(u) for u in tangent])
        found[name] = float(torch.linalg.eigvalsh((H + H.mT) / 2).abs().max())
    return found


def iterations(excess: int, seed: int, limit: int) -> dict[str, int]:
    """Iterations to a residual of 1e-8 where the rank is ``excess`` above that of the data."""
    true = TTShape(out_modes=(4, 4, 4), in_modes=(4, 4, 4), rank=4)
    shape = TTShape(out_modes=(4, 4, 4), in_modes=(4, 4, 4), rank=4 + excess)
    generator = torch.Generator().manual_seed(seed)
    truth = FixedTTRankManifold(true)
    b = truth.unpack(truth.random(dtype=torch.float64, generator=generator).as_subclass(Tensor))
    places = torch.randperm(shape.numel, generator=generator)[: shape.numel // 2]
    i, j = places // shape.d_in, places % shape.d_in
    values = b.entries(i, j)
    scale = values.square().sum()
    F, M = FixedTTRankManifold(shape), SpectralTTManifold(shape)
    start = F.unpack(F.random(dtype=torch.float64, generator=generator).as_subclass(Tensor))

    def cost(tt: SpectralTT) -> Tensor:
        return (tt.entries(i, j) - values).square().sum() / (2 * scale)

    goal, found = 0.5e-16, {}
    for name, manifold, method in (
        ("product, conjugate gradients", M, "conjugate_gradient"),
        ("fixed rank, conjugate gradients", F, "conjugate_gradient"),
        ("fixed rank, trust regions", F, "trust_regions"),
    ):
        result = minimize(
            manifold,
            cost,
            manifold.pack(start),
            method,
            gradient_tolerance=0.0,
            cost_tolerance=goal,
            max_iterations=limit,
        )
        found[name] = result.nit if result.fun <= goal else limit
    chart = HouseholderChart(shape)
    z = chart.flatten(chart.encode(start)).numpy()
    history: list[float] = []

    def value_and_slope(z: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.tensor(z, requires_grad=True)
        value = cost(chart.decode(chart.unflatten(leaf)))
        (slope,) = torch.autograd.grad(value, leaf)
        history.append(float(value.detach()))
        return history[-1], slope.numpy()

    result = scipy_minimize(
        value_and_slope,
        z,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": limit, "maxfun": 2 * limit, "ftol": 0.0, "gtol": 0.0},
        callback=lambda z: _stop_below(goal, history),
    )
    found["chart, L-BFGS (SciPy)"] = result.nit if min(history) <= goal else limit
    return found


def _stop_below(goal: float, history: list[float]) -> None:
    if history[-1] <= goal:
        raise StopIteration


COLORS = {"chart": "C0", "product": "C1", "fixed": "C2"}


def _style(name: str) -> dict[str, str]:
    return {
        "color": COLORS[name.split()[0].rstrip(",")],
        "linestyle": "--" if "full" in name or "trust" in name else "-",
        "marker": "o" if "full" not in name and "trust" not in name else "s",
        "markersize": "4",
    }


def draw(path: Path, seeds: int, limit: int) -> None:
    """The four panels of the page."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")
    one, two, three, four = axes.flat
    gaps = np.logspace(-6, -0.5, 12)
    runs = []
    for gap in gaps:
        s = torch.tensor([2.0, 1.0 + gap, 1.0, 0.5], dtype=torch.float64)
        runs.append(differentials(with_spectrum(SMALL, s)))
    for name in runs[0]:
        one.loglog(gaps, [float(r[name].min()) for r in runs], label=name, **_style(name))
    one.set(
        xlabel="gap between two singular values",
        ylabel="least singular value of the differential",
        title="Where singular values meet",
    )
    ratios = np.logspace(0.3, 5, 12)
    runs = []
    for ratio in ratios:
        s = torch.logspace(0, -float(np.log10(ratio)), 4, dtype=torch.float64)
        runs.append(differentials(with_spectrum(SMALL, s)))
    for name in ("chart", "product", "fixed rank"):
        values = [float(r[name].max() / r[name].min()) for r in runs]
        two.loglog(ratios, values, label=name, **_style(name))
    two.set(
        xlabel="condition number of the weight",
        ylabel="condition number of the differential",
        title="How much a geometry distorts",
    )
    target = torch.randn(24, 30, generator=torch.Generator().manual_seed(1)).double()
    bends = []
    for ratio in ratios:
        s = torch.tensor([1.0, 0.9, 0.8, 1 / ratio], dtype=torch.float64)
        bends.append(curvature(with_spectrum(SMALL, s), target / target.norm()))
    for name in bends[0]:
        three.loglog(1 / ratios, [b[name] for b in bends], label=name, **_style(name))
    three.set(
        xlabel="least singular value of the weight",
        ylabel="largest eigenvalue of the Hessian",
        title="Near a weight of lower rank",
    )
    excesses = [0, 1, 2, 3]
    counts = [[iterations(e, seed, limit) for seed in range(seeds)] for e in excesses]
    for name in counts[0][0]:
        four.semilogy(
            excesses,
            [statistics.median(c[name] for c in row) for row in counts],
            label=name,
            **_style(name),
        )
    four.axhline(limit, color="0.7", linewidth=1)
    four.text(0, limit, "not reached", va="bottom", color="0.4", fontsize=8)
    four.set(
        xlabel="ranks above those of the data",
        ylabel="iterations to a residual of 1e-8",
        title="Completion of a 64 x 64 matrix from half of it",
        xticks=excesses,
    )
    four.set_ylim(bottom=2)  # room for the legend
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower right" if axis is four else "best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    for excess, row in zip(excesses, counts, strict=True):
        medians = {name: statistics.median(c[name] for c in row) for name in row[0]}
        print(f"excess {excess}: {medians}")


def main() -> None:
    """Print the table, and draw the figure where asked to."""
    options = parser(__doc__, turns=20)
    options.add_argument("--figure", type=Path, help="where to draw the figure")
    options.add_argument("--seeds", type=int, default=3, help="seeds of the fourth panel")
    options.add_argument("--limit", type=int, default=2000, help="iterations before giving up")
    arguments = options.parse_args()
    timer = started(arguments)
    if arguments.figure:
        draw(arguments.figure, arguments.seeds, arguments.limit)
    print_table(timer, torch.float32)


if __name__ == "__main__":
    main()
