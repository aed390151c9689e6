"""Threads sized to the host, not to the container (onnxruntime 29510)."""

from __future__ import annotations

import os
import subprocess
import sys

import serving_support  # noqa: F401
from bundles import bundle

CODE = """
import os, sys, threading
os.sched_setaffinity(0, {int(sys.argv[2])})
from regraft.serve.session import Session
session = Session(sys.argv[1])
before = len(os.listdir("/proc/self/task"))
session.run(session.tokenize(["good film"] * 50))
print(session.threads, len(os.listdir("/proc/self/task")) - before)
"""


def test_a_process_bound_to_one_cpu_runs_the_model_on_one_thread() -> None:
    one = str(min(os.sched_getaffinity(0)))
    run = subprocess.run([sys.executable, "-c", CODE, str(bundle()), one], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1", "0"]
