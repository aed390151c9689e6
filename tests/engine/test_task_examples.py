"""The example configurations are valid, their rows are read, and `init` recognises each kind of rows."""

from __future__ import annotations

import os

import pytest

from conftest import ROOT
from regraft.engine.config import TASK_TYPES, load_config
from regraft.engine.data.read import read_split
from regraft.engine.init_command import init_config
from regraft.engine.tasks import TASKS, task_class

# Several tasks in one file bring data sets of their own: tests/engine/test_several.py
EXAMPLES = [p for p in sorted((ROOT / "examples" / "tasks").glob("*.yaml")) if "\ntasks:" not in p.read_text()]


@pytest.fixture(autouse=True)
def in_the_repository():
    before = os.getcwd()  # noqa: PTH109
    os.chdir(ROOT)
    yield
    os.chdir(before)


def test_every_task_that_can_be_configured_is_there():
    # Several tasks are listed under `tasks`, adapters are put together from finished runs.
    assert set(TASK_TYPES) == set(TASKS) - {"several", "adapters"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_has_rows_that_its_task_can_learn_from(path):
    config = load_config(path)
    kind = task_class(config.task.type)
    rows = read_split(kind, config.data, "train")
    task = kind.from_rows(config.task, rows, config.data.columns.label)
    assert kind.from_spec(task.spec()).spec() == task.spec()
    assert len(read_split(kind, config.data, "dev")) >= 20


@pytest.mark.parametrize("path", [p for p in EXAMPLES if p.stem != "stars"], ids=lambda p: p.stem)
def test_init_recognises_the_rows_and_writes_a_run_for_them(path, tmp_path):
    config = load_config(path)
    written = tmp_path / "run.yaml"
    written.write_text(init_config(config.data.train))
    found = load_config(written)
    assert found.task.type == config.task.type
    assert found.data.dev == config.data.dev
