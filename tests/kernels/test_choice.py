"""Which form of a kernel runs, and how what it cannot take is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from regraft.kernels import choice, lang
from regraft.kernels.checks import expect, expect_range


def test_cpu_tensors_take_the_reference_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("REGRAFT_KERNELS", raising=False)
    x = torch.zeros(1)
    assert not choice.use_triton(x)
    with choice.forced("reference"):
        assert not choice.use_triton(x)
    assert choice.choice() == "auto"


def test_the_environment_forces_a_form_and_a_block_overrides_it(monkeypatch):
    monkeypatch.setenv("REGRAFT_KERNELS", "reference")
    assert choice.choice() == "reference"
    with choice.forced("triton"):
        assert choice.choice() == "triton"


def test_an_unknown_setting_names_the_choices(monkeypatch):
    monkeypatch.setenv("REGRAFT_KERNELS", "cuda")
    with pytest.raises(ValueError, match=r"'cuda'.*auto, reference, triton"):
        choice.choice()


@pytest.mark.parametrize("installed, said", [(True, "sm_75, older than sm_80"), (False, "Triton is not installed")])
def test_a_gpu_that_cannot_run_triton_says_so_once(monkeypatch, caplog, installed, said):
    monkeypatch.setattr(lang, "HAS_TRITON", installed)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    choice.why_not.cache_clear()
    with caplog.at_level(logging.WARNING, "regraft.kernels"):
        assert said in choice.why_not(0)
        choice.why_not(0)
    choice.why_not.cache_clear()
    assert len(caplog.records) == 1


def test_a_refusal_names_the_argument_and_what_was_expected():
    x = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=r"weight: shape is \[4, 6\], expected \[any, 5\]"):
        expect("weight", x, shape=(None, 5))
    with pytest.raises(TypeError, match="ids: dtype is float32, expected int64"):
        expect("ids", x, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"x: strides are \[1, 6\], expected a contiguous tensor of \[6, 4\]"):
        expect("x", x.t())
    with pytest.raises(ValueError, match="x: is on meta, expected cpu"):
        expect("x", x.to("meta"), like=x)
    with pytest.raises(ValueError, match=r"p: is 1\.5, expected in \[0, 1\)"):
        expect_range("p", 1.5, 0, 1)
