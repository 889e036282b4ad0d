"""Weights: both ways to hold one, over kinds and spectra."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from strategies import bound_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from ways_to_hold import METHODS, every_method

from sttp_manifold import SpectralTT, SpectralTTManifold, TTShape, tt_svd
from sttp_manifold._geoopt import ManifoldParameter
from sttp_manifold.errors import ConversionError, ShapeError, SpectrumError
from sttp_manifold.nn import (
    HouseholderWeight,
    RiemannianWeight,
    SpectralLinear,
    SpectralWeight,
    make_weight,
)
from sttp_manifold.tt import SPECTRA

DOUBLE = {"dtype": torch.float64}
CLASSES = (HouseholderWeight, RiemannianWeight)
SHAPES = {
    "sttp": TTShape((3, 4, 2), (2, 5, 3), rank=4),
    "svdp": TTShape.svd(12, 9, rank=4),
    "full rank": TTShape.for_matrix(8, 8, rank=8),
    "row": TTShape.for_matrix(1, 6, rank=3),
    "column": TTShape.for_matrix(6, 1, rank=3),
    "number": TTShape.svd(1, 1, rank=1),
}

every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def generic(method: str, shape: TTShape, spectrum: str, seed: int = 0) -> SpectralWeight:
    """A weight away from every special point, in float64."""
    torch.manual_seed(seed)
    weight = make_weight(
        method, shape, spectrum, "random", bound=bound_of(spectrum), dtype=torch.float64
    )
    with torch.no_grad():
        if isinstance(weight, HouseholderWeight):
            for p in weight.parameters():
                p.add_(0.3 * torch.randn_like(p))
        elif spectrum != "identity":
            centre = weight.point[weight.manifold.spectrum_slice]
            centre.add_(0.3 * torch.randn_like(centre))
    return weight


@every_spectrum
@every_shape
@pytest.mark.parametrize("init", ["eye", "noisy_eye", "random"])
def test_both_methods_start_from_the_same_weight(shape: TTShape, spectrum: str, init: str) -> None:
    made = []
    for cls in CLASSES:
        torch.manual_seed(3)
        made.append(cls(shape, spectrum, init, dtype=torch.float64))
    torch.testing.assert_close(made[0](), made[1](), rtol=0, atol=1e-12)
    assert made[1].tt().orthonormality_error() < 1e-12


@every_spectrum
@every_shape
def test_chart_stores_the_number_of_parameters(shape: TTShape, spectrum: str) -> None:
    weight = HouseholderWeight(shape, spectrum)
    assert [name for name, _ in weight.named_parameters()] == ["coordinates"]
    assert weight.coordinates.shape == (shape.num_parameters(spectrum),)
    assert [name for name, _ in weight.named_buffers()] == (
        {"identity": ["signs"], "fixed": ["values"]}.get(spectrum, [])
    )
    riemannian = RiemannianWeight(shape, spectrum)
    assert [name for name, _ in riemannian.named_parameters()] == ["point"]
    assert riemannian.point.numel() == RiemannianWeight.count(shape, spectrum)
    assert not list(riemannian.children())


def test_eye_is_zero_and_noise_has_its_deviation() -> None:
    shape = TTShape.for_matrix(64, 64, rank=16)
    assert not HouseholderWeight(shape, init="eye").coordinates[:-16].any()
    for std in (1e-4, 1e-2):
        weight = HouseholderWeight(shape, init="noisy_eye", init_std=std)
        noise = weight.coordinates[:-16].detach()
        assert noise.std() == pytest.approx(std, rel=0.1)
        assert abs(noise.mean()) < 0.1 * std
    torch.testing.assert_close(weight.tt().singular_values(), torch.ones(16), rtol=0, atol=1e-6)


def test_random_frames_are_haar() -> None:
    """Every entry of a Haar frame has variance 1/d and no mean."""
    shape = TTShape.svd(6, 5, rank=2)
    for cls in CLASSES:
        frames = torch.stack([cls(shape, init="random").tt().frames()[0] for _ in range(400)])
        # Signs of columns are free, hence squares.
        torch.testing.assert_close(
            frames.square().mean(0), torch.full((6, 2), 1 / 6), rtol=0, atol=0.04
        )


@every_method
@every_spectrum
@every_shape
def test_a_value_goes_in_and_comes_out(method: str, shape: TTShape, spectrum: str) -> None:
    value = generic("householder", shape, spectrum, seed=1).tt().detach()
    weight = make_weight(method, shape, spectrum, value, bound=bound_of(spectrum))
    assert weight.dtype == torch.float64
    torch.testing.assert_close(weight(), value.to_matrix(), rtol=0, atol=1e-12)
    other = generic(method, shape, spectrum, seed=2)
    assert other.encode_(value) is other
    torch.testing.assert_close(other(), value.to_matrix(), rtol=0, atol=1e-12)
    torch.testing.assert_close(other.tt().to_matrix(), other())


@every_method
def test_encode_keeps_the_parameters_their_dtype_and_the_graph_clean(method: str) -> None:
    shape = SHAPES["sttp"]
    weight = make_weight(method, shape)
    before = list(weight.parameters())
    value = generic("householder", shape, "free").tt()
    weight.encode_(value)
    assert all(a is b for a, b in zip(before, weight.parameters(), strict=True))
    assert weight.dtype == torch.float32
    assert all(p.is_leaf and p.requires_grad for p in weight.parameters())
    torch.testing.assert_close(weight().double(), value.to_matrix(), rtol=0, atol=1e-6)


@every_method
@pytest.mark.parametrize("spectrum", ["identity", "normalized", "bounded"])
def test_a_spectrum_that_cannot_hold_the_value_says_so(method: str, spectrum: str) -> None:
    shape = SHAPES["sttp"]
    value = tt_svd(5 * torch.randn(24, 30, dtype=torch.float64), shape)
    with pytest.raises(SpectrumError, match="project=True"):
        make_weight(method, shape, spectrum, value)
    weight = make_weight(method, shape, spectrum, dtype=torch.float64)
    before = weight().detach().clone()
    with pytest.raises(SpectrumError, match="project=True"):
        weight.encode_(value)
    torch.testing.assert_close(weight(), before, rtol=0, atol=0)
    nearest = weight.map.nearest(value.spectrum)
    wanted = SpectralTT(value.left, nearest, value.right, shape).to_matrix()
    for made in (
        weight.encode_(value, project=True),
        make_weight(method, shape, spectrum, value, project=True),
    ):
        torch.testing.assert_close(made(), wanted, rtol=0, atol=1e-12)


@every_method
@every_spectrum
@pytest.mark.parametrize("shape", [SHAPES["sttp"], SHAPES["svdp"]], ids=["sttp", "svdp"])
def test_gradients_are_those_of_the_dense_weight(
    method: str, shape: TTShape, spectrum: str
) -> None:
    """Chain rule by finite differences along the parameters."""
    weight = generic(method, shape, spectrum)
    target = torch.randn(shape.d_out, shape.d_in, dtype=torch.float64)

    def loss(W: Tensor) -> Tensor:
        return (W * target).sum() + W.square().sum().square() / 100

    loss(weight()).backward()
    for p in weight.parameters():
        assert p.grad is not None
        assert p.grad.abs().max() > 1e-3
        u, h = torch.randn_like(p.detach()), 1e-6
        with torch.no_grad():
            p.add_(h * u)
            above = loss(weight())
            p.sub_(2 * h * u)
            below = loss(weight())
            p.add_(h * u)
        slope = (above - below) / (2 * h)
        assert float((p.grad * u).sum()) == pytest.approx(float(slope), rel=1e-5, abs=1e-6)


@every_method
@every_spectrum
@every_shape
def test_bond_and_factors_agree_with_the_value(method: str, shape: TTShape, spectrum: str) -> None:
    weight = generic(method, shape, spectrum)
    torch.testing.assert_close(weight.bond(), weight.tt().spectrum)
    us, vt = weight.factors()
    torch.testing.assert_close(us @ vt, weight())
    torch.testing.assert_close(vt @ vt.mT, torch.eye(shape.rank, dtype=torch.float64))


@every_method
@every_spectrum
def test_copies_are_independent_and_equal(method: str, spectrum: str) -> None:
    weight = generic(method, SHAPES["sttp"], spectrum)
    before = weight().detach().clone()
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    copies = [
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert (other.method, other.spectrum, other.bound, other.shape) == (
            weight.method,
            weight.spectrum,
            weight.bound,
            weight.shape,
        )
        assert torch.equal(other(), before)
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert torch.equal(weight(), before)
        if isinstance(other, RiemannianWeight):
            assert isinstance(other.point, ManifoldParameter)
            assert isinstance(other.manifold, SpectralTTManifold)
            assert other.manifold.shape == weight.shape


@every_method
@every_spectrum
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(method: str, spectrum: str, assign: bool) -> None:
    weight = generic(method, SHAPES["sttp"], spectrum)
    other = generic(method, SHAPES["sttp"], spectrum, seed=9)
    assert not torch.allclose(other(), weight())
    result = other.load_state_dict(weight.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(other(), weight())
    if isinstance(other, RiemannianWeight):
        assert isinstance(other.point, ManifoldParameter)


@every_method
@every_spectrum
def test_dtype_follows_the_module(method: str, spectrum: str) -> None:
    weight = generic(method, SHAPES["sttp"], spectrum)
    before = weight().detach().clone()
    single = copy.deepcopy(weight).float()
    assert single.dtype == single().dtype == torch.float32
    torch.testing.assert_close(single().double(), before, rtol=0, atol=1e-5)
    assert single.to(torch.float64).double()().dtype == torch.float64
    half = copy.deepcopy(weight).bfloat16()
    assert half().dtype == half.tt().dtype == torch.bfloat16
    torch.testing.assert_close(half().double(), before, rtol=0, atol=0.1)
    for moved in (single, half):
        assert all(p.requires_grad for p in moved.parameters())
        if isinstance(moved, RiemannianWeight):
            assert isinstance(moved.point, ManifoldParameter)


def test_a_point_stays_a_manifold_parameter_when_torch_replaces_parameters() -> None:
    weight = RiemannianWeight(SHAPES["sttp"]).requires_grad_(False)
    before = weight().detach().clone()
    old = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        weight.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(old)
    assert isinstance(weight.point, ManifoldParameter)
    assert isinstance(weight.manifold, SpectralTTManifold)
    assert not weight.point.requires_grad
    torch.testing.assert_close(weight().float(), before)


@every_method
def test_a_weight_without_memory_can_be_filled(method: str) -> None:
    weight = make_weight(method, SHAPES["sttp"])
    empty = copy.deepcopy(weight).to("meta").to_empty(device="cpu")
    empty.load_state_dict(weight.state_dict())
    assert torch.equal(empty(), weight())
    if isinstance(empty, RiemannianWeight):
        assert isinstance(empty.point, ManifoldParameter)


@every_method
@every_spectrum
@pytest.mark.parametrize("init", ["noisy_eye", "random", "value"])
@pytest.mark.parametrize("where", ["meta device", "default device", "fake mode", "skip_init"])
def test_made_without_memory_and_filled(method: str, spectrum: str, init: str, where: str) -> None:
    """A layer has the same state as one that was filled from the start, signs included."""
    shape = TTShape.for_matrix(24, 30, rank=4)
    value = generic("householder", shape, spectrum, seed=1).tt().detach()
    how = {"method": method, "spectrum": spectrum, **DOUBLE}
    if spectrum == "bounded":
        how["bound"] = 2.0
    how["init"] = value if init == "value" else init
    filled = SpectralLinear(30, 24, 4, **how)
    if where == "fake mode":
        with FakeTensorMode(allow_non_fake_inputs=True):
            made = SpectralLinear(30, 24, 4, **how)
        assert {k: (v.shape, v.dtype) for k, v in made.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in filled.state_dict().items()
        }
        return
    if where == "skip_init":
        empty = torch.nn.utils.skip_init(SpectralLinear, 30, 24, 4, **how)
    elif where == "meta device":
        empty = SpectralLinear(30, 24, 4, device="meta", **how).to_empty(device="cpu")
    else:
        with torch.device("meta"):
            empty = SpectralLinear(30, 24, 4, **how)
        if init != "value":  # which has a device of its own
            assert empty.spectral_weight.device.type == "meta"
            with pytest.raises(ShapeError, match="to_empty"):
                empty.spectral_weight.encode_(value)
        empty = empty.to_empty(device="cpu")
    empty.load_state_dict(filled.state_dict())
    assert type(empty.spectral_weight) is type(filled.spectral_weight)
    x = torch.randn(3, 30, **DOUBLE)
    assert torch.equal(empty(x), filled(x))
    if isinstance(empty.spectral_weight, RiemannianWeight):
        assert isinstance(empty.spectral_weight.point, ManifoldParameter)


@pytest.mark.parametrize("spectrum", ["identity", "free", "normalized", "bounded", "full"])
@every_shape
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_a_tensor_for_each_frame_is_joined(
    shape: TTShape, spectrum: str, assign: bool
) -> None:
    """As earlier versions stored charts: `frames.0`, ..., and the spectrum's coordinates."""
    weight = generic("householder", shape, spectrum)
    point = weight.chart.unflatten(weight.coordinates.detach(), weight.signs)
    frames = [vector.clone() for vector in point.frames if vector.numel()]
    former = {f"1.frames.{k}": vector for k, vector in enumerate(frames)}
    if spectrum == "identity":
        former["1.signs"] = weight.signs
    else:
        former["1.coordinates"] = point.spectrum.clone()
    other = torch.nn.Sequential(torch.nn.Identity(), generic("householder", shape, spectrum, 9))
    joined = r"'1\.(frames\.0|coordinates)'.*'1\.coordinates'"
    alone = "the state of '1' does not say its plan"  # a spectrum alone, or signs
    text = joined if frames or point.spectrum.ndim == 2 else alone
    with pytest.warns(UserWarning, match=text) as seen:
        other.load_state_dict(former, assign=assign)
    assert len(seen) == 1
    assert torch.equal(other[1](), weight())


