"""Frozen backbone weights in 4 bits (bitsandbytes NF4) or 8 bits, on CPU and GPU. Heads stay as they are: only the
layers named by `backbone_linears`, by full path, are replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from regraft.engine.errors import ModelError
from regraft.engine.methods.settings import QuantiseSettings
from regraft.engine.methods.walk import backbone_linears
from regraft.kernels.int8_linear import Int8Linear


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
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data, requires_grad=False)
        return new.to(old.weight.device)  # this quantises

    return make


def import_bitsandbytes(what: str) -> Any:
    try:
        import bitsandbytes
    except ImportError:
        raise ModelError(f"{what} needs bitsandbytes, which is not installed: pip install 'regraft[quant]'") from None
    return bitsandbytes


def whole_weight(module: nn.Module) -> Tensor:
    """The weight [out, in] in fp32 that a quantised (or plain) linear layer computes with."""
    weight: Any = module.weight
    if isinstance(module, Int8Linear):
        return module.whole_weight()
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    return weight.detach().float()
