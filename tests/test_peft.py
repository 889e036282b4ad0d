"""Spectral adapters through PEFT's own functions, on plain networks and on Hugging Face's."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from ways_to_hold import every_method

from sttp_manifold.errors import ConversionError, SpectrumError
from sttp_manifold.nn import adapt, compress
from sttp_manifold.optim import RiemannianAdam, check_points

peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402

from sttp_manifold.peft import SpectralConfig, SpectralTunerLayer  # noqa: E402


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def image() -> Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def tuned(method: str = "householder", **how: Any) -> Any:
    how = {"r": 3, "target_modules": ["0", "3"], "modules_to_save": ["5"], **how}
    return peft.get_peft_model(net(), SpectralConfig(method=method, **how))


def train(model: nn.Module, steps: int = 5) -> Any:
    optimizer = RiemannianAdam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(image()).square().mean().backward()
        optimizer.step()
    return model


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_method
def test_a_network_starts_as_it_was_and_trains_its_adapters_and_head(method: str) -> None:
    model = tuned(method)
    assert torch.equal(model(image()), net()(image()))
    free = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("spectral_tt_weight.default" in name for name in free) == 2
    assert sum("modules_to_save" in name for name in free) == 2
    assert len(free) == 4
    first = float(model(image()).square().mean().detach())
    assert float(train(model, 15)(image()).square().mean().detach()) < 0.5 * first
    check_points(model)


@every_method
def test_it_computes_what_adapt_computes(method: str) -> None:
    model = train(tuned(method, modules_to_save=None, alpha=0.5))
    own = adapt(net(), 3, ["0", "3"], method=method, alpha=0.5)
    for at in ("0", "3"):
        layer = model.base_model.model.get_submodule(at)
        state = layer.spectral_tt_weight["default"].state_dict()
        own.get_submodule(at).updates["default"].weight.load_state_dict(state)
        close(layer.get_delta_weight("default"), own.get_submodule(at).weight - layer.weight)
    close(model(image()), own(image()))


@every_method
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saved_and_loaded_alone(tmp_path: Path, method: str, low_cpu_mem_usage: bool) -> None:
    model = train(tuned(method))
    y = model(image())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (config["peft_type"], config["r"], config["method"]) == ("SPECTRAL_TT", 3, method)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("default" in key or "base_layer" in key for key in held)
    vector = "coordinates" if method == "householder" else "point"
    assert f"base_model.model.3.spectral_tt_weight.{vector}" in held
    how = {"low_cpu_mem_usage": low_cpu_mem_usage}
    other = peft.PeftModel.from_pretrained(net(), tmp_path, adapter_name="mine", **how)
    assert torch.equal(other(image()), y)
    assert not any(p.requires_grad for n, p in other.named_parameters() if "spectral" in n)
    other.load_adapter(tmp_path, "again", is_trainable=True, **how)
    other.set_adapter("again")
    assert torch.equal(other(image()), y)
    train(other)
    check_points(other)


@every_method
def test_merged_and_unloaded(method: str) -> None:
    model = train(tuned(method))
    y, layer = model(image()), model.base_model.model[3]
    weight = layer.base_layer.weight.clone()
    model.merge_adapter(safe_merge=True)
    close(model(image()), y)
    train(model, 1)  # what was added is what is taken
    model.unmerge_adapter()
    close(layer.base_layer.weight, weight)
    y = model(image())
    plain = model.merge_and_unload()
    assert [type(m) for m in plain] == [type(m) for m in net()]
    close(plain(image()), y)
    plain = train(tuned(method, modules_to_save=None)).unload()
    assert torch.equal(plain(image()), net()(image()))


def test_several_adapters() -> None:
    model = train(tuned(modules_to_save=None))
    one = model(image())
    with model.disable_adapter():
        assert torch.equal(model(image()), net()(image()))
    model.add_adapter("two", SpectralConfig(r=2, target_modules=["3", "5"], kind="svdp"))
    assert torch.equal(model(image()), one)
    model.set_adapter("two")
    assert torch.equal(model(image()), net()(image()))
    two = train(model)(image())
    model.set_adapter("default")
    assert torch.equal(model(image()), one)
    model.merge_adapter(["default"])
    with model.disable_adapter():
        close(model(image()), net()(image()))
    model.unmerge_adapter()
    model.set_adapter("two")
    close(model(image()), two)
    model.delete_adapter("default")
    close(model(image()), two)


def test_half_precision_keeps_updates_in_float32() -> None:
    model = peft.get_peft_model(
        net().bfloat16(), SpectralConfig(r=3, target_modules=["3"], method="riemannian")
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    assert hasattr(parameters[0], "manifold")
    y = model(image().bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()


def test_what_cannot_be_is_said() -> None:
    for how, kind, words in (
        ({"spectrum": "identity"}, SpectrumError, "starts at zero"),
        ({"alpha": 0.0}, ConversionError, "alpha"),
        ({"kind": "svd"}, ValueError, "svdp"),
        ({"target_modules": ".*", "layers_to_transform": [0]}, ValueError, "regular expression"),
        ({"layers_pattern": "layers"}, ValueError, "layers_to_transform"),
    ):
        with pytest.raises(kind, match=words):
            SpectralConfig(**how)
    with pytest.raises(ConversionError, match=r"1.*ReLU has no update"):
        tuned(target_modules=["1"])
    model = peft.get_peft_model(
        compress(net(), rank=3, grow="allow"), SpectralConfig(r=2, target_modules=["3"])
    )
    train(model)
    with pytest.raises(ConversionError, match="decompress"):
        model.merge_and_unload()
    one, two = tuned(), tuned(spectrum="free")
    with pytest.raises(RuntimeError, match="does not fit"):
        two.load_state_dict(one.state_dict())


def test_copies_do_not_share() -> None:
    model = train(tuned())
    y, twin = model(image()), copy.deepcopy(model)
    assert torch.equal(twin(image()), y)
    train(twin)
    assert torch.equal(model(image()), y)
    assert any(isinstance(m, SpectralTunerLayer) for m in twin.modules())


# -- Hugging Face's own networks ---------------------------------------------------------------


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize(("make", "task"), [(bert, "SEQ_CLS"), (gpt2, "CAUSAL_LM")])
def test_transformers_by_their_default_targets(tmp_path: Path, make: Any, task: str) -> None:
    """Bert's query and value; GPT-2's packed projection, a linear layer stored transposed."""
    tokens = torch.arange(12).reshape(2, 6)
    model = peft.get_peft_model(make(), SpectralConfig(r=4, task_type=task))
    with torch.no_grad():
        first = model(input_ids=tokens).logits
        assert torch.equal(first, make()(input_ids=tokens).logits)
    labels = torch.tensor([0, 1]) if task == "SEQ_CLS" else tokens
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        y = model(input_ids=tokens).logits
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(make(), tmp_path)
        assert torch.equal(again(input_ids=tokens).logits, y)
        close(model.merge_and_unload()(input_ids=tokens).logits, y, 1e-4)
