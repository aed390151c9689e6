"""Heads: each follows its formula, pays no heed to padding, learns, resumes, exports and serves like any other model."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conftest import sentences
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError
from regraft.engine.export import export_bundle
from regraft.engine.features.rows import FeatureBatch
from regraft.engine.figures import figure
from regraft.engine.heads.bodies import AttentionPooling, BiLSTM, Convolutions
from regraft.engine.heads.combine import ScalarMix, Standardise
from regraft.engine.heads.head import build_head
from regraft.engine.heads.settings import HeadConfig
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train

TOKEN_HEADS = ("attention", "bilstm", "cnn")
POOLED_HEADS = ("linear", "mlp", "logistic", "svm", "centroid")


@pytest.fixture
def frozen(make_config, write_rows, tmp_path):
    """Train a head on the tiny model's features; returns the result."""
    sections = {"train": str(write_rows("many.csv", 300, 7)), "dev": str(write_rows("other.csv", 100, 8))}
    path = make_config(method="frozen", data=sections, training={"precision": "fp32", "threads": 1, "batch_size": 16})

    def run(*overrides: str, folder: str = "r", **options):
        config = load_config(path, [f"run={tmp_path / folder}", "training.epochs=6", *overrides])
        return train(config, quiet=True, **options)

    return run


def test_the_scalar_mix_is_elmos_formula():
    mix = ScalarMix(3, layer_norm=True)
    with torch.no_grad():
        mix.weights.copy_(torch.tensor([0.3, -1.0, 2.0]))
        mix.gamma.fill_(1.7)
    hidden = torch.randn(5, 3, 8, dtype=torch.float64)
    share = np.exp([0.3, -1.0, 2.0]) / np.exp([0.3, -1.0, 2.0]).sum()
    x = hidden.numpy()
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    expected = 1.7 * (x * share[None, :, None]).sum(1)
    assert np.allclose(mix.double()(hidden).detach().numpy(), expected, atol=1e-6)
    assert mix.shares() == pytest.approx(share, abs=1e-6)


def test_rows_are_standardised_by_all_parts_together():
    rows = torch.randn(1000, 2, 5) * torch.tensor([1e-3, 1.0, 1e2, 1.0, 1.0]) + torch.tensor([0.0, 1e3, 5.0, -1.0, 0.0])
    rows[..., 4] = 0.3  # says nothing, and is not blown up
    standardise = Standardise(2, 5)
    standardise.fit(rows.split([1, 700, 299]))
    exact = rows.double()
    assert torch.allclose(standardise.mean.double(), exact.mean(0), rtol=1e-6, atol=1e-9)
    spread = exact.std(0, correction=0)
    assert torch.allclose(standardise.scale[:, :4].double(), 1 / spread[:, :4], rtol=1e-6)
    assert torch.equal(standardise.scale[:, 4], torch.ones(2))


def test_the_bilstm_is_torchs_own_over_packed_sequences():
    torch.manual_seed(0)
    ours, theirs = BiLSTM(6, 4), nn.LSTM(6, 4, batch_first=True, bidirectional=True)
    for name, value in ours.ahead.named_parameters():
        getattr(theirs, name).data.copy_(value)
    for name, value in ours.back.named_parameters():
        getattr(theirs, f"{name}_reverse").data.copy_(value)
    cells, lengths = torch.randn(3, 7, 6), torch.tensor([7, 1, 4])
    packed = nn.utils.rnn.pack_padded_sequence(cells, lengths, batch_first=True, enforce_sorted=False)
    whole, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True, padding_value=-torch.inf)
    assert torch.allclose(ours(cells, lengths), whole.amax(1), atol=1e-6)


