"""Heads of several tasks over one encoder of every architecture: each finds what its model finds alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from test_models import PACKED, PADDED, some_batch
from transformers import AutoModelForSequenceClassification

from regraft.engine.models import RunningModel
from regraft.engine.several.model import ManyHeads
from regraft.engine.tasks.base import FIRST

BOTH = {**PACKED, **PADDED}


def views_of(name: str) -> list:
    """Models of one encoder whose heads and poolers are each their own."""
    config = getattr(transformers, f"{name.split('/')[0]}Config")(**BOTH[name])
    views = []
    for seed in range(2):
        torch.manual_seed(seed)
        view = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
        for weight in view.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.3)
        views.append(view.eval())
    shared = {n: value for n, value in views[0].base_model.state_dict().items() if "pooler" not in n}
    views[1].base_model.load_state_dict(shared, strict=False)
    return views


def logits_of(running: RunningModel) -> torch.Tensor:
    with torch.no_grad():
        return running(some_batch(11))


@pytest.mark.parametrize("name", BOTH)
def test_each_head_finds_what_its_model_finds_alone(name):
    views = views_of(name)
    pad = views[0].config.pad_token_id or 0
    alone = [logits_of(RunningModel(copy.deepcopy(view), pad_token_id=pad).eval()) for view in views]
    together = RunningModel(ManyHeads(views, [FIRST, FIRST]), pad_token_id=pad).eval()
    expected = torch.cat(alone, dim=-1)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    assert torch.allclose(logits_of(together), expected, atol=1e-5)
    together.run_packed()
    assert together.packed == (name in PACKED)
    together.use_kernels()
    assert torch.allclose(logits_of(together), expected, atol=2e-5, rtol=1e-4)
