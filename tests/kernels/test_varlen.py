"""Variable-length attention against fp64, in plain torch and in Triton: dropout, window, rotary, odd lengths."""

from __future__ import annotations

import math

import pytest
import torch

from checking import (
    DEVICE,
    both_forms,
    each_dtype,
    fresh,
    hold_gradients_to_finite_differences,
    hold_to_twice_the_error,
    needs_triton,
    poisoned,
    same_bits_twice,
)
from regraft.kernels import varlen
from regraft.kernels.choice import forced
from regraft.kernels.philox import make_seed
from regraft.kernels.varlen import varlen_attention


def cu_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def angles(lengths: list[int], size: int) -> dict[str, torch.Tensor]:
    position = torch.cat([torch.arange(n, dtype=torch.float64, device=DEVICE) for n in lengths])
    rate = 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64, device=DEVICE) * 2 / size)
    return {"cos": (position[:, None] * rate).cos(), "sin": (position[:, None] * rate).sin()}


def hold(form, lengths, heads, size, dtype=torch.float32, **options):
    if options.pop("rotary", False):
        options |= angles(lengths, size)
    cu, longest = cu_of(lengths), max(lengths)
    hold_to_twice_the_error(
        lambda qkv: varlen_attention(qkv, cu, longest, **options),
        lambda qkv: varlen.reference(qkv, cu, longest, **options),
        [fresh(sum(lengths), 3, heads, size)],
        dtype,
        form=form,
        names=["qkv"],
    )


@both_forms
@each_dtype
def test_it_is_as_near_to_fp64_as_plain_torch(form, dtype):
    hold(form, [97, 1, 65, 3], 2, 32, dtype, p=0.1, seed=make_seed(3, DEVICE), site=7)


@both_forms
@pytest.mark.parametrize("size", [32, 64, 96, 128])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_every_head_size_with_and_without_rotary_positions(form, size, rotary):
    hold(form, [40, 7], 1, size, torch.bfloat16, rotary=rotary)


@both_forms
@pytest.mark.parametrize("size", [4, 26, 80])
def test_head_sizes_of_models_that_are_no_powers_of_two(form, size):
    hold(form, [40, 7], 2, size, rotary=True)


def test_a_head_too_large_for_triton_runs_as_plain_torch_and_the_log_says_so_once(monkeypatch, caplog):
    # as on a GPU: Triton would run, and nothing is interpreted
    monkeypatch.setattr(varlen, "use_triton", lambda x: True)
    monkeypatch.setattr(varlen, "IS_INTERPRETED", False)
    varlen._say_too_large.cache_clear()
    qkv = fresh(9, 3, 1, 192).float().requires_grad_()
    for _ in range(2):
        found = varlen_attention(qkv, cu_of([4, 5]), 5)
        found.sum().backward()
    assert torch.allclose(found, varlen.reference(qkv, cu_of([4, 5])), atol=1e-5)
    assert len(caplog.messages) == 1 and "head size is 192" in caplog.text
    with forced("triton"), pytest.raises(ValueError, match="head size is 192, expected at most 128"):
        varlen_attention(qkv, cu_of([4, 5]), 5)


@both_forms
@pytest.mark.parametrize("window", [1, 5, 64, 500])
def test_only_tokens_within_the_window_are_seen(form, window):
    hold(form, [150, 31], 1, 32, window=window, rotary=True)


@both_forms
def test_a_window_of_nothing_gives_every_token_its_own_value(form):
    qkv = fresh(9, 3, 2, 32).float()
    with forced(form):
        assert torch.allclose(varlen_attention(qkv, cu_of([7, 2]), 7, window=0), qkv[:, 2], atol=1e-6)


@both_forms
@pytest.mark.parametrize("options", [{}, {"p": 0.1, "rotary": True, "window": 64}], ids=["plain", "all at once"])
def test_a_long_sequence_beside_short_ones(form, options):
    seed = {"seed": make_seed(9, DEVICE)} if options else {}
    hold(form, [1025, 1, 2], 1, 32, torch.bfloat16, **options, **seed)


@both_forms
@pytest.mark.parametrize("options", [{}, {"p": 0.3}, {"window": 2}], ids=["plain", "dropout", "window"])
def test_gradients_are_those_of_finite_differences(form, options):
    lengths = [4, 1, 3]
    options = {**options, "seed": make_seed(2, DEVICE), **angles(lengths, 4)}
    hold_gradients_to_finite_differences(
        lambda qkv: varlen_attention(qkv, cu_of(lengths), 4, **options), [fresh(8, 3, 2, 4)], form
    )


@both_forms
def test_empty_sequences_and_no_tokens(form):
    qkv = fresh(7, 3, 2, 32).float()
    with forced(form):
        found = varlen_attention(qkv, cu_of([0, 5, 0, 0, 2]), 5)
        wanted = varlen_attention(qkv, cu_of([5, 2]), 5)
        nothing = varlen_attention(qkv[:0].requires_grad_(), cu_of([0, 0]), 5)
        nothing.sum().backward()
    assert torch.equal(found, wanted)
    assert nothing.shape == (0, 2, 32)


@both_forms
def test_a_longer_max_seqlen_changes_nothing(form):
    qkv = fresh(9, 3, 1, 32).float()
    with forced(form):
        a, b = (varlen_attention(qkv, cu_of([4, 5]), n, p=0.2, seed=make_seed(1, DEVICE)) for n in (5, 64))
    assert torch.allclose(a, b, atol=1e-6)


