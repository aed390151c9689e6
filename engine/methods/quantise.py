"""Frozen backbone weights in 4 bits (bitsandbytes NF4) or 8 bits, on CPU and GPU. Heads stay as they are: only the
layers named by `backbone_linears`, by full path, are replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ModelError
from regraft.engine.methods.settings import QuantiseSettings
from regraft.engine.methods.walk import backbone_linears
from regraft.kernels.int8_linear import Int8Linear
from regraft.kernels.nf4 import NF4Weight, dequantise, nf4_linear


def quantise_backbone(model: Any, method: str, settings: QuantiseSettings, precision: str = "fp32") -> None:
    """Replace every linear layer of the backbone: NF4 for `qlora`, rows of int8 for `int8`.

    Raises ModelError where bitsandbytes is missing or the model has nothing to quantise.
    """
    made = _nf4_maker(settings, precision) if method == "qlora" else Int8Linear
    for name, old in backbone_linears(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made(old))
    if method == "qlora":
        model.is_loaded_in_4bit = True  # peft asks the model, not its layers


def _nf4_maker(settings: QuantiseSettings, precision: str) -> Any:
    bnb = import_bitsandbytes("method: qlora")
    compute = precision if settings.compute == "auto" else settings.compute
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(compute, torch.float32)

    def make(old: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=settings.double,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(
            old.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=settings.double
        )
        # On CPUs with bf16 products bitsandbytes packs the weights anew in the first forward that needs no gradient, in place
        # and with scales cut to bf16: an evaluation would change the model that is trained, and small layers fail.
        new.support_avx512bf16_for_cpu = False
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        new = new.to(old.weight.device)  # this quantises
        if old.in_features % new.weight.quant_state.blocksize:
            new.forward = _linear_forward.__get__(new)
        return new

    return make


def _linear_forward(self: Any, x: Tensor) -> Tensor:
    # With AVX512, bitsandbytes 0.50 takes wrong scales for rows that end within a block of 64 numbers.
    dtype = self.compute_dtype or x.dtype
    bias = None if self.bias is None else self.bias.to(dtype)
    return nf4_linear(x.to(dtype), NF4Weight.of(self.weight), bias).to(x.dtype)


def import_bitsandbytes(what: str) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ModelError(f"{what} needs bitsandbytes, which is not installed: pip install 'regraft[quant]'") from None
    return bitsandbytes


def whole_weight(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight [out, in] that a quantised (or plain) linear layer computes with."""
    weight: Any = module.weight
    if isinstance(module, Int8Linear):
        return module.whole_weight(dtype)
    if getattr(weight, "quant_state", None) is not None:
        return dequantise(NF4Weight.of(weight), dtype)
    return weight.detach().to(dtype)


def is_quantised(module: Any) -> bool:
    """Whether a linear layer is one of `quantise_backbone` whose weight can be made whole."""
    if isinstance(module, Int8Linear):
        return True
    try:
        NF4Weight.of(module.weight)
    except (AttributeError, ValueError, TypeError):
        return False
    return True


class QuantisedWeights:
    """Weights [O, I] and biases [O] of quantised layers over the same input, made whole for a product and forgotten after it."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        self.layers, self.dtype = list(layers), dtype
        self._packed: dict[
            int, tuple[int, NF4Weight]
        ] = {}  # by place of the layer: where its values lie, and what they are

    def current(self) -> tuple[Tensor, Tensor | None]:
        """All one below the other."""
        with torch.no_grad():
            weights = [self._whole(place) for place in range(len(self.layers))]
            biases = [layer.bias.to(self.dtype) for layer in self.layers if layer.bias is not None]
            weight = torch.cat(weights) if len(weights) > 1 else weights[0]
            return weight, torch.cat(biases) if biases else None

    def _whole(self, place: int) -> Tensor:
        layer = self.layers[place]
        if isinstance(layer, Int8Linear):
            return layer.whole_weight(self.dtype)
        at = layer.weight.data_ptr()
        if self._packed.get(place, (None,))[0] != at:
            self._packed[place] = at, NF4Weight.of(layer.weight)
        return dequantise(self._packed[place][1], self.dtype)
