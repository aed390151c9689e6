"""The scalar mix of a head by the kernel that a GPU runs: the plain form's numbers and gradients."""

from __future__ import annotations

import pytest
import torch

from regraft.engine.heads.combine import ScalarMix


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shape", [(5, 4, 6), (2, 3, 4, 6), (0, 4, 6)], ids=["pooled", "cells", "none"])
def test_one_pass_over_the_layers_gives_the_mix_and_its_gradients(layer_norm, shape):
    torch.manual_seed(0)
    mix = ScalarMix(4, layer_norm=layer_norm).double()
    torch.nn.init.normal_(mix.weights)
    hidden = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(*shape[:-2], shape[-1], dtype=torch.float64)
    found = []
    for form in (mix, mix.by_kernel):
        out = form(hidden)
        found.append([out, *torch.autograd.grad((out * upstream).sum(), [hidden, mix.weights, mix.gamma])])
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert torch.allclose(ours, wanted, atol=1e-12, rtol=1e-10)
