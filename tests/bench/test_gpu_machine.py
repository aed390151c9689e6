"""A rented GPU machine may have torch, transformers and little else: nothing there may fail for a package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
MEASURING = {"torch", "triton", "transformers", "accelerate", "peft"}
TESTING = {"pytest", "pytest-timeout", "scikit-learn", "scipy", "pyarrow"}
# Everything else that is installed cannot be imported.
BARE = """
import importlib.machinery, json, os, sys
found = set(json.loads(os.environ["THERE"])) | set(sys.stdlib_module_names)

class Bare(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        installed = spec is not None and "site-packages" in str(spec.origin or spec.submodule_search_locations)
        return None if path is None and installed and name not in found else spec

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Bare
"""


def carried() -> set[str]:
    """What `make gpu-wheels` fetches."""
    (names,) = re.findall(r"^GPU_PACKAGES := (.*)$", MAKEFILE, re.MULTILINE)
    return {canonicalize_name(name) for name in names.split()}


def needs(names: set[str]) -> set[str]:
    """Distributions that these ask for, themselves among them."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        try:
            asked = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:
            continue
        left += [r.name for r in asked if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def on_a_bare_machine(code: str, distributions: set[str]) -> str:
    modules = [m for m, owners in metadata.packages_distributions().items()
               if {canonicalize_name(owner) for owner in owners} & distributions]  # fmt: skip
    environment = os.environ | {"THERE": json.dumps([*modules, "_pytest"]), "TRITON_INTERPRET": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE + code], capture_output=True, text=True, timeout=250, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_the_measurements_need_torch_triton_transformers_accelerate_and_peft_alone():
    spec = {"who": "regraft", "device": "cpu", "seed": 0, "size": "tiny", "lengths": "sst2", "batch_size": 4}
    code = f"""
sys.path.insert(0, "bench")
import gpu_table, kernels_gpu, train_gpu
assert [len([make() for make in kernels_gpu.cases("cpu")]) > 9, "pydantic" in sys.modules] == [True, False]
print(train_gpu.take_turn({ {**spec, "compiled": False, "steps": 1, "warm_up": 1}!r})["tokens"])
"""
    assert int(on_a_bare_machine(code, needs(MEASURING) - carried())) > 0


def test_the_tests_need_no_more_than_what_is_carried_along():
    (paths,) = re.findall(r"^\t\$\(ON_GPU\) -m pytest (.*)$", MAKEFILE, re.MULTILINE)
    options = ["--collect-only", "-p", "pytest_timeout", *paths.split()]
    out = on_a_bare_machine(
        f"import pytest; sys.exit(pytest.main({options!r}))", needs(MEASURING | TESTING) | carried()
    )
    assert "test_ways.py" in out and "test_varlen.py" in out
