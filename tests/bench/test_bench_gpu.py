"""The GPU measurements, run in miniature on CPU: they take their turns and leave the table they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fake_cuda

BENCH = Path(__file__).resolve().parents[2] / "bench"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCH / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=250, env=environment).stdout


def test_every_kernel_is_measured_forward_and_backward_beside_eager(tmp_path):
    out = tmp_path / "kernels_gpu.json"
    run("kernels_gpu.py", "--device", "cpu", "--out", str(out))
    result = json.loads(out.read_text())
    found = {(row["name"], row["direction"], row["who"].split()[0]) for row in result["rows"]}
    names = {row["name"] for row in result["rows"]}
    assert {"attention", "NF4 dequantisation", "NF4 linear", "LoRA linear", "CRF"} <= names
    for name in names:
        directions = ("forward",) if name in ("NF4 dequantisation", "Viterbi") else ("forward", "backward")
        assert {(name, d, who) for d in directions for who in ("regraft", "eager")} <= found
    assert all(row["milliseconds"] > 0 and row["rate"] > 0 for row in result["rows"])
    assert all("compile" in line for line in result["not measured"])
    assert {row["timer"] for row in result["rows"]} == {"clock"}


def test_what_fails_costs_no_other_case_its_figures(tmp_path):
    out = tmp_path / "kernels_gpu.json"
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "import kernels_gpu as k\n"
        "def broken(*_): raise RuntimeError('no memory\\nfor this')\n"
        "k.norm_case = broken\n"
        "made = k.gelu_case\n"
        "def half(*a):\n"
        "    case = made(*a)\n"
        "    case.forms['eager'] = broken\n"
        "    return case\n"
        "k.gelu_case = half\n"
        "k.head_cases = k.adapter_cases = lambda *_: ()\n"
        f"sys.argv = ['x', '--device', 'cpu', '--out', {str(out)!r}]\n"
        "k.main()"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    result = json.loads(out.read_text())
    found = {(row["name"], row["who"]) for row in result["rows"]}
    assert {("bias + GELU", "regraft"), ("embeddings + LayerNorm", "regraft"), ("attention", "regraft")} <= found
    assert ("bias + GELU", "eager") not in found
    missing = result["not measured"]
    assert "broken 8 64: RuntimeError: no memory" in missing
    assert "bias + GELU 8 x 256 eager: RuntimeError: no memory" in missing


@pytest.fixture
def timing(monkeypatch):
    import gpu_timing

    return gpu_timing


def test_calls_take_turns_over_copies_of_their_data_in_one_graph(timing, monkeypatch):
    fake_cuda.install(monkeypatch)
    seen: list[str] = []
    found = timing.timed([lambda: seen.append("a"), lambda: seen.append("b")], "cuda", torch.cuda.Stream())
    assert found.timer == "graph"
    assert seen == ["a", "b"] * (len(seen) // 2) and len(seen) > 8


def test_what_cannot_be_captured_is_timed_by_events_and_says_so(timing, monkeypatch):
    cuda = fake_cuda.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "triton.testing", SimpleNamespace(do_bench=lambda run, **_: [2.0, 1.0, 3.0]))
    found = timing.timed([lambda: (cuda.draw(), cuda.sync())], "cuda", torch.cuda.Stream())
    assert found.median == 2.0
    assert found.timer == "events: RuntimeError: operation not permitted when stream is capturing"
    cuda.draw()


def test_copies_of_the_data_are_three_times_the_cache(timing, monkeypatch):
    cache = SimpleNamespace(L2_cache_size=60 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: cache)
    assert [timing.copies_for(mb << 20, "cuda") for mb in (1000, 180, 75, 0)] == [1, 1, 3, timing.MOST_COPIES]


def test_whose_attention_is_faster_is_the_sum_of_both_directions_and_known_for_both():
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "from kernels_gpu import Row, entries\n"
        "row = lambda shape, who, ms: Row('attention', shape, 'forward', who, ms, ms, ms, 1.0, 'FLOPs', 0.5)\n"
        "rows = [row('a', 'regraft', 1.0), row('a', 'regraft', 2.0), row('a', 'aten', 0.5), row('a', 'aten', 2.6)]\n"
        "rows += [row('b', 'regraft', 1.0), row('b', 'aten', 0.9), row('c', 'regraft', 1.0)]\n"
        "about = {'a': dict(size=64, longest=512, dropout=True), 'b': dict(size=32, longest=64), 'c': {}}\n"
        "print(entries(rows, about))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "{'64 x 512, dropout': 'own', '32 x 64': 'aten'}"


def test_no_measurement_has_the_name_of_a_package_that_others_import():
    # run as a script, its folder comes first on the path: `import kernels` in transformers would find it
    names = {path.stem for path in BENCH.glob("*.py")}
    assert not names & {"kernels", "datasets", "evaluate", "transformers", "accelerate", "peft", "torch", "triton"}


@pytest.mark.parametrize("who", ["regraft", pytest.param("trainer", marks=pytest.mark.soak)])
def test_a_turn_counts_the_real_tokens_of_its_window(who):
    spec = {
        "who": who,
        "device": "cpu",
        "seed": 0,
        "size": "tiny",
        "lengths": "sst2",
        "batch_size": 4,
        "compiled": False,
    }
    found = json.loads(run("train_gpu.py", "--turn", json.dumps({**spec, "steps": 2, "warm_up": 1})).splitlines()[-1])
    assert 2 * 4 * 3 <= found["tokens"] <= 2 * 4 * 66
    assert found["seconds"] > 0 and found["flops"] > 0
    if who == "regraft":
        assert found["buckets"] >= 1
        assert found["bound"]["embeddings + LayerNorm"] == 1
        assert found["last layer for first rows"]


def test_what_the_last_layer_skips_is_not_counted_as_work(monkeypatch):
    import train_gpu

    lengths, width, inner = [5, 1], 32, 64
    # forward of a layer: the four projections and the feed-forward of 6 tokens, scores and sums of 26 pairs
    full = 6 * 2 * (4 * width * width + 2 * width * inner) + 26 * 4 * width
    skipped = 4 * 2 * (2 * width * width + 2 * width * inner) + (26 - 6) * 4 * width
    assert train_gpu.flops_of({"size": "tiny"}, lengths) == 3 * 2 * full
    assert train_gpu.flops_of({"size": "tiny"}, lengths, first_rows=True) == 3 * (2 * full - skipped)


def test_without_results_the_table_says_that_nothing_was_measured(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import gpu_table, pathlib; gpu_table.RESULTS = pathlib.Path({str(tmp_path)!r}); gpu_table.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["kernels_gpu: not yet measured", "train_gpu: not yet measured"]
