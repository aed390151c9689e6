"""NF4 weights against their definition and bitsandbytes, in plain torch and in Triton; the layer against the plain one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from checking import DEVICE, both_forms, fresh, poisoned, same_bits_twice
from regraft.kernels import nf4
from regraft.kernels.choice import forced
from regraft.kernels.nf4 import NF4Weight, dequantise, nf4_linear

every_form = pytest.mark.parametrize("form", [*both_forms.mark.args[1], "auto"])  # the last one is C on a CPU
SHAPES = [(96, 384, 64), (300, 70, 64), (1, 3, 64), (5, 33, 128)]


def quantised(rows: int, columns: int, double: bool, blocksize: int = 64) -> NF4Weight:
    """A random weight, each block scaled to its largest value and put to the nearest of the 16; a GPU machine may have no
    bitsandbytes to do so."""
    values = fresh(rows, columns).float().flatten()
    blocks = list(values.split(blocksize))
    absmax = torch.stack([block.abs().max() for block in blocks])
    code = torch.tensor(nf4.CODE, device=DEVICE)
    nibbles = torch.cat([(b[:, None] / m - code).abs().argmin(1) for b, m in zip(blocks, absmax, strict=True)])
    nibbles = torch.nn.functional.pad(nibbles, (0, len(nibbles) % 2))
    packed = (nibbles[0::2] * 16 + nibbles[1::2]).to(torch.uint8)
    if not double:
        return NF4Weight(packed, absmax, (rows, columns), blocksize)
    offset, code2 = absmax.mean(), torch.linspace(-1, 1, 256, device=DEVICE)
    absmax2 = torch.stack([part.abs().max() for part in (absmax - offset).split(256)]) + 1e-3
    each = absmax2.repeat_interleave(256)[: len(absmax)]
    again = ((absmax - offset)[:, None] / each[:, None] - code2).abs().argmin(1).to(torch.uint8)
    return NF4Weight(packed, again, (rows, columns), blocksize, absmax2=absmax2, code2=code2, offset=offset)


def by_definition(weight: NF4Weight) -> torch.Tensor:
    """Value by value, in fp64."""
    packed, absmax = weight.packed.tolist(), weight.absmax.tolist()
    if weight.absmax2 is not None:
        code2, offset = weight.code2.tolist(), float(weight.offset)
        absmax = [code2[m] * float(weight.absmax2[j // weight.blocksize2]) + offset for j, m in enumerate(absmax)]
    rows, columns = weight.shape
    nibbles = [packed[i // 2] >> 4 if i % 2 == 0 else packed[i // 2] & 15 for i in range(rows * columns)]
    values = [nf4.CODE[n] * absmax[i // weight.blocksize] for i, n in enumerate(nibbles)]
    return torch.tensor(values, dtype=torch.float64, device=DEVICE).view(rows, columns)


def of_bitsandbytes(rows: int, columns: int, double: bool, blocksize: int = 64, kind: str = "nf4"):
    """A random weight as bitsandbytes stores it."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    data = fresh(rows, columns).cpu().float()
    options = {"quant_type": kind, "compress_statistics": double, "blocksize": blocksize}
    return bitsandbytes.nn.Params4bit(data, requires_grad=False, **options).to(DEVICE)


def theirs(parameter, dtype: torch.dtype) -> torch.Tensor:
    import bitsandbytes

    with torch.compiler.set_stance("force_eager"):  # it compiles itself for odd shapes, which takes half a minute
        return bitsandbytes.functional.dequantize_4bit(parameter.data, parameter.quant_state).to(dtype)


@every_form
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows, columns, blocksize", SHAPES)
def test_every_value_is_that_of_the_definition(form, double, rows, columns, blocksize):
    weight = quantised(rows, columns, double, blocksize)
    with forced(form), poisoned():
        found = dequantise(weight, torch.float32)
        rounded = dequantise(weight, torch.bfloat16)
    torch.testing.assert_close(found.double(), by_definition(weight), rtol=3e-7, atol=2e-7)
    assert torch.equal(rounded, found.bfloat16())


