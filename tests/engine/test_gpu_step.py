"""The GPU's packed step, as far as it runs without one: buckets, dummies, fused modules, seeds and gradients."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from regraft.engine.buckets import Bucket, bucket_of, fill_up, round_up
from regraft.engine.fast_gpu import bind_fused
from regraft.engine.models import RunningModel
from regraft.engine.packing import pack
from regraft.engine.training.graphed import GraphedGradients, why_not_graphed
from regraft.engine.varlen_layout import VarlenLayout
from regraft.kernels.choice import forced


def batch_of(*lengths: int):
    return pack([torch.randint(5, 60, (n,)).numpy() for n in lengths])


def bound(folder, *, dropout: float = 0.0, last_layer: bool = True) -> RunningModel:
    torch.manual_seed(0)
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "classifier_dropout": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **options)
    running = RunningModel(model, pad_token_id=0)
    running.run_packed()
    if last_layer:
        with forced("reference"):  # the CPU's own fused modules would take the places of these
            running.use_kernels()
    assert bind_fused(running)
    return running


def loss(logits, targets, weights):
    return (torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", [(1,), (7, 1, 30), (3,) * 9, (64, 64, 64), tuple(range(1, 40))])
def test_a_bucket_takes_the_batch_and_dummies_no_longer_than_its_longest(lengths):
    batch = batch_of(*lengths)
    bucket = bucket_of(batch)
    filled = fill_up(batch, bucket, pad_token_id=0)
    assert (filled.tokens, filled.sequences) == (bucket.tokens, bucket.sequences)
    assert filled.max_seqlen == batch.max_seqlen <= bucket.longest
    assert filled.lengths[: len(lengths)] == lengths
    assert torch.equal(filled.input_ids[: batch.tokens], batch.input_ids)
    assert filled.position_ids.max() < batch.max_seqlen
    assert filled.cu_seqlens[-1] == filled.tokens


def test_buckets_are_few_and_waste_an_eighth_at_most():
    sizes = {round_up(n, 128) for n in range(1, 16385)}
    assert len(sizes) < 8 * 8
    assert all(n <= round_up(n, 128) <= n * 1.125 + 1 for n in range(128, 16385, 7))


def test_fused_modules_give_the_same_logits_and_gradients_and_touch_no_parameter(tiny_model):
    running = bound(tiny_model)
    plain = RunningModel(AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3), pad_token_id=0)
    plain.model.load_state_dict(running.model.state_dict())
    plain.run_packed()
    batch = batch_of(5, 1, 17, 17)
    for one in (running.eval(), plain.eval()):
        one(batch).square().sum().backward()
    assert torch.allclose(running(batch), plain(batch), atol=1e-5)
    ours, theirs = gradients(running.model), gradients(plain.model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, atol=1e-4), name


def test_every_kind_of_module_is_bound_on_bert_and_unbound_when_the_model_runs_padded(tiny_model):
    running = bound(tiny_model, last_layer=False)
    del running.layout_of
    for module in running.model.modules():
        vars(module).pop("forward", None)
    found = bind_fused(running)
    assert found == {"dropout + residual + LayerNorm": 4, "bias + GELU": 2, "embeddings + LayerNorm": 1}
    running.run_padded("to see")
    assert not any("forward" in vars(m) for m in running.model.modules())
    assert "layout_of" not in vars(running)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dummy_sequences_change_neither_the_loss_nor_any_gradient(tiny_model, dropout):
    running = bound(tiny_model, dropout=dropout).train()
    batch, targets, weights = batch_of(9, 4, 30), torch.tensor([0, 2, 1]), torch.tensor([1.0, 0.5, 2.0])
    graphed = GraphedGradients(running, loss, list(running.parameters()), capture=False)
    found = graphed(batch, targets, weights, factor=0.5, seed=11)
    ours = gradients(running)
    running.zero_grad(set_to_none=True)
    layout = VarlenLayout(batch.cu_seqlens, batch.max_seqlen, batch.tokens, torch.tensor([11]))
    logits = running.run_layout(layout, batch.input_ids, batch.position_ids, torch.zeros_like(batch.input_ids))
    expected = loss(logits, targets, weights) * 0.5
    expected.backward()
    assert torch.allclose(found, expected, atol=1e-6)
    for name, gradient in gradients(running).items():
        assert torch.allclose(ours[name], gradient, atol=1e-5), name


def test_the_seed_alone_decides_the_masks(tiny_model):
    running = bound(tiny_model, dropout=0.3).train()
    graphed = GraphedGradients(running, loss, list(running.parameters()), capture=False)
    batch, targets, weights = batch_of(9, 4, 30), torch.tensor([0, 2, 1]), torch.ones(3)
    first, second, other = (float(graphed(batch, targets, weights, seed=s)) for s in (1, 1, 2))
    assert first == second != other


def test_gradients_of_micro_batches_add_up_until_they_are_cleared(tiny_model):
    running = bound(tiny_model).train()
    graphed = GraphedGradients(running, loss, list(running.parameters()), capture=False)
    a, b = batch_of(5, 6), batch_of(20, 3, 2)
    ones = torch.ones(3)
    graphed(a, torch.tensor([0, 1]), ones[:2])
    alone = gradients(running)
    graphed(b, torch.tensor([0, 1, 2]), ones)
    both = gradients(running)
    running.zero_grad(set_to_none=True)
    graphed(b, torch.tensor([0, 1, 2]), ones)
    for name, gradient in gradients(running).items():
        assert torch.allclose(both[name], alone[name] + gradient, atol=1e-5), name


def test_batches_of_like_shape_share_a_bucket(tiny_model):
    running = bound(tiny_model).train()
    graphed = GraphedGradients(running, loss, list(running.parameters()), capture=False)
    for lengths in ((30, 20, 10), (29, 20, 12), (32, 19, 9)):
        graphed(batch_of(*lengths), torch.tensor([0, 1, 2]), torch.ones(3))
    assert len(graphed.seen) == 1


def test_what_cannot_be_captured_says_why(tiny_model):
    running = bound(tiny_model)
    assert why_not_graphed(running, precision="bf16", kernels="auto", capturable=False) is None
    assert "fp16" in why_not_graphed(running, precision="fp16", kernels="auto", capturable=False)
    assert "on cpu" in why_not_graphed(running, precision="bf16", kernels="auto")
    assert "off" in why_not_graphed(running, precision="bf16", kernels="off")
    running.run_padded("it mixes neighbours")
    assert "mixes neighbours" in why_not_graphed(running, precision="bf16", kernels="auto", capturable=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replayed_graph_takes_the_same_step_as_eager_running(tiny_model):
    running = bound(tiny_model, dropout=0.2).cuda().train()
    parameters = list(running.parameters())
    captured = GraphedGradients(running, loss, parameters)
    eager = GraphedGradients(running, loss, parameters, capture=False)
    for seed, lengths in enumerate([(9, 4, 30), (10, 4, 29), (9, 4, 30), (5, 5, 5)]):
        batch, targets = batch_of(*lengths), torch.tensor([0, 2, 1])
        found = []
        for how in (captured, eager):
            running.zero_grad(set_to_none=True)
            found.append((float(how(batch, targets, torch.ones(3), seed=seed)), gradients(running)))
        assert captured.reason == ""
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
        for name, gradient in found[1][1].items():
            assert torch.allclose(found[0][1][name], gradient, atol=1e-4), name


def test_a_bucket_is_what_it_says():
    assert bucket_of(batch_of(30, 20, 10)) == Bucket(128, 8, 32)


def test_a_run_trained_through_buckets_ends_where_a_plain_one_does(make_config, tiny_model, tmp_path, monkeypatch):
    from regraft.engine.config import load_config
    from regraft.engine.training import graphed, run

    folder = tmp_path / "without dropout"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    plain = RunningModel.use_kernels

    def as_on_a_gpu(running):
        plain(running)
        assert bind_fused(running)

    def uncaptured(running, task, parameters, *, autocast, **_):
        return GraphedGradients(running, graphed.loss_of(task), parameters, autocast=autocast, capture=False)

    losses = {}
    for name in ("plain", "buckets"):
        if name == "buckets":
            monkeypatch.setattr(RunningModel, "use_kernels", as_on_a_gpu)
            monkeypatch.setattr(graphed, "graph_steps", uncaptured)
        training = {"max_steps": 3, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32", "token_budget": 40}
        path = make_config(f"{name}.yaml", run=str(tmp_path / name), training=training, model={"name": str(folder)})
        found = losses[name] = []
        run.train(load_config(path), on_step=lambda info, to=found: to.append(info.loss), quiet=True)
    assert losses["buckets"] == pytest.approx(losses["plain"], rel=1e-3)
