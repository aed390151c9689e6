"""Every kernel compiles for sm_80 and sm_90 without a GPU: no spills, 128-bit loads; the committed table is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from regraft.kernels.lang import HAS_TRITON
from regraft.kernels.shipped import TARGETS, all_shipped

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


@needs_compiler
@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_both_generations_without_spills(tmp_path):
    out = tmp_path / "static.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "kernels_static.py"), "--one-each", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads(out.read_text())["kernels"]
    assert {row["kernel"] for row in rows} == {case.kernel.__name__ for case in all_shipped()}
    assert {row["target"] for row in rows} == set(TARGETS)
    assert not any(row["spills"] for row in rows)


@needs_compiler
def test_every_integer_argument_of_a_kernel_can_be_one():
    # one row, one layer: Triton makes a constant of it, on which no method of a value can be called
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "bench" / "kernels_static.py"), "--ones"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@needs_compiler
def test_the_committed_table_covers_every_shipped_configuration():
    table = json.loads((ROOT / "bench" / "results" / "kernels_static.json").read_text())
    wanted = {(case.name, target) for case in all_shipped() for target in case.targets}
    found = {(row["name"], row["target"]) for row in table["kernels"]}
    assert found == wanted, "kernels have changed since: run python bench/kernels_static.py"
    assert not any(row["spills"] for row in table["kernels"])
