from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bundles import MAX_LENGTH, TASKS, WORDS, bundle, make_bundle, reference_logits, session
from regraft.engine.bundle import write_info
from regraft.engine.errors import BundleError
from regraft.engine.threads import available_threads
from regraft.serve.session import Session

LAYOUTS = ["packed", "padded"]


def some_texts(count: int) -> tuple[list[str], list[str | None]]:
    rng = np.random.default_rng(count)
    some = lambda: " ".join(rng.choice(WORDS[:-2], size=rng.integers(0, 30)))  # noqa: E731
    return [some() for _ in range(count)], [some() if rng.random() < 0.3 else None for _ in range(count)]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_are_those_of_each_text_alone_in_the_order_asked(layout: str, task: str) -> None:
    model = session(layout, task)
    items = model.tokenize(*some_texts(40))
    expected = np.stack([reference_logits(i.ids, i.types, task) for i in items])
    found = model.run(items)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_fixture_tells_a_packing_mistake() -> None:
    model = session()
    [item] = model.tokenize(["good film the"])
    shuffled = reference_logits(item.ids[::-1], item.types, "classification")
    assert np.abs(model.run([item])[0] - shuffled).max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_of_the_models_full_length_and_of_one_token_are_answered(layout: str) -> None:
    model = session(layout)
    items = model.tokenize(["the " * 100, "a"])
    assert items[0].tokens == MAX_LENGTH
    assert np.isfinite(model.run(items)).all()


def test_threads_are_the_containers_share_unless_given() -> None:
    assert Session(bundle()).threads == available_threads()
    assert session().threads == 1


def test_loading_and_answering_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from regraft.serve.session import Session; from regraft.serve.http import create_app;"
        "s = Session(sys.argv[1], threads=1); s.decode(s.run(s.tokenize(['good film'])));"
        "print([m for m in ('torch', 'transformers', 'pandas', 'sklearn', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, str(bundle())], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle(), tmp_path / "bundle"))


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "tokenizer.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Session(copy)


def test_a_file_missing_since_before_the_checksums_is_named(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    content = json.loads((copy / "bundle.json").read_text())
    del content["checksums"]["tokenizer.json"]
    (copy / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"tokenizer\.json: missing"):
        Session(copy)


def test_a_changed_graph_is_refused(copy: Path) -> None:
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes() + b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx: changed since it was exported"):
        Session(copy)


def test_a_graph_that_cannot_be_loaded_is_named(copy: Path) -> None:
    (copy / "model.onnx").write_bytes(b"not a graph")
    write_info(copy, session().info)
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load it"):
        Session(copy)


def test_a_graph_of_the_other_layout_is_refused_with_both_lists_of_inputs(copy: Path) -> None:
    write_info(copy, session("padded").info)
    with pytest.raises(BundleError, match=r"pad_index.*the padded layout has inputs.*attention_mask"):
        Session(copy)


def test_a_graph_that_cannot_take_the_longest_text_is_refused_at_load(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "short", max_length=12)
    content = json.loads((folder / "bundle.json").read_text())
    content["max_length"] = 64
    (folder / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="cannot answer 16 texts of up to 64 tokens"):
        Session(folder)
