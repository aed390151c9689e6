"""What a run leaves: a Hugging Face folder, a bundle that answers alike, predictions in every format."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from conftest import regraft
from regraft.engine.bundle import read_info
from regraft.engine.config import load_config
from regraft.engine.errors import BundleError, ExportError
from regraft.engine.export import check_parity, export_bundle, graph_runner, open_graph
from regraft.engine.predict import predict
from regraft.engine.quantise import candidates, matrix_products, quantise
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train

TEXTS = ["good film", "bad slow dull plot and a very long story " * 9, "x", "warm music, short scene"]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, tiny_model) -> Path:
    from conftest import sentences

    folder = tmp_path_factory.mktemp("trained")
    for name, count in (("train", 128), ("dev", 60)):
        rows = "".join(f"{t},{label}\n" for t, label in sentences(count, count))
        (folder / f"{name}.csv").write_text("text,label\n" + rows)
    config = {
        "run": str(folder / "run"),
        "model": {"name": str(tiny_model)},
        "data": {"train": str(folder / "train.csv"), "dev": str(folder / "dev.csv")},
        "training": {"epochs": 3, "learning_rate": 3e-3, "precision": "fp32"},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    train(load_config(folder / "run.yaml"), quiet=True)
    return folder / "run"


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory) -> tuple[Path, str]:
    """Its packed bundle, to be read only, and what the export told."""
    folder = tmp_path_factory.mktemp("exported") / "b"
    return folder, export_bundle(trained_run, folder)


@pytest.fixture(scope="module")
def exported_int8(trained_run, tmp_path_factory) -> tuple[Path, str]:
    """The same in int8."""
    folder = tmp_path_factory.mktemp("int8") / "b"
    return folder, export_bundle(trained_run, folder, int8=True, max_loss=2.0)


def test_the_best_folder_loads_in_plain_transformers_with_the_same_logits(trained_run):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained_run / "best")
    model = AutoModelForSequenceClassification.from_pretrained(trained_run / "best").eval()
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        plain = model(**inputs).logits.softmax(-1).double().numpy()
    trained = load_trained(trained_run)
    answers = list(predict(trained, [(t, None) for t in TEXTS]))
    ours = np.array([[a.prediction.scores[name] for name in trained.task.labels] for a in answers])
    assert np.abs(plain - ours).max() < 1e-5
    assert model.config.id2label == {0: "neg", 1: "pos"}
    assert model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_bundle_answers_like_the_model_alone_and_together(trained_run, exported, tmp_path, layout):
    from regraft.serve.session import Session

    folder, told = exported
    if layout != "packed":
        folder = tmp_path / "b"
        told = export_bundle(trained_run, folder, layout=layout)
    assert "accuracy" in told
    info = read_info(folder)
    assert info.parity["largest_error"] < 1e-4
    assert info.quality["graph"] == pytest.approx(info.quality["model"], abs=0.02)
    expected = list(predict(load_trained(trained_run), [(t, None) for t in TEXTS]))
    session = Session(folder)
    for group in (TEXTS, *[[t] for t in TEXTS]):
        encoded = session.tokenize(group, None)
        found = session.decode(session.run(encoded))
        for text, answer, item in zip(group, found, encoded, strict=True):
            wanted = expected[TEXTS.index(text)]
            assert answer.label == wanted.prediction.label
            assert answer.scores == pytest.approx(wanted.prediction.scores, abs=1e-4)
            assert item.truncated == wanted.cut_tokens


def test_int8_is_measured_and_refused_when_it_costs_too_much(trained_run, exported_int8, tmp_path):
    info = read_info(exported_int8[0])
    assert info.precision == "int8"
    assert info.quality["loss_points"] <= 2.0
    with pytest.raises(ExportError, match=r"int8 costs more than -50.0 points.*Tried all layers"):
        export_bundle(trained_run, tmp_path / "c", int8=True, max_loss=-50.0)
    assert not (tmp_path / "c").exists()
    assert not list(tmp_path.glob(".*"))


def test_int8_is_gated_on_rows_alone_too_and_says_why(trained_run, exported_int8, tmp_path, monkeypatch):
    bundle, told = exported_int8
    alone = read_info(bundle).quality["alone"]
    assert alone["rows"] == 60 and alone["loss_points"] <= 2.0 and "one row at a time, 60 rows" in told
    assert "what else is in its batch" in (bundle / "README.md").read_text()

    def bad_alone(session, info):
        run = graph_runner(session, info)
        return lambda ids, types, marks: [x * (-1 if len(ids) == 1 else 1) for x in run(ids, types, marks)]

    monkeypatch.setattr("regraft.engine.export.check_parity", lambda run, expected: {})
    monkeypatch.setattr("regraft.engine.export.graph_runner", bad_alone)
    with pytest.raises(ExportError, match=r"int8 costs more than 3\.0 points.*one row at a time"):
        export_bundle(trained_run, tmp_path / "c", int8=True, max_loss=3.0)
    assert not (tmp_path / "c").exists()


def test_a_product_that_is_to_stay_in_fp32_does_whatever_its_kind(exported, tmp_path):
    graph, target = exported[0] / "model.onnx", tmp_path / "int8.onnx"
    products = matrix_products(graph)
    assert {"MatMul", "Gemm"} == {n.op_type for n in onnx.load(graph).graph.node if n.name in products}
    for quantised in ((), *((p,) for p in products), tuple(products)):
        quantise(graph, target, tuple(p for p in products if p not in quantised))
        found = [n.op_type for n in onnx.load(target).graph.node]
        assert found.count("MatMulInteger") == len(quantised), quantised


def test_int8_leaves_out_the_worst_products_few_at_a_time():
    products = [f"p{i}" for i in range(30)]
    bad = {"p7": 4.0, "p8": 4.0, "p20": 9.0}

    def error_of(kept):
        return 1.0 + sum(harm for name, harm in bad.items() if name not in kept)

    tried = list(candidates(products, error_of))
    assert [len(c.kept) for c in tried] == [0, 3, 6, 12, 24]
    assert "p20" in tried[1].kept and bad.keys() <= set(tried[2].kept)
    assert tried[2].name == "24 of 30 products"


def test_a_graph_that_differs_is_refused_with_the_figures(trained_run, exported, tmp_path):
    from regraft.engine.export import grid_logits

    path = shutil.copytree(exported[0], tmp_path / "b") / "model.onnx"
    info = read_info(tmp_path / "b")
    expected = grid_logits(load_trained(trained_run))
    check_parity(graph_runner(open_graph(path), info), expected)
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name.endswith("classifier.bias"))
    values = onnx.numpy_helper.to_array(bias) + np.float32(0.01)
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"differ from the model's by .* \(allowed 1e-04\), worst for"):
        check_parity(graph_runner(open_graph(path), info), expected)


def test_an_export_that_answers_otherwise_on_real_rows_is_refused(trained_run, tmp_path, monkeypatch):
    """A fault that the grid cannot see: its sequences have one token type, pairs have two."""
    import regraft.engine.graphs as graphs

    folder = tmp_path / "pairs"
    shutil.copytree(trained_run / "best", folder)
    facts = json.loads((folder / "regraft.json").read_text())
    facts["data"] |= {"columns": {"text": "a", "text_pair": "b", "label": "label"}, "dev": str(tmp_path / "dev.csv")}
    (folder / "regraft.json").write_text(json.dumps(facts))
    (tmp_path / "dev.csv").write_text("a,b,label\n" + "good film,bad plot,pos\ndull,warm,neg\n" * 4)
    write = graphs.write_graph

    def write_wrong(running, info, path):
        types = running.model.bert.embeddings.token_type_embeddings.weight
        right = types.detach().clone()
        with torch.no_grad():
            types[1] += torch.randn(types.shape[1])
        write(running, info, path)
        with torch.no_grad():
            types.copy_(right)

    assert "8 rows" in export_bundle(folder, tmp_path / "right")
    assert read_info(tmp_path / "right").pairs is True
    monkeypatch.setattr(graphs, "write_graph", write_wrong)
    with pytest.raises(
        ExportError, match=r"outputs differ .* worst for .*dev\.csv:\d.*; accuracy .* nothing was written"
    ):
        export_bundle(folder, tmp_path / "wrong")
    assert not list(tmp_path.glob("*wrong*"))


def test_held_out_rows_that_cannot_be_used_are_told_and_not_called_gone(trained_run, tmp_path):
    folder = tmp_path / "best"
    shutil.copytree(trained_run / "best", folder)
    facts = json.loads((folder / "regraft.json").read_text())
    (tmp_path / "dev.csv").write_text("text,label\ngood,pos\nfine,poss\n")
    facts["data"]["dev"] = str(tmp_path / "dev.csv")
    (folder / "regraft.json").write_text(json.dumps(facts))
    done = regraft("export", folder, "--to", tmp_path / "b")
    assert done.returncode == 2 and "dev.csv:3" in done.stderr and "'poss'" in done.stderr
    assert not (tmp_path / "b").exists()


def test_a_bundle_that_was_changed_or_is_not_one_is_refused(trained_run, exported, tmp_path):
    shutil.copytree(exported[0], tmp_path / "b")
    with pytest.raises(ExportError, match="already there"):
        export_bundle(trained_run, tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: changed since it was exported"):
        read_info(tmp_path / "b")
    (tmp_path / "b" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx: missing"):
        read_info(tmp_path / "b")
    (tmp_path / "other").mkdir()
    with pytest.raises(ExportError, match="not a bundle"):
        export_bundle(trained_run, tmp_path / "other", force=True)


def test_export_without_the_runs_rows_says_so_and_int8_is_refused(trained_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained_run / "best", copy)
    facts = json.loads((copy / "regraft.json").read_text())
    facts["data"]["train"] = facts["data"]["dev"] = str(tmp_path / "gone.csv")
    (copy / "regraft.json").write_text(json.dumps(facts))
    assert "rows are gone" in export_bundle(copy, tmp_path / "b")
    with pytest.raises(ExportError, match="--data FILE"):
        export_bundle(copy, tmp_path / "c", int8=True)
    dev = trained_run.parent / "dev.csv"
    assert "60 rows" in export_bundle(copy, tmp_path / "c", int8=True, max_loss=3.0, data_file=str(dev))


def test_threads_of_the_graph_are_this_processs_share(exported):
    from regraft.engine.threads import available_threads

    options: ort.SessionOptions = open_graph(exported[0] / "model.onnx").get_session_options()
    assert options.intra_op_num_threads == available_threads()


def test_predict_streams_in_every_format(trained_run, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    out = regraft("predict", trained_run, "--file", tmp_path / "in.jsonl", "--format", "jsonl").stdout
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["text"] for a in answers] == TEXTS
    assert answers[1]["cut_tokens"] > 0
    assert all(sum(a["scores"].values()) == pytest.approx(1, abs=1e-4) for a in answers)
    piped = regraft("predict", trained_run, "--format", "csv", "--top-k", "1", input="\n".join(TEXTS) + "\n").stdout
    table = list(csv.DictReader(io.StringIO(piped)))
    assert [r["label"] for r in table] == [a["label"] for a in answers]
    assert float(table[0]["score_1"]) == pytest.approx(max(answers[0]["scores"].values()), abs=1e-5)
    shown = regraft("predict", trained_run, "good film", "--format", "table").stdout
    assert answers[0]["label"] in shown


def test_rows_of_another_form_are_read_as_they_are(trained_run, tmp_path):
    """A model that learned from a tsv without header, and files that are none."""
    folder = tmp_path / "best"
    shutil.copytree(trained_run / "best", folder)
    facts = json.loads((folder / "regraft.json").read_text())
    facts["data"] |= {"format": "tsv", "header": False, "columns": {"text": 1, "label": 0}}
    (folder / "regraft.json").write_text(json.dumps(facts))
    (tmp_path / "in.jsonl").write_text('{"text": "good film", "label": "pos"}\n')
    done = regraft("predict", folder, "--file", tmp_path / "in.jsonl")
    assert done.returncode == 2 and "in.jsonl" in done.stderr
    columns = ["--set", "data.columns.text=text", "--set", "data.columns.label=label", "--set", "data.header=true"]
    done = regraft("predict", folder, "--file", tmp_path / "in.jsonl", *columns)
    assert json.loads(done.stdout)["text"] == "good film"
    done = regraft("evaluate", folder, tmp_path / "in.jsonl", *columns, "--format", "json")
    assert json.loads(done.stdout)["rows"] == 1
    blank = regraft("predict", trained_run, "--set", "data.empty=drop", input="good film\n\nbad plot\n")
    assert [json.loads(line)["text"] for line in blank.stdout.splitlines()] == ["good film", "bad plot"]
    assert "1 rows left out: empty" in blank.stderr
    wrong = regraft("predict", trained_run, "x", "--set", "data.formt=csv")
    assert wrong.returncode == 2 and "did you mean 'format'" in wrong.stderr
    wrong = regraft("predict", trained_run, "x", "--set", "training.seed=1")
    assert wrong.returncode == 2 and "only what `data` says" in wrong.stderr


def test_a_pair_for_a_model_of_single_texts_is_refused_and_the_other_way_round(trained_run, tmp_path):
    done = regraft("predict", trained_run, "good film", "--pair", "bad plot")
    assert done.returncode == 2 and "learned from single texts, and 'good film' has a second text" in done.stderr
    folder = tmp_path / "best"
    shutil.copytree(trained_run / "best", folder)
    facts = json.loads((folder / "regraft.json").read_text())
    facts["data"]["columns"] = {"text": "a", "text_pair": "b", "label": "label"}
    (folder / "regraft.json").write_text(json.dumps(facts))
    done = regraft("predict", folder, "good film")
    assert done.returncode == 2 and "learned from pairs of texts, and 'good film' has no second text" in done.stderr


def test_more_answers_than_labels_leave_the_table_whole(trained_run):
    out = regraft("predict", trained_run, "good film", "--format", "csv", "--top-k", "9").stdout
    header, row = csv.reader(io.StringIO(out))
    assert len(header) == len(row) == 8
    assert dict(zip(header, row, strict=True))["cut_tokens"] == "0"


def test_evaluate_gives_the_figures_of_the_run(trained_run):
    done = regraft("evaluate", trained_run, "--format", "json")
    found = json.loads(done.stdout)
    expected = json.loads((trained_run / "run.json").read_text())["result"]["metrics"]["dev"]
    assert found["metrics"] == pytest.approx(expected, abs=1e-6)
    assert found["rows"] == 60
