"""The kernels of adapters for bench/kernels_gpu.py: NF4 dequantisation, the linear layer over it, LoRA's linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor


def adapter_cases(device: str, case: Callable[..., Any], leaf: Callable[..., Tensor]) -> Iterator[Any]:
    """Cases at BERT-base sizes, each made when it is called; on CPU tiny ones."""
    big = device != "cpu"
    for out, width in ((3072, 768), (4096, 1024)) if big else ((64, 64),):
        yield partial(dequantise_case, device, case, out, width)
    yield partial(nf4_case, device, case, leaf, *((16384, 3072, 768) if big else (8, 64, 64)))
    for tokens in (16384, 1024) if big else (8,):
        yield partial(lora_case, device, case, leaf, tokens, *((768, 8) if big else (32, 4)))


def nf4_weight(out: int, width: int, device: str) -> Any:
    """A weight of random nibbles; speed does not ask for good ones."""
    from regraft.kernels.nf4 import NF4Weight

    packed = torch.randint(256, (out * width // 2,), device=device, dtype=torch.uint8)
    return NF4Weight(packed, torch.rand(out * width // 64, device=device), (out, width))


@cache
def code_on(device: torch.device) -> Tensor:
    """The 16 values; made once, for no graph can hold a copy from the host."""
    from regraft.kernels.nf4 import CODE

    return torch.tensor(CODE, device=device)


def plainly(weight: Any, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight by plain torch: look up both nibbles, multiply by the blocks' scales."""
    code = code_on(weight.packed.device)
    both = torch.stack((weight.packed >> 4, weight.packed & 15), dim=1).flatten().long()
    return (code[both].view(-1, weight.blocksize) * weight.absmax[:, None]).to(dtype).view(weight.shape)


def dequantise_case(device: str, case: Callable, out: int, width: int) -> Any:
    """Half a byte in and two out a value; there is nothing to differentiate."""
    from regraft.kernels.nf4 import NF4Weight, dequantise

    weight = nf4_weight(out, width, device)
    of = lambda packed, absmax: NF4Weight(packed, absmax, (out, width))  # noqa: E731
    forms: dict[str, Callable] = {"regraft": lambda *w: dequantise(of(*w)), "eager": lambda *w: plainly(of(*w))}
    forms["compile"] = forms["eager"]
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

        code = get_4bit_type("nf4", device=device)
        state = lambda absmax: QuantState(absmax, torch.Size((out, width)), code, 64, "nf4", torch.bfloat16)  # noqa: E731
        if device != "cpu":
            forms["bitsandbytes"] = lambda packed, absmax: dequantize_4bit(packed[:, None], state(absmax))
    except ImportError:
        pass
    moved = out * width * 2.5 + out * width / 64 * 4
    return case("NF4 dequantisation", f"{out} x {width}", [weight.packed, weight.absmax], forms, moved, 0.0)


def nf4_case(device: str, case: Callable, leaf: Callable, tokens: int, out: int, width: int) -> Any:
    """Against the product alone, over a weight that was never quantised: what the dequantising costs."""
    from regraft.kernels.nf4 import nf4_linear

    weight = nf4_weight(out, width, device)
    whole = plainly(weight)
    linear = torch.nn.functional.linear
    forms = {
        "regraft": lambda x: nf4_linear(x, weight),
        "eager": lambda x: linear(x, plainly(weight)),
        "bf16 weight": lambda x: linear(x, whole),
    }
    work = 2.0 * tokens * out * width
    shape = f"{tokens} x {width} -> {out}"
    return case("NF4 linear", shape, [leaf(tokens, width, device=device)], forms, work, work, "FLOPs")


def lora_case(device: str, case: Callable, leaf: Callable, tokens: int, width: int, rank: int) -> Any:
    """Queries, keys and values of one attention, each with an update; against three layers as peft computes them."""
    from regraft.kernels.lora import lora_linear

    weight = torch.randn(3 * width, width, device=device, dtype=torch.bfloat16)
    bias = torch.randn(3 * width, device=device, dtype=torch.bfloat16)
    linear = torch.nn.functional.linear

    def ours(x: Tensor, *parts: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, parts[:3], parts[3:], 2.0)

    def eager(x: Tensor, *parts: Tensor) -> Tensor:
        each = zip(weight.chunk(3), bias.chunk(3), parts[:3], parts[3:], strict=True)
        return torch.cat([linear(x, w, c) + 2.0 * linear(linear(x, a), b) for w, c, a, b in each], dim=-1)

    forms = {"regraft": ours, "eager": eager, "compile": eager}
    inputs = [leaf(tokens, width, device=device)]
    inputs += [leaf(rank, width, device=device) for _ in range(3)] + [
        leaf(width, rank, device=device) for _ in range(3)
    ]
    whole, low = 2.0 * tokens * width * 3 * width, 2.0 * tokens * rank * 6 * width
    shape = f"{tokens} x {width} -> 3 x {width}, rank {rank}"
    return case("LoRA linear", shape, inputs, forms, whole + low, whole + 2 * low, "FLOPs")
