"""Gradients of several processes, averaged: in memory that they share, and through torch.distributed."""

from __future__ import annotations

import pytest
import torch

from ranks import ended, start_ranks

AVERAGE = """
import sys, torch
from regraft.engine.training import average as module
from regraft.engine.training.together import meet, processes, rank

how, rank, count = sys.argv[1], rank(), processes()
meet(60)
module.SHARED_BYTES = 4096
if how == "blind" and rank == 1:
    module._seen = lambda address: None
if how == "no memory" and rank == 0:
    def none(size):
        raise OSError("no memory")
    module._made = none
draw = torch.Generator().manual_seed(rank)
average, found = module.Average(count, torch.device("cpu")), []
for step in range(5):
    shapes = [(3,), (), (700, 5), (1024,), (0, 4), (37, 11)]
    gradients = [torch.randn(s, generator=draw) for s in shapes] + [torch.randn(9, generator=draw).double()]
    gradients.append(torch.randn(6, 8, generator=draw).t())  # not in one piece
    before = [g.clone() for g in gradients]
    average(gradients)
    found.append((before, gradients))
torch.save((found, average._shared is not None), "found.pt")
"""


@pytest.mark.parametrize(("how", "count"), [("shared", 2), ("shared", 3), ("blind", 3), ("no memory", 2)])
def test_every_process_ends_with_the_mean_of_all(tmp_path, count, how):
    folders = [tmp_path / str(rank) for rank in range(count)]
    for folder in folders:
        folder.mkdir()
    for code, errors in ended(start_ranks([how], folders, program=("-c", AVERAGE))):
        assert code == 0, errors
    each, shared = zip(*(torch.load(folder / "found.pt") for folder in folders), strict=True)
    assert shared == ((how == "shared"),) * count  # all of them, or none
    for of_step in zip(*each, strict=True):
        for numbers in range(len(of_step[0][0])):
            mean = torch.stack([before[numbers].double() for before, _ in of_step]).mean(0)
            for _, after in of_step:
                torch.testing.assert_close(after[numbers].double(), mean, rtol=1e-6, atol=1e-7)
                assert torch.equal(after[numbers], of_step[0][1][numbers])  # bit for bit the same everywhere
