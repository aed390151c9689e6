"""Gradients of several processes, averaged: in memory that they share, and through torch.distributed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ranks import ran_to_the_end
from regraft.engine.training import together

AVERAGE = """
import sys, torch
from regraft.engine.training import average as module, common_memory
from regraft.engine.training.together import meet, part, processes, rank

how, rank, count = sys.argv[1], rank(), processes()
meet(60)
module.SHARED_BYTES = 4096
if how == "sockets":
    common_memory.IN_ORDER = False
if how == "blind" and rank == 1:
    common_memory._seen = lambda address: None
if how == "no memory" and rank == 0:
    def none(size):
        raise OSError("no memory")
    common_memory._made = none
draw = torch.Generator().manual_seed(rank)
average, found = module.Average(count, torch.device("cpu")), []
for step in range(5):
    shapes = [(3,), (), (700, 5), (1024,), (0, 4), (37, 11)]
    gradients = [torch.randn(s, generator=draw) for s in shapes] + [torch.randn(9, generator=draw).double()]
    gradients.append(torch.randn(6, 8, generator=draw).t())  # not in one piece
    before = [g.clone() for g in gradients]
    average(gradients)
    found.append((before, gradients))
torch.save((found, average.shared is not None), "found.pt")
part()
"""


@pytest.mark.parametrize(
    ("how", "count"), [("shared", 2), ("shared", 3), ("sockets", 3), ("blind", 3), ("no memory", 2)]
)
def test_every_process_ends_with_the_mean_of_all(tmp_path, count, how):
    folders = ran_to_the_end([how], tmp_path, count, program=("-c", AVERAGE))
    each, shared = zip(*(torch.load(folder / "found.pt") for folder in folders), strict=True)
    assert shared == ((how in ("shared", "sockets")),) * count  # all of them, or none
    for of_step in zip(*each, strict=True):
        for numbers in range(len(of_step[0][0])):
            mean = torch.stack([before[numbers].double() for before, _ in of_step]).mean(0)
            for _, after in of_step:
                torch.testing.assert_close(after[numbers].double(), mean, rtol=1e-6, atol=1e-7)
                assert torch.equal(after[numbers], of_step[0][1][numbers])  # bit for bit the same everywhere


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, which Linux has")
def test_nobody_waits_for_a_process_that_is_gone_or_for_ever(monkeypatch):
    monkeypatch.setattr(together, "_patience", 0.3)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        waited = iter([False] * (together.YIELDS + 3) + [True])
        together.wait_until(lambda: next(waited), other.pid)
        with pytest.raises(RuntimeError, match=f"timed out waiting for process {other.pid}") as error:
            together.wait_until(lambda: False, other.pid)
        assert together.has_lost_others(error.value)
        other.kill()
        monkeypatch.setattr(together, "_patience", 60.0)
        with pytest.raises(
            RuntimeError, match=f"process {other.pid} is gone"
        ) as error:  # nobody has asked for its exit code
            together.wait_until(lambda: False, other.pid)
        assert together.has_lost_others(error.value)
