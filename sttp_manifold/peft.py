r"""Spectral adapters in Hugging Face's PEFT: `SpectralConfig`, beside `LoraConfig` and the others.

Import it once, and :func:`peft.get_peft_model`, ``save_pretrained``, ``from_pretrained``,
``add_adapter``, ``set_adapter``, ``disable_adapter``, ``merge_and_unload`` and the rest know the
method ``"SPECTRAL_TT"``. It needs the extra ``peft``, and nothing else of this package imports it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from torch import Tensor, nn

from sttp_manifold.errors import ConversionError
from sttp_manifold.nn.adapter_places import Place
from sttp_manifold.nn.adapting import check_options, zero_update
from sttp_manifold.nn.layer import SpectralLayer
from sttp_manifold.nn.modules import naming
from sttp_manifold.nn.recipe import Recipe
from sttp_manifold.nn.spectral_update import SpectralUpdate, kind_for

__all__ = ["SpectralConfig", "SpectralModel", "SpectralTunerLayer"]

_NAME = "spectral_tt"


def _type() -> Any:
    """Our member of PEFT's list of methods, which a method from outside has to add itself."""
    name = _NAME.upper()
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


SPECTRAL_TT = _type()


@dataclass
class SpectralConfig(PeftConfig):
    r"""Spectral adapters :math:`W + \alpha\, U \operatorname{diag}(s) V^\top`, zero at the start.

    The options are those of :func:`sttp_manifold.nn.adapt`, targets those of PEFT. With
    ``method="householder"`` any optimizer trains them; with ``"riemannian"`` one of
    :mod:`sttp_manifold.optim`, which a ``Trainer`` takes by ``optimizers=(optimizer, schedule)``.

    Args:
        r: rank of all bonds, lowered where a bond cannot carry it.
        alpha: factor in front of the update; its singular values are ``alpha * |s|`` at every rank.
        kind: ``"sttp"`` or ``"svdp"``.
        kernel: modes of the kernel of a convolution, ``"flat"`` or ``"factored"``.
        method: ``"householder"`` or ``"riemannian"``.
        spectrum: ``"full"``, ``"free"``, or ``"bounded"`` by ``bound``.
        bound: bound of the spectrum ``"bounded"``.
        init_frames: where frames start: ``"random"``, ``"eye"`` or ``"noisy_eye"``.
        target_modules: names of modules or ends of names, a regular expression, or
            ``"all-linear"``; by default those that PEFT has for LoRA in this architecture.
        exclude_modules: likewise, to be left out.
        layers_to_transform: numbers of the layers to adapt; by default all.
        layers_pattern: name of the list that holds these layers.
        modules_to_save: names of modules that are trained and saved whole, such as a new head.

    Raises:
        ConversionError: an unknown option, or one that an update cannot have.
        SpectrumError: a spectrum that does not hold zero.
        ValueError: contradicting targets.

    References:
        Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2022; [STTP] Sec. 3.

    Example:
        >>> import peft
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 4))
        >>> config = SpectralConfig(r=4, target_modules=["0"])
        >>> tuned = peft.get_peft_model(model, config)
        >>> tuned.get_nb_trainable_parameters()[0]
        128
    """

    r: int = 8
    alpha: float = 1.0
    kind: str = "sttp"
    kernel: str = "flat"
    method: str = "householder"
    spectrum: str = "full"
    bound: float = 1.0
    init_frames: str = "random"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    peft_type: Any = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPECTRAL_TT
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        chosen = self.layers_to_transform is not None
        if isinstance(self.target_modules, str) and (chosen or self.layers_pattern is not None):
            raise ValueError(
                "layers_to_transform and layers_pattern go with a list of target_modules, not with "
                f"the regular expression {self.target_modules!r}"
            )
        if self.layers_pattern and not chosen:
            raise ValueError("layers_pattern goes with layers_to_transform, as in [0, 1]")
        check_options("default", self.alpha, self.recipe)

    @property
    def recipe(self) -> Recipe:
        """The options of the weights."""
        return Recipe(
            rank=self.r,
            kind=self.kind,
            kernel=self.kernel,
            method=self.method,
            spectrum=self.spectrum,
            bound=self.bound,
            init=self.init_frames,
        )


