"""A task of one's own, in one file outside the package, goes the whole way through the public surface."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from conftest import ROOT, regraft
from running import running_server

DOCS = ROOT / "docs" / "add-a-task.md"


@pytest.fixture
def own_task(tmp_path, monkeypatch) -> Path:
    """The file of docs/add-a-task.md, beside the data and not in the package."""
    (code,) = re.findall(r"```python\n# two_numbers\.py\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.S)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "two_numbers.py").write_text(code)
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", paths)
    return folder


def test_the_task_of_the_documentation_is_trained_evaluated_exported_and_served(own_task, make_config, tmp_path):
    import httpx

    rng = np.random.default_rng(0)
    rows = []
    for _ in range(120):
        good, bad = (int(n) for n in rng.integers(0, 4, 2))
        rows.append(json.dumps({"text": f"{'good ' * good}{'bad ' * bad}film", "label": f"{good} {bad}"}))
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    path = make_config(
        task={"type": "two_numbers:TwoNumbers", "options": {"names": ["good", "bad"]}},
        data={"train": str(tmp_path / "train.jsonl"), "dev": None},
        training={"epochs": 12, "learning_rate": 3e-3, "batch_size": 8, "threads": 1},
    )
    done = regraft("train", path, "--quiet")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"mae ([0-9.]+)", done.stdout)[1]) < 1.0  # type: ignore[index]
    run = tmp_path / "run"
    assert "mae" in regraft("evaluate", run, tmp_path / "train.jsonl").stdout
    done = regraft("predict", run, "good good film", "--format", "jsonl")
    answer = json.loads(done.stdout)
    assert answer.keys() == {"text", "good", "bad"}, done.stderr
    done = regraft("predict", run, "good good film", "--format", "csv")
    assert done.stdout.splitlines()[0] == "text,text_pair,label,cut_tokens", done.stderr
    done = regraft("export", run, "--to", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    with running_server(tmp_path / "bundle") as server:
        found = httpx.post(f"{server.url}/predict", json={"inputs": "good good film"}, timeout=30).json()
        assert found["predictions"][0]["good"] == pytest.approx(answer["good"], abs=1e-4)
        assert "good" in httpx.get(f"{server.url}/openapi.json", timeout=30).text


def test_a_type_that_is_no_task_is_refused(make_config, own_task):
    done = regraft("train", make_config(task={"type": "json:JSONDecoder"}))
    assert done.returncode == 2 and "is no subclass of regraft.engine.tasks.Task" in done.stderr
    done = regraft("train", make_config(task={"type": "nowhere:Task"}))
    assert done.returncode == 2 and "cannot be imported" in done.stderr
    done = regraft("train", make_config(task={"type": "taging"}))
    assert done.returncode == 2 and "did you mean 'tagging'" in done.stderr
