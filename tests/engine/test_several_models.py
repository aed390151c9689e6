"""Heads of several tasks over one encoder of every architecture: each finds what its model finds alone."""

from __future__ import annotations

import pytest
import torch
from test_models import PACKED, PADDED, build, some_batch

from regraft.engine.models import RunningModel
from regraft.engine.several.model import ManyHeads
from regraft.engine.tasks.base import FIRST

BOTH = {**PACKED, **PADDED}


def logits_of(running: RunningModel) -> torch.Tensor:
    with torch.no_grad():
        return running(some_batch(11))


@pytest.mark.parametrize("name", BOTH)
def test_each_head_finds_what_its_model_finds_alone(name):
    first, second = (build(name, BOTH[name], seed) for seed in range(2))
    shared = {n: value for n, value in first.model.base_model.state_dict().items() if "pooler" not in n}
    second.model.base_model.load_state_dict(shared, strict=False)
    alone = [logits_of(first), logits_of(second)]
    together = RunningModel(
        ManyHeads([first.model, second.model], [FIRST, FIRST]), pad_token_id=first.pad_token_id
    ).eval()
    expected = torch.cat(alone, dim=-1)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    assert torch.allclose(logits_of(together), expected, atol=1e-5)
    together.run_packed()
    assert together.packed == (name in PACKED)
    together.use_kernels()
    assert torch.allclose(logits_of(together), expected, atol=2e-5, rtol=1e-4)
