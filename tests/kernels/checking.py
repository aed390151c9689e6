"""How a kernel is held to its reference: fp64, twice plain torch's own error, poisoned memory, both forms.

Tests of kernels run where they find themselves: interpreted on CPU, compiled on a GPU (`make test-gpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from regraft.kernels.choice import forced
from regraft.kernels.lang import HAS_TRITON, IS_INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
FORMS = ["reference", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_triton = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not IS_INTERPRETED), reason="Triton is neither interpreted nor on a GPU"
)
both_forms = pytest.mark.parametrize("form", ["reference", pytest.param("triton", marks=needs_triton)])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def fresh(*shape: int, scale: float = 1.0) -> Tensor:
    """Random fp64 values, other ones in every run (pytest shows the seed of a failure as torch's initial seed)."""
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE) * scale


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that torch hands out uninitialised holds NaN (integers: the largest) instead of what happened to be there."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def values_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype, weight: Tensor
) -> list[Tensor]:
    """function(*inputs) in `dtype`, then the gradients of sum(out * weight) for every input; all detached."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    (out * weight.to(out.dtype)).sum().backward()
    return [out.detach(), *(x.grad if x.grad is not None else torch.zeros_like(x) for x in leaves)]


def hold_to_twice_the_error(
    kernel: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    form: str,
    names: Sequence[str] = (),
) -> None:
    """Values and all gradients of `kernel` differ from `plain` in fp64 at most twice as much as `plain` in `dtype`.

    Shape: inputs are fp64. They are rounded to `dtype` first, so that what is held against a kernel is its own error.
    """
    inputs = [x.to(dtype).double() for x in inputs]
    with torch.no_grad():
        weight = torch.randn_like(plain(*inputs)).to(dtype).double()
    exact = values_and_gradients(plain, inputs, torch.float64, weight)
    theirs = values_and_gradients(plain, inputs, dtype, weight)
    with forced(form), poisoned():
        ours = values_and_gradients(kernel, inputs, dtype, weight)
    labels = ["out", *(names or [f"gradient of input {i}" for i in range(len(inputs))])]
    for label, wanted, other, found in zip(labels, exact, theirs, ours, strict=True):
        assert found.dtype == dtype, f"{label} is {found.dtype}"
        assert torch.isfinite(found).all(), f"{label} holds values that are not finite"
        error = float((found.double() - wanted).abs().max()) if found.numel() else 0.0
        plain_error = float((other.double() - wanted).abs().max()) if found.numel() else 0.0
        # a result that plain torch happens to hit exactly may still be off by one rounding
        one_rounding = torch.finfo(dtype).eps * float(wanted.abs().max()) if found.numel() else 0.0
        assert error <= 2 * max(plain_error, one_rounding), (
            f"{label}: error {error:.3g}, plain torch's {plain_error:.3g}"
        )


def hold_gradients_to_finite_differences(function: Callable[..., Tensor], inputs: Sequence[Tensor], form: str) -> None:
    """fp64 gradcheck of a small case in one form; along random directions, where every call is interpreted."""
    with forced(form), poisoned():
        assert torch.autograd.gradcheck(
            function, [x.detach().clone().requires_grad_() for x in inputs], fast_mode=form == "triton"
        )


def same_bits_twice(function: Callable[[], Sequence[Tensor]], form: str) -> None:
    """Two runs give the same bits."""
    with forced(form):
        first, second = function(), function()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
