"""FID, KID and Inception Score, by the package ``torch-fidelity``, where its weights are at hand.

Nothing is downloaded: the weights are a file that a user has put where torch keeps such, or names.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sttp_manifold.errors import ConfigError

__all__ = ["WEIGHTS_VARIABLE", "inception_weights", "published_metrics"]

WEIGHTS_VARIABLE = "STTP_INCEPTION"

_FILE = "weights-inception-2015-12-05-6726825d.pth"
_ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_FILE}"


def inception_weights() -> Path:
    """The file of the Inception network's weights.

    It is that of the variable ``STTP_INCEPTION``, or the one in torch's folder of checkpoints.

    Raises:
        ConfigError: torch-fidelity is not installed, or the file is not there.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise ConfigError(
            "--fid needs the package torch-fidelity, which is not installed: "
            "pip install 'sttp-manifold[fidelity]'; without --fid, features of the task's own "
            "classifier are compared"
        )
    given = os.environ.get(WEIGHTS_VARIABLE)
    path = Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if not path.is_file():
        raise ConfigError(
            f"--fid needs the weights of the Inception network, and {path} is not there: download "
            f"{_ADDRESS} and put it there, or name the file with the variable {WEIGHTS_VARIABLE}"
        )
    return path


class _Bytes(Dataset[Tensor]):
    """Images as torch-fidelity wants them.

    Shape:
        images: (n, 1 or 3, h, w), in [-1, 1]
    """

    def __init__(self, images: Tensor) -> None:
        self._images = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index].expand(3, -1, -1)


def published_metrics(generated: Tensor, real: Tensor) -> dict[str, float]:
    """FID, KID and Inception Score of generated images.

    Args:
        generated: images in [-1, 1].
        real: images in [-1, 1].

    Returns:
        Values by the names ``fid``, ``kid``, ``inception_score``.

    Shape:
        - generated, real: ``(n, 1 or 3, h, w)``

    Raises:
        ConfigError: as :func:`inception_weights`.

    References:
        Obukhov et al., *High-fidelity performance metrics for generative models in PyTorch*, 2020.
    """
    weights = inception_weights()
    fidelity: Any = importlib.import_module("torch_fidelity")
    found = fidelity.calculate_metrics(
        input1=_Bytes(generated),
        input2=_Bytes(real),
        isc=True,
        fid=True,
        kid=True,
        kid_subset_size=min(1000, len(generated), len(real)),
        feature_extractor_weights_path=str(weights),
        cuda=generated.is_cuda,
        # The images are in memory: processes that load them would only copy them.
        save_cpu_ram=True,
        verbose=False,
    )
    return {
        "fid": float(found["frechet_inception_distance"]),
        "kid": float(found["kernel_inception_distance_mean"]),
        "inception_score": float(found["inception_score_mean"]),
    }