def test_a_state_of_frames_of_another_plan_is_torchs_size_error() -> None:
    former = {"frames.0": torch.zeros(3), "frames.1": torch.zeros(4), "coordinates": torch.ones(2)}
    with (
        pytest.warns(UserWarning, match=r"'frames\.0', 'frames\.1', 'coordinates'"),
        pytest.raises(RuntimeError, match="size mismatch for coordinates"),
    ):
        HouseholderWeight(SHAPES["sttp"]).load_state_dict(former)


@every_method
def test_loading_across_dtypes(method: str) -> None:
    weight = generic(method, SHAPES["sttp"], "free")
    single = make_weight(method, SHAPES["sttp"])
    single.load_state_dict(weight.state_dict())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single().double(), weight(), rtol=0, atol=1e-5)
    weight.load_state_dict(single.state_dict())
    assert weight.dtype == torch.float64
    weight.load_state_dict(copy.deepcopy(single).bfloat16().state_dict())


def test_a_point_off_the_manifold_is_refused_with_the_way_back() -> None:
    weight = generic("riemannian", SHAPES["sttp"], "free")
    model = torch.nn.Sequential(torch.nn.Identity(), weight)
    before = weight().detach().clone()
    state = model.state_dict()
    state["1.point"] = state["1.point"] + 1e-2 * torch.randn_like(state["1.point"])
    with pytest.raises(RuntimeError, match=r"1\.point is off its manifold.*M\.projx"):
        model.load_state_dict(state)
    assert torch.equal(weight(), before)
    M = model.get_submodule("1").manifold
    state["1.point"] = M.projx(state["1.point"])
    model.load_state_dict(state)
    assert weight.tt().orthonormality_error() < 1e-12
    state["1.point"] = state["1.point"] * float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        model.load_state_dict(state)


