"""ONNX of points, and of stock layers; of charts the error that says what to do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from sttp_manifold.nn import compress, decompress

pytest.importorskip("onnxscript")


def network(method: str) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(72, 32)]
    return compress(nn.Sequential(*layers), 4, method=method, grow="allow").eval()


def through_onnx(model: nn.Module, x: Tensor, more: Tensor) -> Tensor:
    from onnx.reference import ReferenceEvaluator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=sizes, verbose=False)
        assert program is not None
        written = program.model_proto
        (y,) = ReferenceEvaluator(written).run(None, {written.graph.input[0].name: more.numpy()})
    return torch.as_tensor(y)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["point", "dense", "factors"])
def test_onnx_of_any_batch(form: str) -> None:
    model = network("riemannian")
    given = model if form == "point" else decompress(copy.deepcopy(model), form=form)
    x, more = torch.randn(2, 4, 3, 3), torch.randn(7, 4, 3, 3)
    torch.testing.assert_close(through_onnx(given, x, more), model(more), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_charts_say_what_to_export() -> None:
    with pytest.raises(Exception, match="decompress"):
        through_onnx(network("householder"), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))