@every_form
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows, columns, blocksize", SHAPES)
def test_it_is_what_bitsandbytes_makes_of_it(form, double, rows, columns, blocksize):
    parameter = of_bitsandbytes(rows, columns, double, blocksize)
    wanted = theirs(parameter, torch.float32)
    with forced(form), poisoned():
        found = dequantise(NF4Weight.of(parameter), torch.float32)
        rounded = dequantise(NF4Weight.of(parameter), torch.bfloat16)
    # one step of fp32: whether code2 * absmax2 + offset is fused is the machine's business
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=1e-7)
    assert torch.equal(rounded, found.bfloat16())


def test_the_code_is_that_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert torch.equal(torch.tensor(nf4.CODE), bitsandbytes.functional.get_4bit_type("nf4", device="cpu"))


@every_form
def test_the_layer_and_its_gradient_are_those_of_the_dequantised_weight(form):
    weight = quantised(48, 96, double=True)
    x, bias = fresh(2, 5, 96).float().requires_grad_(), fresh(48).float().requires_grad_()
    twins = [t.detach().clone().requires_grad_() for t in (x, bias)]
    with forced(form):
        y = nf4_linear(x, weight, bias)
        y.square().sum().backward()
        plain = torch.nn.functional.linear(twins[0], dequantise(weight, torch.float32), twins[1])
    plain.square().sum().backward()
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(x.grad, twins[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, twins[1].grad, rtol=1e-4, atol=1e-4)


def test_it_does_not_keep_the_dequantised_weight_for_the_backward():
    weight = quantised(64, 64, double=False)
    kept: list[int] = []
    x = torch.ones(3, 64, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        nf4_linear(x, weight)
    assert max(kept) == 64 * 64 // 2


@every_form
def test_no_rows_give_no_rows(form):
    weight = quantised(8, 16, double=False)
    with forced(form):
        assert nf4_linear(torch.zeros(0, 16, device=DEVICE), weight).shape == (0, 8)


@every_form
def test_two_runs_give_the_same_bits(form):
    weight = quantised(33, 40, double=True)
    same_bits_twice(lambda: [dequantise(weight)], form)


def test_the_operators_are_registered_in_full_and_compile_into_one_graph():
    weight = quantised(8, 16, double=True)
    x = fresh(4, 16).float().requires_grad_()
    arguments = nf4._arguments(weight)
    torch.library.opcheck(nf4._dequantise, (*arguments, torch.bfloat16))
    torch.library.opcheck(nf4._linear, (x, *arguments))
    compiled = torch.compile(lambda x: nf4_linear(x * 2, weight), fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch.testing.assert_close(compiled(x), nf4_linear(x * 2, weight))


def test_what_it_does_not_take_is_refused_by_name():
    good = quantised(8, 16, double=True)
    with pytest.raises(ValueError, match=r"packed: shape is \[63\], expected \[64\]"):
        replace(good, packed=good.packed[:63])
    with pytest.raises(TypeError, match="absmax: dtype is uint8, expected float32"):
        replace(good, absmax2=None)
    with pytest.raises(ValueError, match="code2, offset: are missing"):
        replace(good, offset=None)
    with pytest.raises(ValueError, match="blocksize: is 3"):
        replace(good, blocksize=3)
    with pytest.raises(ValueError, match=r"x: shape is \[2, 15\], expected \[any, 16\]"):
        nf4_linear(torch.zeros(2, 15, device=DEVICE), good)
    with pytest.raises(TypeError, match=r"dtype: is torch\.float64"):
        dequantise(good, torch.float64)
    with pytest.raises(ValueError, match="is not quantised yet"):
        NF4Weight.of(torch.zeros(2, 2))


def test_another_code_of_bitsandbytes_is_refused():
    with pytest.raises(ValueError, match="quantised as fp4, expected nf4"):
        NF4Weight.of(of_bitsandbytes(8, 16, double=True, kind="fp4"))
