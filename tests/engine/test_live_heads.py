"""Heads of ours on the live encoder: trained end to end, saved, adapted, merged, exported and served like transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_token_heads import conll, measured

from conftest import sentences
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError
from regraft.engine.export import export_bundle
from regraft.engine.heads.live import LiveModel, model_of
from regraft.engine.methods.merge import merge
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.engine.training.splits import read_parts
from regraft.serve.session import Session

TEXTS = ["good film", "bad slow dull plot and a very long story " * 4, "x"]
FAST = ["training.threads=1", "head.hidden=8", "training.learning_rate=3e-3", "training.head_learning_rate=1e-2"]


@pytest.fixture
def live(make_config, write_rows, tmp_path):
    """Train with a head on the live encoder; returns the result."""
    data = {"train": str(write_rows("many.csv", 200, 7)), "dev": str(write_rows("other.csv", 60, 8))}
    path = make_config(data=data, training={"batch_size": 16, "epochs": 3})

    def run(*overrides: str, folder: str = "r", **options):
        return train(load_config(path, [f"run={tmp_path / folder}", *FAST, *overrides]), quiet=True, **options)

    run.path = path
    return run


def scores(folder: Path) -> np.ndarray:
    model = load_trained(folder)
    return np.array(
        [[a.prediction.scores[n] for n in model.task.labels] for a in predict(model, [(t, None) for t in TEXTS])]
    )


def served(folder: Path, bundle: Path, layout: str) -> np.ndarray:
    export_bundle(folder, bundle, layout=layout)
    session = Session(bundle, threads=1, warm_tokens=64)
    found = session.decode(session.run(session.tokenize(TEXTS)))
    return np.array([[a.scores[n] for n in session.task.labels] for a in found])


@pytest.mark.parametrize(
    ("head", "layout", "more"),
    [
        ("mlp", None, ["features.layers=all"]),
        ("attention", None, []),
        ("bilstm", "padded", ["training.ema=0.9"]),
        ("cnn", None, ["method=bitfit"]),
    ],
)
def test_a_head_learns_with_its_encoder_and_answers_the_same_everywhere(live, tmp_path, head, layout, more):
    result = live(f"head.type={head}", *more)
    assert result.metrics["dev"]["accuracy"] > 0.6
    trained = load_trained(result.folder)
    right = np.mean(
        [
            a.prediction.label == label
            for a, (_, label) in zip(
                predict(trained, [(t, None) for t, _ in sentences(60, 8)]), sentences(60, 8), strict=True
            )
        ]
    )
    assert right == pytest.approx(result.metrics["dev"]["accuracy"], abs=1e-9)
    if layout:
        assert np.allclose(served(result.folder, tmp_path / "b", layout), scores(result.folder), atol=1e-4)
    assert "head.safetensors" in (result.folder / "best" / "README.md").read_text()


def test_the_encoder_moves_with_the_head_and_loads_in_plain_transformers(live, tiny_model):
    from transformers import AutoModel

    result = live("head.type=bilstm", "training.max_steps=8")
    before, after = (AutoModel.from_pretrained(f).state_dict() for f in (tiny_model, result.folder / "best"))
    name = "encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before[name], after[name])
    head = load_file(result.folder / "best" / "head.safetensors")
    assert head["body.ahead.weight_ih_l0"].shape == (4 * 8, 32)


def test_packed_and_padded_steps_have_the_same_gradients(live, make_config):
    found = {}
    for packing in ("auto", "off"):
        config = load_config(live.path, [*FAST, "head.type=bilstm", "model.dropout=0.0", "head.dropout=0.0"])
        config = config.model_copy(update={"model": config.model.model_copy(update={"packing": packing})})
        from regraft.engine.training.run import _Run

        run = _Run(config, Path(config.run), None, True)
        run.prepare()
        run.build()
        assert run.running.packed == (packing == "auto")
        run.stepper.gradients(0, np.arange(16))
        found[packing] = {
            n: p.grad.clone()
            for n, p in run.running.model.named_parameters()
            if p.grad is not None and "word_emb" not in n
        }
    assert found["auto"].keys() == found["off"].keys()
    for name, gradient in found["auto"].items():
        assert torch.allclose(gradient, found["off"][name], atol=1e-5), name


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_an_adapter_carries_its_head_and_merges_into_a_whole_model(live, tmp_path, method):
    result = live("head.type=cnn", f"method={method}", "training.epochs=2")
    folder = result.folder / "best"
    assert not (folder / "model.safetensors").exists()
    assert any("head" in name for name in load_file(folder / "adapter_model.safetensors"))
    expected = scores(result.folder)
    assert measured(result.folder)["accuracy"] == pytest.approx(result.metrics["dev"]["accuracy"])
    if method == "lora":
        assert np.allclose(served(result.folder, tmp_path / "b", "packed"), expected, atol=1e-4)
        merge(result.folder, tmp_path / "merged")
        assert (tmp_path / "merged" / "model.safetensors").exists()
        assert np.allclose(scores(tmp_path / "merged"), expected, atol=1e-4)


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_as_if_it_had_not_been(live, tmp_path):
    options = ("head.type=attention", "training.checkpoint_every=3", "training.epochs=2")
    live(*options, folder="whole")

    def stop(info):
        if info.step == 7:
            raise Stop

    with pytest.raises(Stop):
        live(*options, folder="stopped", on_step=stop)
    live(*options, folder="stopped")
    for name in ("head.safetensors", "model.safetensors"):
        one, two = (load_file(tmp_path / n / "best" / name) for n in ("whole", "stopped"))
        assert all(torch.equal(one[k], two[k]) for k in one), name


def test_a_regression_starts_at_the_mean_and_is_saved_in_its_own_unit(make_config, tmp_path):
    rows = [(t, 50 + 4 * sum(w in {"good", "fine"} for w in t.split())) for t, _ in sentences(200, 3)]
    (tmp_path / "n.csv").write_text("text,label\n" + "".join(f"{t},{v}\n" for t, v in rows))
    path = make_config(task={"type": "regression"}, data={"train": str(tmp_path / "n.csv"), "dev": None})
    result = train(load_config(path, [*FAST, "head.type=mlp", "training.epochs=6"]), quiet=True)
    assert result.metrics["dev"]["mae"] < 5
    (answer,) = predict(load_trained(result.folder), [("good fine good fine", None)])
    assert 45 < answer.prediction.label < 75


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_crf_on_the_live_encoder_is_trained_and_saved(make_config, tmp_path, method):
    data = {"train": conll(tmp_path / "t.conll", 120, 1), "dev": conll(tmp_path / "d.conll", 30, 2), "format": "conll"}
    path = make_config(data=data, task={"type": "tagging", "crf": True}, training={"batch_size": 16, "epochs": 6})
    result = train(load_config(path, [*FAST, "head.type=bilstm", f"method={method}"]), quiet=True)
    assert result.metrics["dev"]["f1"] > 0.8
    kept = np.array(load_trained(result.folder).task.spec()["scores"][0])
    assert np.abs(kept[kept > -1e3]).max() > 1e-3, "the scores of going from tag to tag were learned"
    assert measured(result.folder)["f1"] == pytest.approx(result.metrics["dev"]["f1"], abs=1e-9)


def test_the_plain_head_stays_transformers_own(make_config):
    config = load_config(make_config())
    task, _ = read_parts(config)
    assert type(model_of(config, task)).__name__ == "BertForSequenceClassification"
    config = load_config(make_config(head={"type": "attention"}))
    assert isinstance(model_of(config, task), LiveModel)
    assert config.training.head_learning_rate == 1e-3
    config = load_config(make_config(head={"type": "attention"}, training={"head_learning_rate": None}))
    assert config.training.head_learning_rate is None


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (["head.type=logistic"], "head.type: logistic is solved at once"),
        (["head.type=bilstm", "features.pooling=mean"], "features.pooling: mean keeps one row a text"),
        (["head.type=mlp", "features.pooling=none"], "features.pooling: none keeps every token"),
        (["head.type=mlp", "head.mix_penalty=0.1"], "head.mix_penalty: used by method: frozen only"),
        (["head.type=attention", "task.type=tagging"], "head.type: attention gives one answer a text"),
        (["head.type=mlp", "task.type=choice"], "task.type: choice has a head of its own"),
    ],
)
def test_heads_that_do_not_fit_the_live_encoder_are_refused(make_config, wanted, told):
    with pytest.raises(ConfigError, match=told):
        load_config(make_config(), wanted)
