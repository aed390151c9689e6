"""Weights stored in 4 bits (NF4, in bitsandbytes' layout), and the linear layer over them.

    W[i] = code[nibble_i] absmax[i // 64],   absmax = code2[m_j] absmax2[j // 256] + offset     (QLoRA, Dettmers et al. 2023)
    y = x W^T + bias,   dx = dy W                                                 W itself is frozen

Shape: packed holds two values a byte, the earlier one in the high half; [O, I] in all. A value moves half a byte in and 2
out (bf16); the product then is the BLAS's. The backward makes W again instead of keeping it: a model's weights never
exist all at once in 16 bits. Sizes of blocks are read from the weight's own quantisation state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from regraft.kernels import nf4_native
from regraft.kernels.checks import expect
from regraft.kernels.choice import use_triton
from regraft.kernels.lang import MORE_ROWS, cdiv, jit, store, tl
from regraft.kernels.shipped import Shipped

# Quantiles of the normal distribution, with an exact zero: the table of QLoRA, appendix E.
CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BYTES = 2048  # of a program: 16 a thread
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NF4Weight:
    """One quantised weight. Shape: packed [ceil(O I / 2)] uint8; absmax [blocks] fp32, or uint8 where it is quantised
    again, then with absmax2 [blocks of blocks] and code2 [256] fp32 and offset [] fp32. The offset stays a tensor: reading
    it would wait for the device."""

    packed: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    blocksize: int = 64
    absmax2: Tensor | None = None
    code2: Tensor | None = None
    offset: Tensor | None = None
    blocksize2: int = 256

    def __post_init__(self) -> None:
        count = self.shape[0] * self.shape[1]
        expect("packed", self.packed, shape=(cdiv(count, 2),), dtype=torch.uint8)
        if self.blocksize < 2 or self.blocksize % 2 or self.blocksize2 < 1:
            raise ValueError(f"blocksize: is {self.blocksize} of {self.blocksize2}, expected an even number of any")
        blocks = cdiv(count, self.blocksize)
        if self.absmax2 is None:
            expect("absmax", self.absmax, shape=(blocks,), dtype=torch.float32, like=self.packed)
            return
        expect("absmax", self.absmax, shape=(blocks,), dtype=torch.uint8, like=self.packed)
        expect("absmax2", self.absmax2, shape=(cdiv(blocks, self.blocksize2),), dtype=torch.float32, like=self.packed)
        if self.code2 is None or self.offset is None:
            raise ValueError("code2, offset: are missing, expected both where absmax2 is given")
        expect("code2", self.code2, shape=(256,), dtype=torch.float32, like=self.packed)
        expect("offset", self.offset, shape=(), dtype=torch.float32, like=self.packed)

    @classmethod
    def of(cls, parameter: Any) -> NF4Weight:
        """From the weight of bitsandbytes' Linear4bit (Params4bit). Raises ValueError where it is not NF4."""
        state = getattr(parameter, "quant_state", None)
        if state is None:
            raise ValueError("weight: is not quantised yet, expected a Params4bit that has been moved to its device")
        if state.quant_type != "nf4":
            raise ValueError(f"weight: quantised as {state.quant_type}, expected nf4")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("weight: is repacked for inference on CPU, expected the layout of training")
        packed = parameter.data.reshape(-1).view(torch.uint8)
        rows, columns = state.shape
        plain = {
            "packed": packed,
            "absmax": state.absmax,
            "shape": (int(rows), int(columns)),
            "blocksize": state.blocksize,
        }
        if state.state2 is None:
            return cls(**plain)
        second = state.state2
        offset = torch.as_tensor(state.offset, dtype=torch.float32, device=packed.device)
        return cls(
            **plain, absmax2=second.absmax, code2=second.code, offset=offset.reshape(()), blocksize2=second.blocksize
        )


def dequantise(weight: NF4Weight, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The weight [O, I] in fp32, bf16 or fp16; calculated in fp32 and rounded once."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype: is {dtype}, expected float32, bfloat16 or float16")
    return _dequantise(*_arguments(weight), dtype)


