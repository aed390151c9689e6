"""Several adapters over one backbone: in memory once, switched at once, and one graph that answers for all of them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from test_method_runs import TEXTS
from test_methods import TASK, backbones, close, config_for, facts_of, logits, some_batch  # noqa: F401  (a fixture)
from test_models import PACKED

from regraft.engine.bundle import BundleInfo, read_info
from regraft.engine.cli import main
from regraft.engine.errors import ExportError, ModelError
from regraft.engine.graph_inputs import graph_inputs
from regraft.engine.graphs import PackedGraph
from regraft.engine.methods.adapt import adapt, trained_weights
from regraft.engine.methods.export_several import export_adapters
from regraft.engine.methods.several import load_adapters
from regraft.engine.methods.stacked import stacked_model
from regraft.engine.models import RunningModel
from regraft.engine.predict import predict
from regraft.engine.pretrained import load_classifier
from regraft.engine.tasks import task_from_spec
from regraft.engine.trained import Trained, load_trained
from regraft.serve.http import create_app
from regraft.serve.session import Session
from running import scheduling


def in_memory(folder: Path, labels: str, seed: int, method: str = "lora", **sections: object) -> Trained:
    """An adapter with random weights, as if it had been trained."""
    task = task_from_spec({**TASK, "labels": list(labels)})
    config = config_for(folder, method, **sections)
    torch.manual_seed(seed)
    model = load_classifier(config.model, task)
    adaptation = adapt(model, config)
    for weight in trained_weights(model).values():
        weight.add_(torch.randn_like(weight) * 0.05)
    running = RunningModel(model, pad_token_id=model.config.pad_token_id or 0).eval()
    running.run_packed()
    assert running.packed, running.reason
    facts = facts_of(folder, adaptation)
    return Trained(folder, task, None, 50, None, facts, running, adaptation)  # type: ignore[arg-type]


def mixed_logits(adapters: dict[str, Trained], batch, chosen: list[int]) -> torch.Tensor:
    first = next(iter(adapters.values()))
    running = RunningModel(stacked_model(adapters), pad_token_id=first.running.pad_token_id)
    running.run_packed_as(first.running)
    info = BundleInfo(
        "packed",
        "fp32",
        TASK,
        50,
        0,
        running.position_offset,
        running.uses_token_types,
        adapters=list(adapters),
    )
    ids = [part.numpy() for part in batch.input_ids.split(batch.lengths)]
    arrays = graph_inputs(info, ids, adapters=np.array(chosen))
    with torch.no_grad():
        return PackedGraph(running)(**{k: torch.from_numpy(v) for k, v in arrays.items()})


@pytest.mark.parametrize("name", PACKED)
def test_a_mixed_batch_gives_each_sequence_its_own_adapters_logits(name, backbones):  # noqa: F811
    end = {"DistilBert": "q_lin", "NomicBert": "out_proj", "ModernBert": "Wo", "ModernBert/mean": "Wo"}
    few = {"targets": [end.get(name, "query")]} if name != "NomicBert" else {}
    adapters = {
        "three": in_memory(backbones[name], "abc", 1),
        "two": in_memory(backbones[name], "xy", 2, lora={"rank": 3, "alpha": 5, **few}),
        "one": in_memory(backbones[name], "pqrs", 3, lora={"rank": 5, "rslora": True}),
    }
    batch, chosen = some_batch(4), [1, 0, 2, 0, 1, 2]
    found = mixed_logits(adapters, batch, chosen)
    assert found.shape == (6, 4)
    alone = [logits(trained.running, batch) for trained in adapters.values()]
    for row, number in enumerate(chosen):
        assert close(found[row, : alone[number].shape[1]], alone[number][row])


def test_adapters_over_alike_quantised_weights_share_a_graph_and_others_do_not(backbones):  # noqa: F811
    folder = backbones["Bert"]
    one, two = (in_memory(folder, labels, seed, "qlora") for labels, seed in (("abc", 1), ("xy", 2)))
    batch = some_batch(4)
    found = mixed_logits({"one": one, "two": two}, batch, [0, 1, 0, 1, 0, 1])
    for row in range(6):
        own = logits((one, two)[row % 2].running, batch)[row]
        assert close(found[row, : len(own)], own)
    with pytest.raises(ExportError, match=r"plain: method 'lora' computes with other backbone weights than one"):
        stacked_model({"one": one, "plain": in_memory(folder, "xy", 2)})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": "ia3"}, "method 'ia3'; lora, qlora, int8 can be stacked"),
        ({"method": "adapter"}, "method 'adapter'"),
        ({"lora": {"dora": True}}, "DoRA's magnitudes"),
    ],
)
def test_what_cannot_be_stacked_is_refused(sections, message, backbones):  # noqa: F811
    folder = backbones["Bert"]
    with pytest.raises(ExportError, match=message):
        stacked_model({"one": in_memory(folder, "ab", 1), "other": in_memory(folder, "ab", 2, **sections)})


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory) -> Path:
    """A folder with three short runs: two LoRA adapters with other labels and ranks, and a whole model."""
    from test_methods import parse_config

    from conftest import sentences
    from regraft.engine.training.run import train

    home = tmp_path_factory.mktemp("several")
    rows = sentences(64, 1)
    named = {"mood": lambda text, label: label, "length": lambda text, _: ("short", "middle", "long")[len(text) % 3]}
    for name, method in (("mood", "lora"), ("length", "lora"), ("whole", "full")):
        label = named.get(name, named["mood"])
        lines = ["text,label", *(f"{text},{label(text, own)}" for text, own in rows)]
        (home / f"{name}.csv").write_text("\n".join(lines) + "\n")
        values = {
            "run": str(home / "runs" / name),
            "method": method,
            "model": {"name": str(tiny_model)},
            "data": {"train": str(home / f"{name}.csv"), "dev": str(home / f"{name}.csv")},
            "training": {"max_steps": 6, "batch_size": 16, "learning_rate": 1e-2, "precision": "fp32", "threads": 1},
        }
        if name == "length":
            values["lora"] = {"rank": 3, "targets": ["query", "value"]}
        train(parse_config(values), quiet=True)
    return home / "runs"


def test_adapters_share_their_backbone_and_each_answers_as_alone(runs):
    found = load_adapters([runs / "mood", runs / "length"])
    assert list(found) == ["mood", "length"]
    words = [t.running.model.get_input_embeddings().weight for t in found.values()]
    assert words[0] is words[1]
    query = [t.running.model.bert.encoder.layer[0].attention.self.query.base_layer.weight for t in found.values()]
    assert query[0] is query[1]
    heads = [t.running.model.classifier.modules_to_save["default"].weight for t in found.values()]
    assert heads[0].shape[0] == 2 and heads[1].shape[0] == 3
    for name in ("mood", "length", "mood"):  # there and back
        own = [a.prediction.scores for a in predict(load_trained(runs / name), TEXTS)]
        for answer, expected in zip(predict(found[name], TEXTS), own, strict=True):
            assert answer.prediction.scores == pytest.approx(expected, abs=1e-5)


def test_what_cannot_share_a_backbone_is_refused(runs, tmp_path):
    import shutil

    with pytest.raises(ModelError, match="method 'full' leaves a whole model"):
        load_adapters([runs / "mood", runs / "whole"])
    with pytest.raises(ModelError, match="named by their run folders"):
        load_adapters([runs / "mood", runs / "mood"])
    shutil.copytree(runs / "length", tmp_path / "other")
    facts = json.loads((tmp_path / "other" / "best" / "regraft.json").read_text())
    facts["backbone"] = "0" * 32
    (tmp_path / "other" / "best" / "regraft.json").write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"other.best: made for another backbone \(weights 000000000000"):
        load_adapters([runs / "mood", tmp_path / "other"])
    with pytest.raises(ModelError, match="made for another backbone"):
        export_adapters([runs / "mood", tmp_path / "other"], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def said(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_predict_answers_with_the_adapters_that_are_named(runs, capsys):
    code, out, err = said(capsys, "predict", runs, "--adapter", "length", "--adapter", "mood", "good film", "bad")
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [(a["adapter"], a["text"]) for a in answers] == [
        ("length", "good film"),
        ("mood", "good film"),
        ("length", "bad"),
        ("mood", "bad"),
    ]
    assert set(answers[0]["scores"]) == {"short", "middle", "long"} and set(answers[1]["scores"]) == {"pos", "neg"}
    _, out, _ = said(capsys, "predict", runs, "--adapter", "mood", "good film")
    alone = json.loads(out)["scores"]
    assert alone == pytest.approx(answers[1]["scores"], abs=1e-5)
    code, _, err = said(capsys, "predict", runs, "--adapter", "mod", "good film")
    assert code == 2 and "did you mean 'mood'" in err


def test_one_bundle_serves_several_adapters_and_mixes_them_in_a_batch(runs, tmp_path, capsys):
    code, out, err = said(capsys, "export", "--adapters", runs / "mood", runs / "length", "--to", tmp_path / "bundle")
    assert code == 0, err
    assert "graph of 2 adapters" in out and "alone and mixed" in out and "mood: accuracy" in out
    info = read_info(tmp_path / "bundle")
    assert info.adapters == ["mood", "length"] and info.parity["largest_error"] < 1e-4
    session = Session(tmp_path / "bundle", threads=1, warm_tokens=64)
    batches: list[list[int]] = []

    def watched(items):
        batches.append([item.adapter for item in items])
        return session.run(items)

    texts = [text for text, _ in TEXTS]

    async def ask(*bodies: dict) -> list[httpx.Response]:
        transport = httpx.ASGITransport(create_app(session, scheduler))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            return await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))

    with scheduling(watched, probe=session.probe(), max_batch_tokens=1024, queue_tokens=4096) as scheduler:
        both = [{"inputs": texts, "adapter": name} for name in ("mood", "length")]
        answers = asyncio.run(ask(*both, *both))
        refused = asyncio.run(
            ask({"inputs": texts}, {"inputs": texts, "adapter": "mod"}, {"inputs": texts, "adaptor": "mood"})
        )
    for name, answer in zip(["mood", "length"] * 2, answers, strict=True):
        assert answer.status_code == 200, answer.text
        for found, own in zip(answer.json()["predictions"], predict(load_trained(runs / name), TEXTS), strict=True):
            assert found["label"] == own.prediction.label
            assert found["scores"] == pytest.approx(own.prediction.scores, abs=1e-4)
    messages = [answer.json()["error"]["message"] for answer in refused]
    assert [answer.status_code for answer in refused] == [422] * 3
    assert "adapter: missing; this bundle has mood, length" in messages[0]
    assert "did you mean 'mood'" in messages[1] and "did you mean 'adapter'" in messages[2]
    mixed = session.tokenize(texts)
    from dataclasses import replace

    rows = session.run([replace(item, adapter=number) for item, number in zip(mixed, (1, 0, 1), strict=True)])
    alone = [session.run([replace(item, adapter=n)])[0] for item, n in zip(mixed, (1, 0, 1), strict=True)]
    assert np.allclose(rows, alone, atol=1e-5)


def test_options_that_a_graph_of_several_adapters_lacks_are_refused(runs, tmp_path, capsys):
    for option, word in (["--int8"], "gated"), (["--layout", "padded"], "packed"), (["--data", "x.csv"], "own run"):
        code, _, err = said(
            capsys, "export", "--adapters", runs / "mood", runs / "length", "--to", tmp_path / "b", *option
        )
        assert code == 2 and word in err
    with pytest.raises(ExportError, match="two runs or more"):
        export_adapters([runs / "mood"], tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_bundle_without_adapters_refuses_the_key():
    from running import post

    answer = post({"inputs": "good film", "adapter": "mood"})
    assert answer.status_code == 422
    assert "this bundle is one model without adapters" in answer.json()["error"]["message"]
