r"""RiemannianAdam and RiemannianSGD: torch's optimizers, on manifolds where parameters have one.

Drop-in for geoopt's of the same names, which they subclass. The mathematics of a step on a
manifold is geoopt's (Becigneul & Ganea 2019): with :math:`g` the Riemannian gradient, momentum
and second moment live in the tangent space, the point moves by a retraction, and the momentum is
carried to the new point by projection. The second moment of a frame is one scalar, the squared
norm of its gradient; that of a spectrum is taken coordinate by coordinate.

What differs from geoopt 0.5: ``.grad`` is read only; weight decay acts on the weight instead of
on frames, whose norm is constant; ``maximize`` and ``foreach`` are honoured, and what cannot be
honoured is refused; frames of equal shape move as one batch, to the nearest frame unless another
retraction is asked for (``retraction="qr"`` is geoopt's).
"""

from __future__ import annotations

from sttp_manifold.optim.adam import RiemannianAdam
from sttp_manifold.optim.muon import RiemannianMuon
from sttp_manifold.optim.sgd import RiemannianSGD

__all__ = ["RiemannianAdam", "RiemannianMuon", "RiemannianSGD"]
