"""Every kernel compiles for sm_80 and sm_90 without a GPU: no spills, 128-bit loads; the committed table is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from regraft.kernels import shipped
from regraft.kernels.lang import HAS_TRITON
from regraft.kernels.shipped import TARGETS, all_shipped, fingerprint

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
    changed = "kernels have changed since: run python bench/kernels_static.py"
    assert found == wanted, changed
    # blocks are others where kernels are interpreted
    command = [sys.executable, str(ROOT / "bench" / "kernels_static.py"), "--fingerprint"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == table["fingerprint"], (
        changed
    )
    assert not any(row["spills"] for row in table["kernels"])
    wide = {case.name for case in all_shipped() if case.wide_loads}
    assert all(row["loads_128"] for row in table["kernels"] if row["name"] in wide)


def test_the_fingerprint_changes_with_a_configuration_and_not_with_a_comment(monkeypatch, tmp_path):
    cases = all_shipped()
    assert fingerprint(cases) == fingerprint(all_shipped())
    assert fingerprint([replace(cases[0], num_warps=16), *cases[1:]]) != fingerprint(cases)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "shipped.py"))
    found = []
    for body in ("x + 1", "x + 1  # why", "x + 2"):
        (tmp_path / "kernel.py").write_text(f"@jit\ndef f(x):\n    return {body}\n")
        found.append(fingerprint([]))
    assert found[0] == found[1] != found[2]
