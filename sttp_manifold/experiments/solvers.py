"""The solvers: methods that take a problem whole and stop when it is solved.

They are methods like those that train, in the same registry; a task that has a problem is what they
apply to.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sttp_manifold.chart import HouseholderChart
from sttp_manifold.experiments.runs.solve import Solve, Solver
from sttp_manifold.experiments.runs.watch import Watch
from sttp_manifold.experiments.task import Problem
from sttp_manifold.manifolds import FixedTTRankManifold, SpectralTTManifold
from sttp_manifold.optim import minimize
from sttp_manifold.tt import SpectralTT, TTShape

__all__ = ["SOLVERS", "Solve", "Solver", "on_manifold"]

# Of a result of `minimize`: its callback ended it.
_BY_CALLBACK = 6

# --- On our manifolds ---


def on_manifold(make: Callable[[TTShape], Any], method: str, **options: Any) -> Solve:
    """What a solver does that is :func:`~sttp_manifold.minimize` on a manifold of weights.

    Args:
        make: the manifold of a plan, with ``pack`` and ``unpack``.
        method: of ``minimize``.
        options: of that method.
    """

    def solve(problem: Problem, watch: Watch) -> str | None:
        manifold = make(problem.start.shape)
        watch.stores(manifold.n_elements)
        state = watch.state
        again = state is not None

        def cost(tt: SpectralTT) -> Tensor:
            nonlocal again
            # Where it goes on, the solver asks once for what it knew already.
            known, again = again, False
            return watch.cost(tt, again=known)

        def callback(at: Any) -> None:
            watch.effort.gradients, watch.effort.hessian_products = at.njev, at.nhev
            watch.iterate(manifold.unpack(at.x), at.fun)
            if watch.due:
                raise StopIteration

        result = minimize(
            manifold,
            cost,
            manifold.pack(problem.start),
            method=method,
            # The watch stops a run; tolerances of the solver's own would stop some earlier.
            gradient_tolerance=0.0,
            max_iterations=None,
            max_evaluations=watch.spec.max_evaluations,
            max_products=watch.spec.max_evaluations,
            callback=callback,
            options=options,
            state=state,
        )
        if watch.stopped is None and result.status == _BY_CALLBACK:
            watch.state = result.state
            return None
        watch.effort.gradients = result.njev
        watch.effort.hessian_products = result.nhev
        return str(result.message)

    return solve


# --- In the coordinates of a chart ---


class _Answers:
    """What a cost answered: first what is known of an earlier piece, in order, then its own.

    A solver of another package keeps its state to itself. Told the same it does the same: it
    begins anew, and is told what it was told before, without the cost of finding it.

    Args:
        known: answers of earlier pieces; new ones are added.
    """

    def __init__(self, known: list[Any]) -> None:
        self.all = known
        self._asked = 0

    def next(self, find: Callable[[], Any]) -> Any:
        if self._asked == len(self.all):
            self.all.append(find())
        self._asked += 1
        return self.all[self._asked - 1]


def _in_chart(spectrum: str) -> Solve:
    def solve(problem: Problem, watch: Watch) -> str | None:
        optimize = importlib.import_module("scipy.optimize")
        start = problem.start
        chart = HouseholderChart(start.shape, spectrum)
        point = chart.encode(start)
        answers = _Answers([] if watch.state is None else watch.state["answers"])
        # Iterates that are on record, and those of this piece.
        before = 0 if watch.state is None else watch.effort.iterations + 1
        seen, paused = 1, False
        latest: tuple[np.ndarray, float] | None = None

        def decode(z: Tensor) -> SpectralTT:
            return chart.decode(chart.unflatten(z, point.signs))

        def tensor(z: np.ndarray) -> Tensor:
            return torch.as_tensor(np.array(z), dtype=start.dtype, device=start.device)

        def find(z: np.ndarray) -> tuple[float, Tensor]:
            leaf = tensor(z).requires_grad_()
            cost = watch.cost(decode(leaf))
            (gradient,) = torch.autograd.grad(cost, leaf)
            watch.effort.gradients += 1
            return cost.item(), gradient.cpu()

        def value_and_gradient(z: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal latest
            cost, gradient = answers.next(lambda: find(z))
            latest = np.array(z), cost
            return cost, gradient.numpy().astype(np.float64)

        def callback(z: np.ndarray) -> None:
            nonlocal seen, paused
            seen += 1
            if seen <= before:
                return
            known = latest is not None and np.array_equal(z, latest[0])
            watch.iterate(decode(tensor(z)), latest[1] if known and latest else None)
            if watch.due:
                paused = True
                raise StopIteration

        z0 = chart.flatten(point).cpu().numpy()
        watch.stores(len(z0))
        if not before:
            watch.iterate(decode(tensor(z0)))
        result = optimize.minimize(
            value_and_gradient,
            z0.astype(np.float64),
            jac=True,
            method="L-BFGS-B",
            callback=callback,
            options={"maxiter": 10**9, "maxfun": 10**9, "ftol": 0.0, "gtol": 0.0},
        )
        watch.state = {"answers": answers.all}
        return None if paused else f"scipy: {result.message}"

    return solve


# --- Plain factors ---


def _factors(problem: Problem, watch: Watch) -> None:
    """Adam on the cores, the root of the spectrum in each of the two beside it."""
    start, spec = problem.start, watch.spec
    assert spec.lr is not None
    assert spec.max_evaluations is not None
    steps = min(spec.max_evaluations, spec.max_iterations or spec.max_evaluations)
    *left, inner_left = start.left
    inner_right, *right = start.right
    root = start.spectrum.abs().sqrt()
    cores = [
        core.detach().clone().requires_grad_()
        for core in (
            *left,
            inner_left * root,
            (root * start.spectrum.sign())[:, None, None] * inner_right,
            *right,
        )
    ]
    ones = torch.ones_like(start.spectrum)
    count = len(start.left)
    watch.stores(sum(core.numel() for core in cores))
    optimizer = torch.optim.Adam(cores, lr=spec.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if watch.state is not None:
        for core, known in zip(cores, watch.state["cores"], strict=True):
            core.data.copy_(known)
        optimizer.load_state_dict(watch.state["optimizer"])
        schedule.load_state_dict(watch.state["schedule"])
    done = 0
    while not (done and watch.due):
        tt = SpectralTT(tuple(cores[:count]), ones, tuple(cores[count:]), start.shape)
        optimizer.zero_grad()
        cost = watch.cost(tt)
        watch.iterate(tt, cost.item())
        cost.backward()
        watch.effort.gradients += 1
        optimizer.step()
        schedule.step()
        done += 1
    watch.state = {
        "cores": [core.detach() for core in cores],
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }


# --- pymanopt ---


def _pymanopt_cg(problem: Problem, watch: Watch) -> str:
    """Pymanopt's own manifold and solver; cost and gradient in numpy, sparse throughout."""
    pymanopt = importlib.import_module("pymanopt")
    sparse = importlib.import_module("scipy.sparse")
    start, train = problem.start, problem.splits.train
    shape = start.shape
    i, j = train.inputs.numpy().T
    targets = train.targets.numpy()
    norm = float(targets @ targets)
    manifold = pymanopt.manifolds.FixedRankEmbedded(shape.d_out, shape.d_in, shape.rank)
    known: dict[str, Any] = {"at": None}
    initial = _svd_of(start)
    watch.stores(sum(part.size for part in initial))

    def errors(*point: np.ndarray) -> np.ndarray:
        # pymanopt asks for cost and gradient at one point, one after the other.
        if known["at"] is None or not all(map(np.array_equal, known["at"], point)):
            watch.count()
            u, s, vt = point
            known["at"] = point
            known["errors"] = np.einsum("pk,pk->p", (u * s)[i], vt.T[j]) - targets
        found: np.ndarray = known["errors"]
        return found

    def cost(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> float:
        e = errors(u, s, vt)
        return float(e @ e) / (2 * norm)

    def gradient(u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> Any:
        # Asked for at iterates only, the start first.
        e = errors(u, s, vt)
        watch.iterate(_of_svd(start, u, s, vt), float(e @ e) / (2 * norm))
        watch.effort.gradients += 1
        ambient = sparse.csr_matrix((e / norm, (i, j)), shape=(shape.d_out, shape.d_in))
        return manifold.projection((u, s, vt), ambient)

    function = pymanopt.function.numpy(manifold)
    outcome = pymanopt.optimizers.ConjugateGradient(
        max_time=math.inf,
        max_iterations=10**9,
        min_gradient_norm=0.0,
        # It means a step of length zero: no decrease was found.
        min_step_size=1e-300,
        max_cost_evaluations=10**9,
        verbosity=0,
    ).run(
        pymanopt.Problem(manifold, function(cost), riemannian_gradient=function(gradient)),
        initial_point=initial,
    )
    return f"pymanopt: {outcome.stopping_criterion}"


def _svd_of(tt: SpectralTT) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, v = (frame.numpy() for frame in tt.frames())
    s = tt.spectrum.numpy()
    return u * np.sign(s), np.abs(s), v.T.copy()


def _of_svd(like: SpectralTT, u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> SpectralTT:
    u_, s_, vt_ = (torch.as_tensor(np.array(part), dtype=like.dtype) for part in (u, s, vt))
    return SpectralTT((u_[None],), s_, (vt_[..., None],), like.shape)


SOLVERS = (
    Solver(
        "fixed-rank-cg",
        "manifold of fixed TT rank, conjugate gradients",
        "fixed-rank",
        "cg",
        "full",
        on_manifold(FixedTTRankManifold, "conjugate_gradient"),
    ),
    Solver(
        "fixed-rank-tr",
        "manifold of fixed TT rank, trust regions with the exact Hessian",
        "fixed-rank",
        "tr",
        "full",
        on_manifold(FixedTTRankManifold, "trust_regions"),
    ),
    Solver(
        "fixed-rank-lbfgs",
        "manifold of fixed TT rank, L-BFGS with transported pairs",
        "fixed-rank",
        "lbfgs",
        "full",
        on_manifold(FixedTTRankManifold, "lbfgs"),
    ),
    Solver(
        "product-cg",
        "product of Stiefel manifolds and a spectrum, conjugate gradients",
        "product",
        "cg",
        "free",
        on_manifold(SpectralTTManifold, "conjugate_gradient"),
    ),
    Solver(
        "product-tr",
        "product of Stiefel manifolds and a spectrum, trust regions with the exact Hessian",
        "product",
        "tr",
        "free",
        on_manifold(SpectralTTManifold, "trust_regions"),
    ),
    Solver(
        "chart-lbfgs",
        "coordinates of the Householder chart, L-BFGS (scipy)",
        "householder",
        "lbfgs",
        "free",
        _in_chart("free"),
    ),
    Solver(
        "pymanopt-fixed-rank-cg",
        "pymanopt's FixedRankEmbedded and its conjugate gradients, in numpy",
        "fixed-rank",
        "cg",
        "free",
        _pymanopt_cg,
        svdp_only=True,
        requires="pymanopt",
        cpu_only=True,
    ),
    Solver(
        "factor-adam",
        "plain cores without any constraint, Adam",
        "factors",
        "adam",
        None,
        _factors,
        untuned_lr=1e-2,
    ),
)
