"""Virtual tokens: prompts and prefixes answer as in plain peft, learn, and go all the way to a graph."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from test_method_runs import run, scores
from test_methods import TAKES_NO_PREFIX, TASK, adapted, backbones, close, logits, some_batch  # noqa: F401  (a fixture)
from transformers import AutoModelForSequenceClassification

from regraft.engine.bundle import BundleInfo
from regraft.engine.config import load_config, parse_config
from regraft.engine.errors import ConfigError, ExportError, ModelError
from regraft.engine.export import export_bundle
from regraft.engine.graph_inputs import graph_inputs
from regraft.engine.methods.merge import merge
from regraft.engine.methods.plan import plan_run
from regraft.engine.methods.virtual import Prompt
from regraft.engine.packing import pack
from regraft.engine.trained import load_trained
from regraft.engine.training.setup import prepare
from regraft.serve.session import Session


def padded(batch, pad: int) -> dict[str, torch.Tensor]:
    each = batch.input_ids.split(batch.lengths)
    ids = torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=pad)
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(batch.lengths)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "prompt") for name in ("Bert", "Roberta", "Electra", "DistilBert", "ModernBert/mean")),
        *((name, "prefix") for name in ("Bert", "Roberta", "Electra")),
    ],
)
def test_the_folder_answers_the_same_in_plain_peft(name, method, backbones, tmp_path):  # noqa: F811
    from peft import PeftModel

    adaptation, ours = adapted(backbones[name], method)
    batch = some_batch(4)
    expected = logits(ours, batch)
    adaptation.save(tmp_path)
    torch.manual_seed(99)  # a head drawn otherwise must be replaced by the saved one
    base = AutoModelForSequenceClassification.from_pretrained(backbones[name], num_labels=3, dtype="float32")
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    with torch.no_grad():
        assert close(loaded(**padded(batch, base.config.pad_token_id or 0)).logits, expected)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", ["Roberta", "Electra"])
def test_packed_gradients_are_the_padded_ones(name, method, backbones):  # noqa: F811
    found = []
    batch = some_batch(3)
    for packed in (False, True):
        _, model = adapted(backbones[name], method)
        if packed:
            model.run_packed()
            assert model.packed, model.reason
            model.use_kernels()
        model.double().eval()
        model(batch).square().sum().backward()
        found.append({n: p.grad for n, p in model.model.named_parameters() if p.grad is not None})
        assert any("prompt" in n or "virtual_tokens" in n for n in found[-1])
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert torch.allclose(found[1][key], expected, atol=1e-8, rtol=1e-6), key


def test_nothing_but_the_virtual_tokens_and_the_head_trains(backbones):  # noqa: F811
    adaptation, _ = adapted(backbones["Bert"], "prompt")
    trained = {n: p.shape for n, p in adaptation.model.named_parameters() if p.requires_grad}
    assert trained.pop("bert.embeddings.word_embeddings.prompt.weight") == (5, 32)
    assert trained and all(".modules_to_save." in n for n in trained)
    adaptation, _ = adapted(backbones["Bert"], "prefix")
    trained = {n: p.shape for n, p in adaptation.model.named_parameters() if p.requires_grad}
    assert trained.pop("bert.virtual_tokens.weight") == (5, 3 * 2 * 32)
    assert trained and all(".modules_to_save." in n for n in trained)


@pytest.mark.parametrize("name", TAKES_NO_PREFIX)
def test_a_model_that_takes_no_prefix_is_refused_in_one_sentence(name, backbones):  # noqa: F811
    with pytest.raises(ModelError, match=r"method: prefix: .* no way to take keys and values from outside"):
        adapted(backbones[name], "prefix")


def test_a_prompt_stands_before_every_sequence_of_a_batch():
    batch = pack([np.array([7, 8]), np.array([9])], token_types=[np.array([0, 1]), np.array([1])], marks=np.array([2]))
    longer, rows = Prompt(100, 2).before(batch)
    assert longer.input_ids.tolist() == [100, 101, 7, 8, 100, 101, 9]
    assert longer.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert longer.token_type_ids.tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert longer.cu_seqlens.tolist() == [0, 4, 7] and longer.lengths == (4, 3)
    assert rows.tolist() == [2, 3, 6] and longer.marks.tolist() == [6]


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_learn_and_go_all_the_way_to_a_server(method, make_config, tmp_path):
    folder = tmp_path / "r"
    more = [f"method={method}", "prompt.tokens=4", "training.learning_rate=3e-2"]
    path = make_config()
    run(path, folder, *more)
    assert not (folder / "best" / "model.safetensors").exists()
    assert json.loads((folder / "versions.json").read_text())["peft"]
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in history if entry["kind"] == "train"]
    assert losses[-1] < losses[0]
    kept = scores(load_trained(folder))
    assert np.allclose(scores(load_trained(folder, packing="off")), kept, atol=1e-5)
    with pytest.raises(ModelError, match="virtual tokens are no change of a weight"):
        merge(folder, tmp_path / "merged")
    assert "logits differ by at most" in export_bundle(folder, tmp_path / "bundle")
    session = Session(tmp_path / "bundle", threads=1, warm_tokens=64)
    answers = session.decode(session.run(session.tokenize(["good warm film", "very bad slow joke", "long scene"])))
    served = np.array([[a.scores[label] for label in sorted(a.scores)] for a in answers])
    trained = load_trained(folder)
    from regraft.engine.predict import predict

    texts = [("good warm film", None), ("very bad slow joke", None), ("long scene", None)]
    own = [a.prediction.scores for a in predict(trained, texts)]
    assert np.allclose(served, [[s[label] for label in sorted(s)] for s in own], atol=1e-5)
    if method == "prefix":
        with pytest.raises(ExportError, match="exported packed only"):
            export_bundle(folder, tmp_path / "padded", layout="padded")


def test_a_padded_graph_takes_a_prompts_ids_before_the_texts(backbones):  # noqa: F811
    adaptation, ours = adapted(backbones["Bert"], "prompt")
    batch = some_batch(4)
    info = BundleInfo("padded", "fp32", TASK, 50, 0, 0, True, prompt=[200, 5])
    arrays = graph_inputs(info, [part.numpy() for part in batch.input_ids.split(batch.lengths)])
    with torch.no_grad():
        found = adaptation.model(**{name: torch.from_numpy(values) for name, values in arrays.items()}).logits
    assert close(found, logits(ours, batch))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_run_with_virtual_tokens_can_be_planned(method, make_config):
    found = plan_run(load_config(make_config(method=method, prompt={"tokens": 4})), alternatives=False)
    head = 2 * 32 + 2
    assert found.chosen.trained - head == {"prompt": 4 * 32, "prefix": 4 * 2 * 2 * 32}[method]
    assert found.fits


def test_virtual_tokens_take_their_positions_from_the_texts(make_config):
    path = make_config(method="prompt", prompt={"tokens": 20})
    assert prepare(load_config(path)).max_length == 64 - 20
    with pytest.raises(ConfigError, match="at most 44 tokens after 20 virtual ones"):
        prepare(load_config(path, ["model.max_length=50"]))
    with pytest.raises(ConfigError, match=r"prompt\.tokens: 62; .* has 64 positions, which leaves none"):
        prepare(load_config(path, ["prompt.tokens=62"]))


def test_a_prefix_is_not_computed_twice():
    values = {"model": {"name": "x"}, "data": {"train": "t.csv"}, "method": "prefix"}
    with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: a prefix"):
        parse_config({**values, "training": {"gradient_checkpointing": True}})
    with pytest.raises(ConfigError, match="prompt: method: lora does not use it"):
        parse_config({**values, "method": "lora", "prompt": {"tokens": 3}})
