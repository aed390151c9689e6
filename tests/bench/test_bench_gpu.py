"""The GPU measurements, run in miniature on CPU: they take their turns and leave the table they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        directions = ("forward",) if name == "NF4 dequantisation" else ("forward", "backward")
        assert {(name, d, who) for d in directions for who in ("regraft", "eager")} <= found
    assert all(row["milliseconds"] > 0 and row["rate"] > 0 for row in result["rows"])
    assert all("compile" in line for line in result["not measured"])


def test_whose_attention_is_faster_is_the_sum_of_both_directions_and_known_for_both():
    code = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r})\n"
        "from kernels_gpu import Row, entries\n"
        "row = lambda shape, who, ms: Row('attention', shape, 'forward', who, ms, ms, ms, 1.0, 'FLOPs', 0.5)\n"
        "rows = [row('a', 'regraft', 1.0), row('a', 'regraft', 2.0), row('a', 'aten', 0.5), row('a', 'aten', 2.6)]\n"
        "rows += [row('b', 'regraft', 1.0), row('b', 'aten', 0.9), row('c', 'regraft', 1.0)]\n"
        "about = {'a': dict(size=64, length=512, p=0.1), 'b': dict(size=32, length=64, p=0.0), 'c': {}}\n"
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


def test_without_results_the_table_says_that_nothing_was_measured(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(BENCH)!r}); import gpu_table, pathlib; gpu_table.RESULTS = pathlib.Path({str(tmp_path)!r}); gpu_table.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["kernels_gpu: not yet measured", "train_gpu: not yet measured"]
