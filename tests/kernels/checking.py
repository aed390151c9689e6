"""How a kernel is held to its reference: fp64, twice plain torch's own error, poisoned memory, both forms.

Tests of kernels run where they find themselves: interpreted on CPU, compiled on a GPU (`make test-gpu`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

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

    `inputs` come from fresh(); where several draws are needed, the later ones are of the same size. They are rounded to
    `dtype` first, so that what is held against a kernel is its own error.
    """
    labels = ["out", *(names or [f"gradient of input {i}" for i in range(len(inputs))])]
    sizes = [float(x.square().mean().sqrt()) if x.numel() else 0.0 for x in inputs]
    first = True

    def measure() -> list[Measured]:
        nonlocal first
        drawn = inputs if first else [fresh(*x.shape, scale=size) for x, size in zip(inputs, sizes, strict=True)]
        first = False
        drawn = [x.to(dtype).double() for x in drawn]
        with torch.no_grad():
            weight = torch.randn_like(plain(*drawn)).to(dtype).double()
        exact = values_and_gradients(plain, drawn, torch.float64, weight)
        theirs = values_and_gradients(plain, drawn, dtype, weight)
        with forced(form), poisoned():
            ours = values_and_gradients(kernel, drawn, dtype, weight)
        for label, found in zip(labels, ours, strict=True):
            assert found.dtype == dtype, f"{label} is {found.dtype}"
        return [Measured.of(*each) for each in zip(labels, exact, theirs, ours, strict=True)]

    hold_over_draws(measure)


@dataclass(frozen=True)
class Measured:
    """The largest errors of one result: a kernel's, plain torch's, and what one rounding of the result may be off by."""

    label: str
    error: float
    plain_error: float
    rounding: float

    @classmethod
    def of(
        cls,
        label: str,
        exact: Tensor,
        plain: Tensor,
        found: Tensor,
        *,
        roundings: int = 1,
        to: torch.dtype | None = None,
    ) -> Measured:
        """Shape: three tensors alike, `exact` in fp64, `found` finite. `to`: what is rounded to, if not found's dtype."""
        assert torch.isfinite(found).all(), f"{label} holds values that are not finite"
        if not found.numel():
            return cls(label, 0.0, 0.0, 0.0)
        size = torch.finfo(to or found.dtype).eps * float(exact.abs().max())
        errors = (float((x.double() - exact).abs().max()) for x in (found, plain))
        return cls(label, *errors, roundings * size)

    def __add__(self, other: Measured) -> Measured:
        """The sums over both draws."""
        pairs = zip(astuple(self)[1:], astuple(other)[1:], strict=True)
        return Measured(self.label, *(sum(pair) for pair in pairs))

    @property
    def holds(self) -> bool:
        # a result that plain torch happens to hit exactly may still be off by a rounding
        return self.error <= 2 * max(self.plain_error, self.rounding)


def hold_over_draws(measure: Callable[[], Sequence[Measured]], draws: int = 8) -> None:
    """Largest errors are at most twice plain torch's, on average over as many draws as it takes to tell, at most `draws`.

    In one draw of few values chance decides which side rounds luckily, and plain torch may be off by nothing. The largest
    of a draw has a heavy tail on either side (a row of attention that sees one token alone leaves differences of equal
    numbers), so draws are averaged; what is wrong and not only rounded is off by hundreds of times as much.
    """
    all_of_them = measure()
    for _ in range(draws - 1):
        if all(each.holds for each in all_of_them):
            return
        all_of_them = [a + b for a, b in zip(all_of_them, measure(), strict=True)]
    for each in all_of_them:
        assert each.holds, (
            f"{each.label}: error {each.error / draws:.3g}, plain torch's {each.plain_error / draws:.3g}, "
            f"mean of the largest in {draws} draws"
        )


def attention_by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float,
    window: int | None = None,
    keys: list[int] | None = None,
) -> Tensor:
    """Plain attention, sequence by sequence: q [M, H, D], k, v [T, H, D]; `keys`: lengths of k's where they differ."""
    out = []
    for a, b, c in zip(q.split(lengths), k.split(keys or lengths), v.split(keys or lengths), strict=True):
        scores = torch.einsum("ihd,jhd->hij", a, b) * scale
        if window is not None:
            at = torch.arange(len(a))
            scores = scores.masked_fill(((at[:, None] - at[None, :]).abs() > window)[None], float("-inf"))
        out.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
    return torch.cat(out)


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