@needs_triton
def test_sites_heads_and_sequences_draw_masks_of_their_own_the_same_in_both_forms():
    n = 24
    qkv = torch.zeros(2 * n, 3, 2, 32, device=DEVICE)
    qkv[:n, 2, :, :n] = qkv[n:, 2, :, :n] = torch.eye(n, device=DEVICE)[
        :, None
    ]  # out is the dropped weights themselves
    found = {}
    for form in ("reference", "triton"):
        for site in (0, 1):
            with forced(form):
                out = varlen_attention(qkv, cu_of([n, n]), n, p=0.5, seed=make_seed(6, DEVICE), site=site)
            found[form, site] = out[..., :n] != 0
    assert torch.equal(found["reference", 0], found["triton", 0])
    mask = found["triton", 0]
    assert 0.4 < float(mask.float().mean()) < 0.6
    for other in (found["triton", 1], mask.flip(1), mask.roll(n, 0)):
        assert 0.4 < float((mask == other).float().mean()) < 0.6


@both_forms
def test_two_runs_give_the_same_bits(form):
    qkv = fresh(80, 3, 2, 32).bfloat16().requires_grad_()
    seed = make_seed(1, DEVICE)

    def run():
        out = varlen_attention(qkv, cu_of([70, 10]), 70, p=0.1, seed=seed)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [qkv])]

    same_bits_twice(run, form)


@both_forms
def test_scores_far_apart_do_not_overflow(form):
    qkv = fresh(20, 3, 1, 32).float() * 100
    with forced(form):
        out = varlen_attention(qkv.requires_grad_(), cu_of([20]), 20)
        out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(qkv.grad).all()


@both_forms
@each_dtype
def test_scores_that_are_all_far_below_zero_have_finite_gradients(form, dtype):
    # what lies beyond a sequence counts as a score of 0, which none of its own comes near
    lengths = [5, 33, 1]
    cu, qkv = cu_of(lengths), fresh(sum(lengths), 3, 2, 32) * 0.1
    qkv[:, 0] += 5
    qkv[:, 1] -= 5
    qkv = qkv.to(dtype)
    weight = fresh(sum(lengths), 2, 32).to(dtype)
    found, wanted = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    with forced(form), poisoned():
        (varlen_attention(found, cu, 33) * weight).sum().backward()
    (varlen.reference(wanted, cu, 33) * weight).sum().backward()
    # a probability is taken from a score of about -140 and as large a logarithm, with the rounding of both
    off = (found.grad.double() - wanted.grad).abs().max() / wanted.grad.abs().max()
    assert off < {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


def test_the_operator_is_registered_in_full_and_compiles_into_one_graph():
    qkv, cu = fresh(6, 3, 1, 32).requires_grad_(), cu_of([4, 2])
    torch.library.opcheck(varlen._forward, (qkv, cu, 4, 0.2, -1, None, None, None, 0.0, 0))
    compiled = torch.compile(lambda x: varlen_attention(x, cu, 4), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(qkv), varlen.reference(qkv, cu))


def test_torch_flash_attention_is_handed_nothing_on_cpu_nor_when_a_form_is_forced():
    qkv = torch.zeros(4, 3, 1, 64, dtype=torch.bfloat16)
    assert not varlen.hands_over(qkv, 4, 0.0)
    meta = torch.empty(4, 3, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    with forced("triton"):
        assert not varlen.hands_over(meta, 4, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rotary", [False, True])
def test_torch_flash_attention_gives_the_same_numbers(rotary):
    lengths = [512, 31, 1, 97]
    qkv, cu = fresh(sum(lengths), 3, 12, 64).bfloat16(), cu_of(lengths)
    extra = {k: v.float() for k, v in angles(lengths, 64).items()} if rotary else {}
    assert varlen.hands_over(qkv, 512, 0.0)
    handed = varlen_attention(qkv, cu, 512, **extra)
    with forced("triton"):
        own = varlen_attention(qkv, cu, 512, **extra)
    assert torch.allclose(handed.float(), own.float(), atol=2e-2)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"qkv": torch.zeros(4, 2, 1, 32)}, r"qkv: shape is \[4, 2, 1, 32\], expected \[any, 3, any, any\]"),
        ({"qkv": torch.zeros(4, 3, 32, 2).transpose(2, 3)}, "qkv: strides"),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int64)}, "cu_seqlens: dtype is int64, expected int32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens: is empty"),
        ({"cos": torch.zeros(4, 16)}, "sin: is None"),
        ({"cos": torch.zeros(4, 32), "sin": torch.zeros(4, 32)}, "cos: shape"),
        ({"window": -1}, "window: is -1"),
        ({"max_seqlen": 0}, "max_seqlen: is 0"),
        ({"p": -0.5}, "p: is -0.5"),
    ],
)
def test_what_it_does_not_take_is_refused_by_name(change, said):
    good = {"qkv": torch.zeros(4, 3, 1, 32), "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4}
    with pytest.raises((ValueError, TypeError), match=said):
        varlen_attention(**{**good, **change})


def test_the_reference_is_softmax_attention_with_rotated_positions():
    lengths, size = [5, 3], 8
    turn = angles(lengths, size)
    qkv = fresh(8, 3, 1, size)
    found = varlen.reference(qkv, cu_of(lengths), **turn)
    pair = lambda x: torch.complex(x[:, 0, : size // 2], x[:, 0, size // 2 :])  # noqa: E731
    q, k = (pair(qkv[:, i]) * torch.complex(turn["cos"], turn["sin"]) for i in (0, 1))
    for start, end in ((0, 5), (5, 8)):
        scores = (q[start:end] @ k[start:end].conj().T).real / math.sqrt(size)
        assert torch.allclose(found[start:end, 0], scores.softmax(-1) @ qkv[start:end, 2, 0])
