"""A capture that fails costs nothing but the graph. On a GPU by torch itself, elsewhere by a likeness of its faults."""

from __future__ import annotations

import pytest
import torch

import fake_cuda
from checking import DEVICE
from regraft.kernels.capture import capture

on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@pytest.fixture
def cuda(monkeypatch):
    return fake_cuda.install(monkeypatch)


def fails(cuda):
    def run() -> None:
        cuda.draw()
        cuda.sync()

    return run


def test_the_likeness_has_the_faults_that_are_to_be_mended(cuda):
    with pytest.raises(RuntimeError, match="previous error"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fails(cuda)()
    assert cuda.current != 0 and cuda.allocating
    with pytest.raises(RuntimeError, match="outside graph capture"):
        cuda.draw()


def test_after_a_capture_that_failed_streams_random_numbers_memory_and_earlier_graphs_are_as_before(cuda):
    earlier = capture(cuda.draw)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture(fails(cuda), warm_up=0)
    assert cuda.current == 0 and not cuda.allocating
    cuda.draw()
    earlier.replay()


def test_warming_up_and_capturing_leave_the_next_random_number_where_it_was(cuda):
    cuda.draw()
    before = cuda.offset
    capture(cuda.draw, warm_up=3)
    assert cuda.offset == before
    with pytest.raises(RuntimeError):
        capture(fails(cuda), warm_up=0)
    assert cuda.offset == before


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_too():
    x = torch.ones(4, device=DEVICE)
    out = torch.zeros(4, device=DEVICE)
    earlier = capture(lambda: out.copy_(torch.nn.functional.dropout(x)), warm_up=2)
    torch.manual_seed(3)
    wanted = torch.nn.functional.dropout(x)
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match="captur"):
        capture(lambda: torch.nn.functional.dropout(x).sum().item())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(torch.nn.functional.dropout(x), wanted)
    torch.manual_seed(3)
    earlier.replay()
    assert torch.equal(out, wanted)
