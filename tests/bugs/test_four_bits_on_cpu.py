"""On CPUs with AVX512, bitsandbytes 0.50 reads wrong scales for rows that end within a block, and packs weights anew, with
scales cut to bf16, in the first forward without gradients. Both happen only on such a CPU; what is held holds on all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from regraft.engine.methods.quantise import quantise_backbone, whole_weight
from regraft.engine.methods.settings import QuantiseSettings
from regraft.kernels.nf4 import CODE


class Backbone(nn.Module):
    """Enough of a model to have its one linear layer quantised."""

    base_model_prefix = "encoder"

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(columns, 48))
        self.base_model = self.encoder


def weight_by_its_codes(layer: nn.Module) -> torch.Tensor:
    """Codes times scales, one block after the other, in fp64."""
    state = layer.weight.quant_state
    packed = layer.weight.data.reshape(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1, state.blocksize)
    scales = state.absmax
    if state.state2 is not None:
        second = state.state2
        blocks = second.code.double()[scales.long()]
        scales = blocks * second.absmax.double().repeat_interleave(second.blocksize)[: len(blocks)] + state.offset
    return (torch.tensor(CODE).double()[codes.long()] * scales.double()[:, None]).view(state.shape)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("columns", [64, 312, 96, 32])
def test_a_layer_computes_with_its_codes_and_evaluation_leaves_them_alone(columns, double):
    pytest.importorskip("bitsandbytes")
    model = Backbone(columns)
    quantise_backbone(model, "qlora", QuantiseSettings(double=double))
    layer = model.encoder[0]
    before = layer.weight.data.clone()
    wanted = weight_by_its_codes(layer)
    x = torch.randn(9, columns)
    model.eval()
    with torch.no_grad():
        out = model.encoder(x)
    exact = x.double() @ wanted.T + layer.bias.double()
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole_weight(layer).double(), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(layer.weight.data, before) and layer.weight.quant_state.absmax.dtype != torch.bfloat16
    model.train()
    y = x.clone().requires_grad_()
    model.encoder(y).square().sum().backward()
    torch.testing.assert_close(y.grad.double(), 2 * exact @ wanted, rtol=1e-3, atol=1e-4)