def test_the_convolutions_are_those_of_each_text_alone():
    torch.manual_seed(0)
    body = Convolutions(6, 5, [3, 4, 5])
    text = torch.randn(1, 4, 6)
    found = body(text, torch.tensor([4]))[0]
    for at, (size, conv) in enumerate(zip((3, 4, 5), body.filters, strict=True)):
        padded = np.pad(text[0].numpy(), (((size - 1) // 2, size // 2), (0, 0)))
        weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
        values = [np.einsum("lh,fhl->f", padded[i : i + size], weight) + bias for i in range(4)]
        expected = np.maximum(np.max(values, axis=0), 0)
        assert np.allclose(found[5 * at : 5 * at + 5].detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("body", [AttentionPooling(6, 3), BiLSTM(6, 4), Convolutions(6, 5, [3, 4, 5])], ids=TOKEN_HEADS)
def test_what_lies_behind_a_texts_end_changes_nothing(body):
    cells, lengths = torch.randn(3, 9, 6), torch.tensor([2, 9, 5])
    expected = [body(cells[i : i + 1, :n], lengths[i : i + 1])[0] for i, n in enumerate(lengths)]
    cells[0, 2:], cells[2, 5:] = 1e4, -1e4
    assert torch.allclose(body(cells, lengths), torch.stack(expected), atol=1e-5)


@pytest.mark.parametrize("head", [*POOLED_HEADS, *TOKEN_HEADS])
def test_every_head_learns_and_answers_texts_as_it_did_stored_features(frozen, head):
    result = frozen(f"head.type={head}", "head.hidden=16", "training.learning_rate=1e-2", "features.layers=all")
    assert result.metrics["dev"]["accuracy"] > 0.6
    trained = load_trained(result.folder)
    texts = [t for t, _ in sentences(100, 8)]
    answers = list(predict(trained, [(t, None) for t in texts]))
    right = np.mean([a.prediction.label == label for a, (_, label) in zip(answers, sentences(100, 8), strict=True)])
    assert right == pytest.approx(result.metrics["dev"]["accuracy"], abs=1e-9)


def test_encoder_and_head_export_to_one_bundle_that_serves(frozen, tmp_path):
    from regraft.serve.session import Session

    result = frozen("head.type=attention", "head.hidden=8", "features.layers=all", "training.max_steps=5")
    report = export_bundle(result.folder, tmp_path / "bundle", layout="padded")
    assert "logits differ by at most" in report
    session = Session(tmp_path / "bundle", threads=1, warm_tokens=64)
    texts = ["good film", "bad slow dull plot and a very long story " * 4, "x"]
    served = session.decode(session.run(session.tokenize(texts)))
    for a, b in zip(predict(load_trained(result.folder), [(t, None) for t in texts]), served, strict=True):
        assert a.prediction.scores == pytest.approx(dict(b.scores), abs=1e-4)


class Stop(Exception):
    pass


def test_a_stopped_head_goes_on_as_if_it_had_not_been(frozen, tmp_path):
    options = ("head.type=mlp", "features.layers=all", "training.checkpoint_every=5")
    frozen(*options, folder="whole")

    def stop(info):
        if info.step == 37:
            raise Stop

    with pytest.raises(Stop):
        frozen(*options, folder="stopped", on_step=stop)
    frozen(*options, folder="stopped")
    one, two = (load_file(tmp_path / n / "best" / "head.safetensors") for n in ("whole", "stopped"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    lines = [(tmp_path / n / "metrics.jsonl").read_text().splitlines() for n in ("whole", "stopped")]
    losses = [[json.loads(x)["loss"] for x in each if '"train"' in x] for each in lines]
    assert losses[0] == losses[1]


def test_the_report_shows_the_learned_layer_weights(frozen):
    result = frozen("features.layers=all", "training.learning_rate=5e-2")
    page = (result.folder / "report.html").read_text()
    assert "Learned layer weights" in page
    found = json.loads((result.folder / "evaluation.json").read_text())["layer_weights"]
    weights = [row["weight"] for row in found["layers"]]
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2]
    assert sum(weights) == pytest.approx(1)
    assert max(weights) - min(weights) > 0.01


def test_elmos_penalty_holds_the_layer_weights_together(frozen):
    def spread(*options: str) -> float:
        folder = frozen(
            "features.layers=all", "training.learning_rate=5e-2", *options, folder=f"r{len(options)}"
        ).folder
        return float(load_file(folder / "best" / "head.safetensors")["combine.weights"].std())

    assert spread("head.mix_penalty=1.0") < 0.3 * spread()


def test_zero_shot_follows_the_descriptions_and_reads_no_label(frozen):
    texts = {"pos": "good fine sharp warm", "neg": "bad dull cold slow"}
    right = frozen("head.type=zeroshot", f"head.descriptions={json.dumps(texts)}", "features.layers=0", folder="a")
    turned = {"pos": texts["neg"], "neg": texts["pos"]}
    wrong = frozen("head.type=zeroshot", f"head.descriptions={json.dumps(turned)}", "features.layers=0", folder="b")
    sums = right.metrics["dev"]["accuracy"] + wrong.metrics["dev"]["accuracy"]
    assert sums == pytest.approx(1.0)
    assert right.metrics["dev"]["accuracy"] > 0.55


def test_a_description_of_no_label_is_refused_with_the_nearest(frozen):
    with pytest.raises(ConfigError, match=r"head.descriptions: 'poss' is no label of the rows \(did you mean 'pos'"):
        frozen("head.type=zeroshot", 'head.descriptions={"poss": "good", "neg": "bad"}')


def test_a_filter_over_no_token_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"head.kernels.*greater than or equal to 1"):
        load_config(make_config(method="frozen", head={"type": "cnn", "kernels": [3, 0]}))


def test_features_in_batches_are_cells_with_zeros_behind_the_end():
    batch = FeatureBatch(torch.arange(12.0).view(6, 1, 2) + 1, torch.tensor([2, 4]))
    cells, lengths = batch.cells()
    assert cells.shape == (2, 4, 1, 2)
    assert lengths.tolist() == [2, 4]
    assert torch.equal(cells[0, :2], batch.features[:2])
    assert torch.equal(cells[1], batch.features[2:])
    assert not cells[0, 2:].any()


def test_heads_that_do_not_fit_the_task_are_refused(make_config):
    for head, kind in (("logistic", "regression"), ("centroid", "multilabel"), ("zeroshot", "regression")):
        path = make_config(method="frozen", head={"type": head}, task={"type": kind})
        with pytest.raises(ConfigError, match=f"head.type: {head}"):
            load_config(path)


def test_heads_are_updated_as_torchs_adamw_would():
    from regraft.engine.heads.adamw import FusedAdamW

    weights = [
        [torch.nn.Parameter(torch.linspace(-1, 1, 6).view(2, 3)), torch.nn.Parameter(torch.ones(3))] for _ in "ab"
    ]
    settings = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-2, "weight_decay": 0.0}]
    groups = [[{"params": [w], **s} for w, s in zip(some, settings, strict=True)] for some in weights]
    ours = FusedAdamW(groups[0], betas=(0.9, 0.99), eps=1e-8)
    theirs = torch.optim.AdamW(groups[1], betas=(0.9, 0.99), eps=1e-8, fused=True)
    for step in range(5):
        for optimizer, some in ((ours, weights[0]), (theirs, weights[1])):
            for w in some:
                w.grad = torch.sin(w.detach() * (step + 1))
            optimizer.grad_scale = torch.tensor(3.0) if step == 2 else None
            optimizer.step()
        if step == 3:  # and goes on from what it saved
            state = ours.state_dict()
            ours = FusedAdamW(groups[0], betas=(0.9, 0.99), eps=1e-8)
            ours.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_several_layers_side_by_side_widen_the_last_layer():
    config = HeadConfig(mix="concat")
    assert build_head(config, layers=4, hidden=8, outputs=3).logits.weight.shape == (3, 32)
    assert build_head(HeadConfig(), layers=4, hidden=8, outputs=3).logits.weight.shape == (3, 8)


def test_several_heads_over_one_encoder_make_one_bundle_that_runs_it_once(frozen, write_rows, tmp_path):
    import onnx

    from regraft.engine.errors import ExportError
    from regraft.serve.session import Session

    other_rows = write_rows("third.csv", 70, 11)
    results = [
        frozen("head.type=bilstm", "head.hidden=8", "training.max_steps=5", folder="topic"),
        frozen("head.type=logistic", "features.layers=[0,2]", f"data.dev={other_rows}", folder="mood"),
    ]
    one, two = (result.folder for result in results)
    report = export_bundle([one, two / "best"], tmp_path / "both")
    assert "heads: topic, mood; the encoder runs once" in report
    told = re.search(r"mean on (\d+) rows of .*: model ([\d.]+), graph ([\d.]+)", report)
    own = [result.metrics["dev"]["accuracy"] for result in results]  # each on the rows that its own run held out
    assert told is not None and int(told[1]) == 100 + 70
    assert told[2] == told[3] == figure(float(np.mean(own)))
    with pytest.raises(ExportError, match="rows are of one task and this model has topic, mood"):
        export_bundle([one, two], tmp_path / "none", data_file=str(other_rows))
    assert "int8: " in export_bundle([one, two], tmp_path / "eight", int8=True, max_loss=100)
    session = Session(tmp_path / "both", threads=1, warm_tokens=64)
    texts = ["good film", "bad slow dull plot and a very long story " * 4]
    for text, answer in zip(texts, session.decode(session.run(session.tokenize(texts))), strict=True):
        shown = session.task.answer(answer, 2)["tasks"]
        for folder in (one, two):
            (alone,) = predict(load_trained(folder), [(text, None)])
            assert shown[folder.name]["scores"] == pytest.approx(dict(alone.prediction.scores), abs=1e-4)
    products = [n.op_type for n in onnx.load(tmp_path / "both" / "model.onnx").graph.node].count("Softmax")
    assert products == 2  # one attention a layer of the two
    other = frozen("model.max_length=20", "training.max_steps=2", folder="other").folder
    with pytest.raises(ExportError, match="not the same max_length"):
        export_bundle([one, other], tmp_path / "none")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pairs_of_few_rows_pull_the_classes_apart(frozen, precision, any_precision):
    from regraft.engine.heads.contrastive import PairPlan

    learning = ("training.epochs=10", "training.learning_rate=1e-3", f"training.precision={precision}")
    result = frozen("method=contrastive", "data.limit=64", *learning)
    assert result.metrics["dev"]["accuracy"] > 0.7
    assert (result.folder / "best" / "head.safetensors").is_file()
    texts = [t for t, _ in sentences(100, 8)]
    answers = predict(load_trained(result.folder), [(t, None) for t in texts])
    right = np.mean([a.prediction.label == label for a, (_, label) in zip(answers, sentences(100, 8), strict=True)])
    assert right == pytest.approx(result.metrics["dev"]["accuracy"], abs=1e-9)
    targets = np.arange(60) % 6
    order = PairPlan(60, 12, 3, 1.0, targets=targets).order(0)
    assert sorted(order) == list(range(60))
    assert set(np.bincount(targets[order[:12]]) % 2) == {0}  # nobody is alone


def loss_of_pairs(rows, targets):
    """By loops in fp64: what `pair_loss` says it is."""
    unit = [row / np.sqrt(sum(x * x for x in row)) for row in rows.astype(np.float64)]
    near, far, contrasts = [], [], []
    for i, row in enumerate(unit):
        others = [j for j in range(len(unit)) if j != i]
        cosine = {j: sum(row * unit[j]) for j in others}
        near += [(1 - cosine[j]) ** 2 for j in others if targets[j] == targets[i] and j > i]
        far += [cosine[j] ** 2 for j in others if targets[j] != targets[i] and j > i]
        whole = np.log(sum(np.exp(10 * cosine[j]) for j in others)) if others else 0.0
        own = [whole - 10 * cosine[j] for j in others if targets[j] == targets[i]]
        contrasts += [np.mean(own)] if own else []
    kinds = [np.mean(kind) for kind in (near, far) if kind]
    return (np.mean(kinds) if kinds else 0.0) + (np.mean(contrasts) if contrasts else 0.0)


@pytest.mark.parametrize(
    "targets", [[0], [0, 1], [2, 2], [0, 1, 2, 3], [1, 1, 1, 1, 1], [0, 1, 1, 0, 2, 1, 3, 3]], ids=str
)
def test_the_loss_of_pairs_is_the_formulas_by_loops_in_fp64(targets):
    from regraft.engine.heads.contrastive import pair_loss

    for _ in range(5):
        rows = torch.randn(len(targets), 7, requires_grad=True)
        loss = pair_loss(rows, torch.tensor(targets))
        loss.backward()
        assert loss.item() == pytest.approx(loss_of_pairs(rows.detach().numpy(), targets), abs=2e-5)
        assert rows.grad.isfinite().all()
        # The rows' lengths say nothing, so none of the gradient lies along them.
        assert (rows.grad * rows).sum(-1).abs().max() < 1e-4


def test_a_regression_starts_at_the_mean_of_its_targets_and_learns(make_config, tmp_path):
    rows = [(t, 50 + 4 * sum(w in {"good", "fine"} for w in t.split())) for t, _ in sentences(200, 3)]
    (tmp_path / "n.csv").write_text("text,label\n" + "".join(f"{t},{v}\n" for t, v in rows))
    sections = {"task": {"type": "regression"}, "data": {"train": str(tmp_path / "n.csv"), "dev": None}}
    path = make_config(method="frozen", features={"layers": "embeddings"}, **sections)
    result = train(load_config(path, ["training.epochs=20", "training.learning_rate=1e-2"]), quiet=True)
    assert result.metrics["dev"]["pearson"] > 0.5
    assert result.metrics["dev"]["mae"] < 5
