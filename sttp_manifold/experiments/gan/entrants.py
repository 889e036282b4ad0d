"""The discriminators that are compared: how their weights are held, and what moves them.

They are methods like those of ``sttp compare``, in the same registry. To add one::

    METHODS.add(GanEntrant("my-own", "what it is", "dense", "my-own", "adam", untuned_lr=1e-3,
                           hold=my_function))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sttp_manifold.experiments.gan.constraints import (
    orthogonal_start,
    orthogonality_penalty,
    spectrally_normalized,
    spectrally_regularized,
)
from sttp_manifold.experiments.gan.setting import GanSetting
from sttp_manifold.experiments.models import SNGANDiscriminator
from sttp_manifold.experiments.task import Task
from sttp_manifold.nn import compress, spectral_penalty
from sttp_manifold.optim import RiemannianAdam, RiemannianMuon, param_groups

__all__ = ["DEFAULT", "GAN_ENTRANTS", "GanEntrant", "narrow_width", "wide_discriminator"]

BETAS = (0.0, 0.9)
_MUON_MOMENTUM = 0.5
# Points turn by an angle where biases move by a difference: they want ten times the rate and more.
_BIAS_SHARE = 1 / 15
_PENALTY_WEIGHT = 1.0


@dataclass(frozen=True)
class GanEntrant:
    """A discriminator's weights, and its optimizer.

    Attributes:
        name: what a user types.
        summary: one line for people.
        kind: ``dense``, ``svdp`` or ``sttp``.
        parameterization: how a weight is held.
        optimizer: ``adam``, or on the manifold also ``muon``.
        untuned_lr: rate of the weights where a task has none tuned.
        spectrum: how singular values are held; None for dense weights.
        hold: changes a dense discriminator; those with a spectrum are compressed instead.
        penalty: added to the discriminator's loss, of the network.
        bias_share: rate of biases, as a part of the rate of the weights.
        equal_count: whether the network is made so narrow that it has no more numbers than
            STTP with identity spectrum at the same rank.
        largest_lr: beyond it there is no learning rate.
        grid: factors of ``untuned_lr`` that a rate is chosen from.
    """

    name: str
    summary: str
    kind: str
    parameterization: str
    optimizer: str
    untuned_lr: float
    spectrum: str | None = None
    hold: Callable[[nn.Module], nn.Module] | None = None
    penalty: Callable[[nn.Module], Tensor] | None = None
    bias_share: float = 1.0
    equal_count: bool = False
    largest_lr: float = math.inf
    grid: tuple[float, ...] = (1 / 3, 1.0, 3.0)

    run = "gan"
    requires = None
    is_available = True
    cpu_only = False

    def applies_to(self, task: Task) -> bool:
        """Whether a task has images to generate."""
        return task.gan is not None

    @property
    def momentum(self) -> float | None:
        """Momentum of Muon; None for Adam."""
        return _MUON_MOMENTUM if self.optimizer == "muon" else None

    def rates(self, task: Task) -> tuple[float, ...]:
        """The learning rates to choose from.

        Args:
            task: the same for all tasks.
        """
        return tuple(float(f"{self.untuned_lr * factor:.3g}") for factor in self.grid)

    def make(self, setting: GanSetting, channels: int, rank: int) -> nn.Module:
        """The discriminator, drawn by torch's global generator.

        Args:
            setting: which gives its size.
            channels: of the images.
            rank: of the spectral weights.
        """
        ndf = narrow_width(setting, channels, rank) if self.equal_count else setting.ndf
        model: nn.Module = wide_discriminator(setting, channels, ndf)
        if self.spectrum is None:
            return model if self.hold is None else self.hold(model)
        return self._compressed(model, rank)

    def _compressed(self, model: nn.Module, rank: int) -> nn.Module:
        options: dict[str, Any] = {
            "kind": self.kind,
            "method": self.parameterization,
            "spectrum": self.spectrum,
        }
        if self.spectrum == "fixed":
            # Each weight keeps the singular values that it was drawn with.
            options["init"] = "pretrained"
        else:
            options["init"] = "random"
        return compress(model, rank, grow="allow", **options)

    def make_optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer of a discriminator, with rates of their own for points and for biases.

        Args:
            model: of :meth:`make`.
            lr: rate of the weights.
        """
        small = lr * self.bias_share
        if self.parameterization != "riemannian":
            return torch.optim.Adam(param_groups(model, lr=small, frame_lr=lr), lr, betas=BETAS)
        if self.optimizer == "muon":
            spectrum = {} if self.spectrum in ("identity", "fixed") else {"spectrum_lr": small}
            groups = param_groups(model, lr=small, frame_lr=lr, **spectrum)
            return RiemannianMuon(groups, lr, momentum=_MUON_MOMENTUM, adam_betas=BETAS)
        groups = param_groups(model, lr=small, frame_lr=lr)
        return RiemannianAdam(groups, lr, betas=BETAS, second_moment="frame")