class SpectralTunerLayer(nn.Module, BaseTunerLayer):
    """A layer with spectral updates, as PEFT handles it.

    Args:
        base_layer: the layer.
        adapter_name: name of the first adapter.
        config: its options.

    Raises:
        ConversionError: a layer that has no update.
    """

    # Of PEFT's mixin, beside which torch's module has an attribute of any name.
    active_adapters: Any
    disable_adapters: Any
    get_base_layer: Any
    merged: Any
    set_adapter: Any

    adapter_layer_names = ("spectral_tt_weight",)
    other_param_names = ("spectral_tt_alpha",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SpectralConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        kind_for(self.get_base_layer())
        self.spectral_tt_weight = nn.ModuleDict()
        self.spectral_tt_alpha: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._merged: dict[str, SpectralUpdate] = {}
        self._updates: dict[str, SpectralUpdate] = {}
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SpectralConfig) -> None:
        """Add an adapter, or put a new one in the place of that name.

        Args:
            adapter_name: its name.
            config: its options.
        """
        base = self.get_base_layer()
        update = zero_update(Place(base), config.recipe, config.alpha)
        update.twin(base)
        self.spectral_tt_weight[adapter_name] = update.weight
        self.spectral_tt_alpha[adapter_name] = config.alpha
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def update_of(self, adapter_name: str) -> SpectralUpdate:
        """The update of an adapter."""
        weight, alpha = self.spectral_tt_weight[adapter_name], self.spectral_tt_alpha[adapter_name]
        found = self._updates.get(adapter_name)
        if found is None or found.weight is not weight or found.alpha != alpha:
            found = self._updates[adapter_name] = SpectralUpdate(weight, alpha)  # type: ignore[arg-type]
        return found

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To the device of the layer, and not to its dtype: frames are kept in float32 at least."""
        weight = self.spectral_tt_weight[adapter_name]
        if not any(p.is_meta for p in weight.parameters()):
            weight.to(self.get_base_layer().weight.device if device is None else device)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The layer and its active updates.

        Args:
            *args: the layer's input.
            **kwargs: its options.

        Shape:
            - output: that of the layer
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.spectral_tt_weight:
                update = self.update_of(name).apply_like(self.get_base_layer(), *args, **kwargs)
                y = y + update.to(y.dtype)
        return y

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the weight.

        Args:
            adapter: its name.

        Shape:
            - output: the stock layer's weight
        """
        return self._delta(self.update_of(adapter))

    def _delta(self, update: SpectralUpdate) -> Tensor:
        return update.dense(self.get_base_layer())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight of the layer, in float32 at least, and round it once.

        Args:
            safe_merge: whether the sum is checked for numbers that are not finite.
            adapter_names: which; by default the active ones.

        Raises:
            ConversionError: a layer whose own weight is spectral.
            ValueError: a sum that is not finite, with ``safe_merge``.
        """
        base = self.get_base_layer()
        if isinstance(base, SpectralLayer):
            raise ConversionError(
                "its own weight is spectral, and the sum would be of higher rank; call "
                "sm.nn.decompress(model) before get_peft_model"
            )
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.spectral_tt_weight:
                continue
            update = self.update_of(name)
            new = self._sum(base.weight, self._delta(update))
            if safe_merge and not bool(new.isfinite().all()):
                raise ValueError(f"the weight with {name!r} has entries that are not finite")
            base.weight.data.copy_(new)
            self.merged_adapters.append(name)
            self._merged[name] = copy.deepcopy(update)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take back what :meth:`merge` added, whatever was trained in between."""
        base = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            update = self._merged.pop(name).to(base.weight.device)
            base.weight.data.copy_(self._sum(base.weight, -self._delta(update)))

    @staticmethod
    def _sum(weight: Tensor, delta: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Let an adapter go.

        Args:
            adapter_name: its name.
        """
        self._updates.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """The update is of low rank, and its size does not depend on the weight."""
        return True

    def __repr__(self) -> str:
        return "spectral." + super().__repr__()


class SpectralModel(BaseTuner):
    """A network with spectral adapters; made by :func:`peft.get_peft_model`.

    Args:
        model: the network.
        config: a :class:`SpectralConfig`.
        adapter_name: name of the adapter.
    """

    prefix = f"{_NAME}_"
    tuner_layer_cls = SpectralTunerLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: SpectralConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        with naming(current_key):
            if isinstance(target, SpectralTunerLayer):
                target.update_layer(adapter_name, peft_config)
                return
            new = SpectralTunerLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing to cast: an update is made in float32 at least."""

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Of a key in the file: an update is a module, and its numbers may lie deeper in it."""
        at = f".{cls.prefix}weight."
        head, found, tail = key.rpartition(at)
        return f"{head}{at}{tail.removeprefix(f'{adapter_name}.')}" if found else key


if SPECTRAL_TT not in PEFT_TYPE_TO_CONFIG_MAPPING:  # which a reload of this module finds there
    register_peft_method(name=_NAME, config_cls=SpectralConfig, model_cls=SpectralModel)
