"""Hugging Face datasets by name or folder, and what is said when the hub is out of reach."""

import time

import pytest

from regraft.engine.config import ColumnsConfig, DataConfig
from regraft.engine.data.read import iter_texts, read_rows
from regraft.engine.errors import DataError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))


@pytest.fixture
def unreachable(monkeypatch):
    """Nobody listens on this port: the hub as it is without a network."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.fixture
def saved(tmp_path):
    """A dataset as `save_to_disk` leaves it, its labels numbers that have names."""
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["x", "y"])),
        }
    )
    rows = {"text": ["bad", "good", "so so"], "label": [0, 1, -1], "tags": [[0, 1], [], [1]]}
    parts = {name: datasets.Dataset.from_dict(rows, features=features) for name in ("train", "validation")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    return f"hub:{tmp_path / 'saved'}"


def rows_of(split="train", task_type="classification", **settings):
    return read_rows(DataConfig(**settings), split, task_type=task_type)


def test_class_numbers_come_as_names_and_minus_one_as_missing(saved):
    rows = rows_of(train=saved, missing="drop")
    assert (rows.texts, rows.labels, rows.lines.tolist()) == (["bad", "good"], ["neg", "pos"], [1, 2])
    assert rows.dropped == {"missing": 1}
    with pytest.raises(DataError, match=r"saved:3, column 'label'"):
        rows_of(train=saved)


def test_lists_of_class_numbers_come_as_lists_of_names(saved):
    rows = rows_of(train=saved, columns=ColumnsConfig(label="tags"), task_type="multilabel")
    assert rows.labels == [["x", "y"], [], ["y"]]


def test_the_dev_split_is_found_under_its_usual_name(saved):
    assert len(rows_of("dev", train=saved, dev=saved, missing="drop")) == 2


def test_a_split_can_be_named_and_one_that_is_not_there_is_told(saved):
    assert len(rows_of(train=saved + "#validation", missing="drop")) == 2
    with pytest.raises(
        DataError, match=r"no split 'validatoin' .did you mean 'validation'.*; it has train, validation"
    ):
        rows_of(train=saved + "#validatoin")
    with pytest.raises(DataError, match="no split 'test'"):
        rows_of("test", train=saved, test=saved)


def test_a_column_that_is_not_there_is_told(saved):
    with pytest.raises(DataError, match=r"no column 'txt' \(data\.columns\.text\) \(did you mean 'text'\?\)"):
        rows_of(train=saved, columns=ColumnsConfig(text="txt"))


def test_a_folder_of_files_is_loaded_like_a_dataset(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    (folder / "test.jsonl").write_text('{"text": "c", "label": "x"}\n')
    address = f"hub:{folder}"
    assert rows_of(train=address).texts == ["a", "b"]
    assert rows_of("test", train=address, test=address).texts == ["c"]
    assert rows_of(train=address + "#train[:1]").texts == ["a"]
    assert [row.text for row in iter_texts(address, DataConfig(train=address))] == ["c"]


def test_without_a_network_and_a_local_copy_one_clear_error_comes_soon(unreachable):
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"^hub:someone/reviews: not in the local cache, and not to be had from the hub"
    ):
        rows_of(train="hub:someone/reviews")
    assert time.monotonic() - start < 15


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(DataError, match="no such folder"):
        rows_of(train="hub:./nowhere")