def nf4_linear(x: Tensor, weight: NF4Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in x's dtype (autocast's, where it is on), differentiable in x and bias.

    Shape: x [.., I], bias [O] -> [.., O]. Raises ValueError or TypeError, naming the argument.
    """
    expect(
        "x",
        x,
        shape=(*(None,) * max(0, x.dim() - 1), weight.shape[1]),
        dtype=FLOATS,
        like=weight.packed,
        contiguous=False,
    )
    if bias is not None:
        expect("bias", bias, shape=(weight.shape[0],), like=x)
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    rows = x.reshape(-1, x.shape[-1])
    y = _linear(rows.contiguous(), *_arguments(weight))
    return (y if bias is None else y + bias.to(y.dtype)).view(*x.shape[:-1], weight.shape[0])


def _arguments(w: NF4Weight) -> tuple:
    return w.packed, w.absmax, w.absmax2, w.code2, w.offset, w.shape[0], w.shape[1], w.blocksize, w.blocksize2


@lru_cache(maxsize=32)
def _code(device: torch.device) -> Tensor:
    return torch.tensor(CODE, dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
def _pairs(device: torch.device) -> Tensor:
    # both values of each of the 256 bytes, [256], eight bytes each: one look-up gives two values
    code = torch.tensor(CODE, dtype=torch.float32)
    byte = torch.arange(256)
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).view(torch.int64)[:, 0].to(device)


def _scales(absmax: Tensor, absmax2: Tensor | None, code2: Tensor | None, offset: Tensor | None, size2: int) -> Tensor:
    if absmax2 is None or code2 is None or offset is None:
        return absmax
    second = torch.repeat_interleave(absmax2, size2)[: absmax.shape[0]]
    return code2.index_select(0, absmax.int()).mul_(second).add_(offset)


@torch.library.custom_op("regraft::nf4_dequantise", mutates_args=())
def _dequantise(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    blocksize2: int,
    dtype: torch.dtype,
) -> Tensor:
    """W [O, I]."""
    count = rows * columns
    if use_triton(packed):
        out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
        if count:
            tile = BYTES * MORE_ROWS
            _kernel[(cdiv(packed.shape[0], tile),)](
                packed, _code(packed.device), absmax, absmax2, code2, offset, out, packed.shape[0], count, absmax.shape[0],
                HALF=blocksize // 2, SECOND=blocksize2, NESTED=absmax2 is not None, BYTES=tile,
            )  # fmt: skip
        return out
    if nf4_native.runs_here(packed, dtype):
        again = None if absmax2 is None or code2 is None or offset is None else (absmax2, code2, offset)
        shape, blocks = (rows, columns), (blocksize, blocksize2)
        return nf4_native.dequantise(packed, _code(packed.device), absmax, again, shape, blocks, dtype)
    scales = _scales(absmax, absmax2, code2, offset, blocksize2)
    values = _pairs(packed.device).index_select(0, packed.int()).view(torch.float32)
    whole = count // blocksize * blocksize
    values[:whole].view(-1, blocksize).mul_(scales[: whole // blocksize, None])
    values[whole:].mul_(scales[-1:])
    return values[:count].to(dtype).view(rows, columns)


@_dequantise.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    blocksize2: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)


@torch.library.custom_op("regraft::nf4_linear", mutates_args=())
def _linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    blocksize2: int,
) -> Tensor:
    state = (absmax, absmax2, code2, offset, rows, columns, blocksize, blocksize2)
    return torch.mm(x, _dequantise(packed, *state, x.dtype).t())


@_linear.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    absmax2: Tensor | None,
    code2: Tensor | None,
    offset: Tensor | None,
    rows: int,
    columns: int,
    blocksize: int,
    blocksize2: int,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:6])
    ctx.sizes = inputs[6:]


def _gradients(ctx: Any, dy: Tensor) -> tuple:
    return torch.mm(dy, _dequantise(*ctx.saved_tensors, *ctx.sizes, dy.dtype)), *(None,) * 9


_linear.register_autograd(_gradients, setup_context=_setup)


@jit
def _kernel(
    packed_ptr, code_ptr, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, out_ptr, size, count, blocks,
    HALF: tl.constexpr, SECOND: tl.constexpr, NESTED: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    here = at < size
    byte = tl.load(packed_ptr + at, mask=here, other=0).to(tl.int32)
    block = at // HALF
    inside = here & (block < blocks)
    if NESTED:
        number = tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(code2_ptr + number) * tl.load(absmax2_ptr + block // SECOND, mask=inside, other=0.0)
        scale += tl.load(offset_ptr)
    else:
        scale = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    high = tl.load(code_ptr + (byte >> 4)) * scale
    low = tl.load(code_ptr + (byte & 15)) * scale
    both = tl.reshape(tl.join(high, low), [2 * BYTES])
    to = tl.program_id(0).to(tl.int64) * 2 * BYTES + tl.arange(0, 2 * BYTES)
    store(out_ptr + to, both, to < count)


def shipped() -> list[Shipped]:
    """Into bf16, with absmax in fp32 and quantised again."""
    found = []
    for nested in (False, True):
        types = {
            "packed_ptr": "*u8", "code_ptr": "*fp32", "absmax_ptr": "*u8" if nested else "*fp32", "absmax2_ptr": "*fp32",
            "code2_ptr": "*fp32", "offset_ptr": "*fp32", "out_ptr": "*bf16", "size": "i32", "count": "i32", "blocks": "i32",
        }  # fmt: skip
        constants = {"HALF": 32, "SECOND": 256, "NESTED": nested, "BYTES": BYTES}
        name = "nf4 doubly quantised" if nested else "nf4"
        found.append(Shipped.of(name, _kernel, types, constants, aligned=("size", "count")))
    return found
