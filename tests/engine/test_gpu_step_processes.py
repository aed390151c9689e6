"""The GPU's step over two processes, by gloo and uncaptured: the one step of a single process."""

from __future__ import annotations

import os
import subprocess

import torch
from forks import Forked

from conftest import FORKS

STEP = """
import sys, torch, torch.distributed as dist
from transformers import AutoModelForSequenceClassification
from regraft.engine.fast_gpu import bind_fused
from regraft.engine.models import RunningModel
from regraft.engine.packing import pack
from regraft.engine.training.captured_optimizer import CapturedOptimizer
from regraft.engine.training.average import average_over_processes
from regraft.engine.training.graphed import GraphedGradients

folder, store, rank, count, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
if count > 1:
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=count)
torch.manual_seed(0)
options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options)
running = RunningModel(model, pad_token_id=0)
running.run_packed()
assert bind_fused(running)
parameters = list(running.train().parameters())
update = CapturedOptimizer(torch.optim.AdamW(parameters, lr=1e-3, eps=1e-2, fused=True), parameters, 1.0, capture=False)
each = lambda logits, targets, weights: (
    torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights
).sum()
graphed = GraphedGradients(running, each, parameters, capture=False)
generator = torch.Generator().manual_seed(3)
ids = [torch.randint(5, 60, (n,), generator=generator).numpy() for n in (9, 4, 30, 12)]
targets = torch.tensor([0, 2, 1, 1])
for step in range(2):
    lost = torch.zeros((), dtype=torch.float64)
    for part in ([0], [3]) if rank == 0 else ([1, 2],):  # two micro-batches here, one there
        lost += graphed(pack([ids[i] for i in part]), targets[part], torch.ones(len(part)), factor=count / 4)
    if count == 1:
        lost += graphed(pack(ids[1:3]), targets[1:3], torch.ones(2), factor=count / 4)
    average_over_processes(graphed.gradients, count)
    update(lost)
    update.report()
torch.save([p.detach() for p in parameters], out)
if count > 1:
    dist.barrier()  # who left first would tear down the connections of the other, which gloo answers with an abort
    dist.destroy_process_group()
"""


def test_two_processes_end_where_one_does(tiny_model, tmp_path):
    def start(rank: int, count: int) -> Forked | subprocess.Popen[str]:
        arguments = [
            str(tiny_model),
            str(tmp_path / "store"),
            str(rank),
            str(count),
            str(tmp_path / f"{rank} of {count}"),
        ]
        return FORKS.start(["-c", STEP, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})

    running = [start(0, 2), start(1, 2), start(0, 1)]
    try:
        assert [p.wait(timeout=280) for p in running] == [0, 0, 0]
    finally:
        for process in running:
            process.kill()
    one, *two = (torch.load(tmp_path / name) for name in ("0 of 1", "0 of 2", "1 of 2"))
    for a, b, c in zip(one, *two, strict=True):
        assert torch.equal(b, c)
        assert torch.allclose(a, b, atol=1e-6)