def test_a_state_of_one_method_does_not_fit_the_other() -> None:
    shape = SHAPES["sttp"]
    for a, b in (CLASSES, CLASSES[::-1]):
        with pytest.raises(RuntimeError, match=f"switch.model, '{b.method}'"):
            a(shape).load_state_dict(b(shape).state_dict())


def test_a_point_of_another_plan_is_torchs_size_error_where_the_state_says_no_plan() -> None:
    state = RiemannianWeight(SHAPES["svdp"]).state_dict()
    del state["_extra_state"]
    with (
        pytest.warns(UserWarning, match="does not say its plan"),
        pytest.raises(RuntimeError, match="size mismatch"),
    ):
        RiemannianWeight(SHAPES["sttp"]).load_state_dict(state)


@every_method
@every_spectrum
def test_autocast_leaves_the_weight_alone(method: str, spectrum: str) -> None:
    weight = make_weight(method, SHAPES["sttp"], spectrum, "random")
    plain = weight()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert weight().dtype == torch.float32
        assert torch.equal(weight(), plain)
        assert torch.equal(weight.tt().to_matrix().float().isfinite(), plain.isfinite())
        weight().sum().backward()


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_arguments(cls: type[HouseholderWeight] | type[RiemannianWeight]) -> None:
    shape = SHAPES["sttp"]
    with pytest.raises(ShapeError, match="takes a TTShape"):
        cls((24, 30))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="'eye', 'noisy_eye', 'random'"):
        cls(shape, init="zeros")
    with pytest.raises(SpectrumError, match="identity, free"):
        cls(shape, "learned")
    with pytest.raises(SpectrumError, match="bound"):
        cls(shape, "bounded", bound=-1.0)
    weight = cls(shape)
    with pytest.raises(ShapeError, match="tt_svd"):
        weight.encode_(torch.randn(24, 30))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"batch of shape \(2,\)"):
        weight.encode_(tt_svd(torch.randn(2, 24, 30), shape))
    with pytest.raises(ShapeError, match=r"cannot be encoded|is not a point"):
        weight.encode_(tt_svd(torch.randn(24, 30), TTShape.svd(24, 30, rank=4)))
    tt = tt_svd(torch.randn(24, 30), shape)
    loose = SpectralTT(tuple(2 * core for core in tt.left), tt.spectrum, tt.right, shape)
    with pytest.raises(ShapeError, match=r"not orthonormal.*orthogonalize"):
        weight.encode_(loose)
    nan = SpectralTT(tt.left, tt.spectrum * float("nan"), tt.right, shape)
    with pytest.raises(SpectrumError, match="not finite"):
        weight.encode_(nan)


def test_make_weight_names_the_methods() -> None:
    with pytest.raises(ConversionError, match="'householder', 'riemannian'"):
        make_weight("cayley", SHAPES["sttp"])
    for method, cls in zip(METHODS, CLASSES, strict=True):
        made = make_weight(method, SHAPES["svdp"], "bounded", bound=3.0)
        assert type(made) is cls
        assert (made.method, made.spectrum, made.bound) == (method, "bounded", 3.0)


@every_method
def test_repr_tells_size_ranks_and_spectrum(method: str) -> None:
    text = repr(make_weight(method, SHAPES["sttp"], "bounded", bound=3.0))
    for part in ("24 x 30", "3·4·2 | 2·5·3", "1-3-4-4-4-3-1", "'bounded'", "bound=3.0"):
        assert part in text