def wide_discriminator(
    setting: GanSetting, channels: int, ndf: int | None = None
) -> SNGANDiscriminator:
    """The dense discriminator of a setting, which all entrants are measured against.

    Args:
        setting: which gives its size.
        channels: of the images.
        ndf: another width than that of the setting.
    """
    ndf = setting.ndf if ndf is None else ndf
    return SNGANDiscriminator.for_images(setting.size, channels, ndf=ndf)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def narrow_width(setting: GanSetting, channels: int, rank: int) -> int:
    """The largest width at which the dense network has no more numbers than STTP, identity."""
    with torch.random.fork_rng(devices=[]):
        most = _count(_BY_NAME["sttp-identity-chart"].make(setting, channels, rank))
        # At 48 pixels only multiples of 16 divide into the published widths.
        step = 16 if setting.size == 48 else 1
        width = setting.ndf - setting.ndf % step
        while width > step and _count(wide_discriminator(setting, channels, width)) > most:
            width -= step
    return width


def _penalized(model: nn.Module) -> Tensor:
    return _PENALTY_WEIGHT * spectral_penalty(model, "d_optimal")


def _orthogonal(model: nn.Module) -> Tensor:
    return _PENALTY_WEIGHT * orthogonality_penalty(model)


_ADAM = 1e-3
_HELD = {
    "chart": ("householder", "adam", _ADAM, 1.0, "by Householder charts, Adam"),
    "riemannian-adam": ("riemannian", "adam", 1.5e-2, _BIAS_SHARE, "on the manifold, Adam"),
    "riemannian-muon": ("riemannian", "muon", 1.5e-2, _BIAS_SHARE, "on the manifold, Muon"),
}
_SPECTRA = {
    "identity": ("identity", "all singular values one", None),
    "normalized": ("normalized", "the largest singular value one", None),
    "bounded": ("bounded", "singular values up to one", None),
    "fixed": ("fixed", "singular values as drawn", None),
    "penalized": ("free", "singular values penalized (D-optimal)", _penalized),
}


def _spectral(kind: str, spectrum: str, how: str) -> GanEntrant:
    held, optimizer, lr, share, words = _HELD[how]
    name, said, penalty = _SPECTRA[spectrum]
    return GanEntrant(
        f"{kind}-{spectrum}-{how}",
        f"{kind.upper()}, {said}, {words}",
        kind,
        held,
        optimizer,
        lr,
        spectrum=name,
        penalty=penalty,
        bias_share=share,
        largest_lr=math.pi / 2 if optimizer == "muon" else math.inf,
    )


def _plain(name: str, summary: str, **more: Any) -> GanEntrant:
    return GanEntrant(name, summary, "dense", name, "adam", _ADAM, **more)


GAN_ENTRANTS = (
    _plain("plain", "dense weights as they are, Adam"),
    _plain("spectral-norm", "dense, spectral normalization, Adam", hold=spectrally_normalized),
    _plain(
        "spectral-norm-small",
        "spectral normalization of a network as small as STTP's, Adam",
        hold=spectrally_normalized,
        equal_count=True,
    ),
    _plain(
        "spectral-regularization",
        "dense, all singular values lifted to the largest by SVD, Adam",
        hold=spectrally_regularized,
    ),
    _plain(
        "orthogonal-penalty",
        "dense, |W W^T - I|^2 added to the loss, Adam",
        hold=orthogonal_start,
        penalty=_orthogonal,
    ),
    *(_spectral(k, s, h) for k in ("svdp", "sttp") for s in _SPECTRA for h in _HELD),
)
"""All that are registered."""

_BY_NAME = {entrant.name: entrant for entrant in GAN_ENTRANTS}

DEFAULT = (
    "plain",
    "spectral-norm",
    "spectral-norm-small",
    "orthogonal-penalty",
    *(f"{kind}-identity-{how}" for kind in ("svdp", "sttp") for how in _HELD),
)
"""Those of ``sttp gan`` where none are named."""
