"""One update by several processes of a machine, each its share of weights that all of them hold."""

from __future__ import annotations

import pytest
import torch

from ranks import ran_to_the_end

SHARED = """
import sys, torch
from regraft.engine.training import average as module
from regraft.engine.training.shared_update import SharedUpdate
from regraft.engine.training.together import meet, part, processes, rank
from regraft.kernels.embedding import RowGradient

by_rows = sys.argv[1] == "rows"
rank, count = rank(), processes()
meet(60)
torch.set_num_threads(1)
module.SHARED_BYTES = 1 << 14
start = torch.Generator().manual_seed(7)
shapes = [(3,), (300, 50), (), (41, 1000), (17,)]
weights = [torch.nn.Parameter(torch.randn(s, generator=start)) for s in shapes]
groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0, "lr": 3e-3}]
optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
rows = RowGradient(weights[1]) if by_rows else None
draw = torch.Generator().manual_seed(100 + rank)
found, shared = [], None
exchange = module.Exchange.of_all(count)
for step in range(6):
    for number, weight in enumerate(weights):
        drawn = torch.randn(weight.shape[::-1], generator=draw)
        drawn = drawn.t() if weight.dim() == 2 else drawn
        drawn = drawn if step else drawn.contiguous()  # torch's fused step takes the numbers as they lie
        weight.grad = None if step == 3 and number == 4 else drawn
    if by_rows:
        weights[1].grad = None
        for ids in torch.randint(0, 300, (2, 20 + 90 * rank), generator=draw):  # some twice, and some in two micro-batches
            rows.add(ids, torch.randn(len(ids), 50, generator=draw))
    own = [None if w.grad is None else w.grad.clone() for w in weights]
    lost = torch.tensor(float(rank + step), dtype=torch.float64)
    if shared is None:
        assert SharedUpdate.of_all(optimizer, exchange) is None  # there are no moments yet
        module.average_over_processes([w.grad for w in weights], count)
        if by_rows:
            rows.written()
        optimizer.step()
        loss = norm = None
        shared = SharedUpdate.of_all(optimizer, exchange)
        assert shared is not None
    else:
        loss, norm = shared.sum(lost, rows)
        shared.step(norm, 20.0)
    if by_rows:
        rows.clear()
        assert not rows.buffer.any()
    found.append((own, loss, norm, [w.detach().clone() for w in weights]))
state = optimizer.state_dict()
torch.save(state, "state.pt")
address = [w.data_ptr() for w in weights]
shared.leave()
assert address != [w.data_ptr() for w in weights] and not optimizer.state
with torch.no_grad():
    weights[0] += 1 + rank  # no longer the others'
torch.distributed.barrier()
torch.save((found, weights[0].detach().clone()), "found.pt")
part()
"""


@pytest.mark.parametrize(("how", "count"), [("dense", 2), ("dense", 3), ("rows", 2), ("rows", 3)])
def test_shares_of_an_update_make_up_the_whole_one(tmp_path, how, count):
    folders = ran_to_the_end([how], tmp_path, count, program=("-c", SHARED))
    each, own = zip(*(torch.load(folder / "found.pt") for folder in folders), strict=True)
    start = torch.Generator().manual_seed(7)
    shapes = [(3,), (300, 50), (), (41, 1000), (17,)]
    weights = [torch.nn.Parameter(torch.randn(s, generator=start).double()) for s in shapes]
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0, "lr": 3e-3}]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    for step, of_step in enumerate(zip(*each, strict=True)):
        for number, weight in enumerate(weights):
            own_gradients = [gradients[number] for gradients, *_ in of_step]
            weight.grad = None if own_gradients[0] is None else torch.stack(own_gradients).double().mean(0)
        if step:
            norm = torch.nn.utils.clip_grad_norm_(weights, 20.0)
            for _, loss, found, _ in of_step:
                assert loss == pytest.approx(step + (count - 1) / 2)
                assert found == pytest.approx(float(norm), rel=1e-6)
                assert found > 20.0  # so that it was clipped
        reference.step()
        for _, _, _, after in of_step:
            for mine, expected, first in zip(after, weights, of_step[0][3], strict=True):
                torch.testing.assert_close(mine.double(), expected.detach(), rtol=2e-6, atol=2e-6)
                assert torch.equal(mine, first)
    for rank, folder in enumerate(folders):
        torch.testing.assert_close(own[rank].double(), weights[0].detach() + 1 + rank, rtol=2e-6, atol=2e-6)
        state = torch.load(folder / "state.pt")["state"]
        assert (folder / "state.pt").stat().st_size < 3 * sum(w.numel() * 4 for w in weights)  # moments alone
        for number, weight in enumerate(weights):
            expected = reference.state[weight]
            assert float(state[number]["step"]) == float(expected["step"])
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[number][name].double(), expected[name], rtol=1e-5, atol=1e-7)
