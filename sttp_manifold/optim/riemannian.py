r"""RiemannianAdam, RiemannianMuon and RiemannianSGD: on manifolds where parameters have one.

Plain parameters get torch's own steps. On a manifold, with :math:`g` the Riemannian gradient,
momentum lives in the tangent space, the point moves by a retraction, and the momentum is carried
to the new point by projection (Becigneul & Ganea 2019). Adam divides by a second moment, one for
each entry or, if asked for, of a frame the mean square norm of its gradient; Muon takes the
steepest direction in the spectral norm instead of the momentum. Spectra move coordinate by
coordinate.

Adam and SGD subclass geoopt's of the same names, and take the same arguments. What differs from
geoopt 0.5: ``.grad`` is read only; weight decay acts on the weight instead of on frames, whose
norm is constant; ``maximize`` and ``foreach`` are honoured, and what cannot be honoured is
refused; frames of equal shape move as one batch, to the nearest frame unless another retraction
is asked for (``retraction="qr"`` is geoopt's), and Adam has a second moment for each entry of a
frame (``second_moment="frame"`` is geoopt's).
"""

from __future__ import annotations

from sttp_manifold.optim.adam import RiemannianAdam
from sttp_manifold.optim.muon import RiemannianMuon
from sttp_manifold.optim.sgd import RiemannianSGD

__all__ = ["RiemannianAdam", "RiemannianMuon", "RiemannianSGD"]
