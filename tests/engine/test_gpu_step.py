"""The GPU's packed step, as far as it runs without one: buckets, dummies, fused modules, seeds and gradients."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForPreTraining,
    ModernBertConfig,
)

import fake_cuda
from regraft.engine.buckets import Bucket, bucket_of, fill_up, round_up
from regraft.engine.fast_gpu import bind_fused
from regraft.engine.models import RunningModel
from regraft.engine.packing import pack
from regraft.engine.tasks.answering import Answering
from regraft.engine.tasks.tagging import NO_TARGET, Tagging
from regraft.engine.training.graphed import GraphedGradients, why_not_graphed
from regraft.engine.training.graphed_losses import step_loss
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
    found = {kind: count for kind, count in bind_fused(running).items() if count}
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
    changing = why_not_graphed(running, precision="bf16", kernels="auto", capturable=False, unfreezing=True)
    assert "unfreeze.gradual" in changing
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


def test_a_bucket_that_cannot_be_captured_runs_uncaptured_and_so_do_all_later_ones(tiny_model, monkeypatch, caplog):
    running = bound(tiny_model).train()
    parameters = list(running.parameters())
    batch, targets, weights = batch_of(9, 4, 30), torch.tensor([0, 2, 1]), torch.ones(3)
    expected = float(GraphedGradients(running, loss, parameters, capture=False)(batch, targets, weights))
    wanted = gradients(running)
    cuda = fake_cuda.install(monkeypatch)

    def reads_a_value(*logits):
        cuda.draw()
        cuda.sync()
        return loss(*logits)

    graphed = GraphedGradients(running, reads_a_value, parameters)
    assert float(graphed(batch, targets, weights)) == pytest.approx(expected)
    assert float(graphed(batch_of(5, 6), targets[:2], weights[:2])) > 0
    assert "RuntimeError: operation not permitted when stream is capturing" in caplog.text
    assert (cuda.current, cuda.capturing_stream) == (0, None)
    cuda.draw()
    graphed._attach()
    running.zero_grad(set_to_none=True)
    graphed(batch, targets, weights)
    for name, gradient in gradients(running).items():
        assert torch.allclose(gradient, wanted[name], atol=1e-6), name


def test_masks_are_the_same_whether_a_bucket_is_met_for_the_first_time_or_not(tiny_model, monkeypatch):
    running = bound(tiny_model).train()
    cuda = fake_cuda.install(monkeypatch)
    found = []

    def draws(*logits):
        found.append(cuda.draw())
        return loss(*logits)

    graphed = GraphedGradients(running, draws, list(running.parameters()))
    graphed(batch_of(9, 4, 30), torch.tensor([0, 2, 1]), torch.ones(3))
    assert cuda.offset == 4, "one draw, that of the replay: neither warming up nor capturing count"


def test_several_gpus_share_a_model_made_on_a_stream_that_can_be_captured(monkeypatch):
    from regraft.engine.training.run import _Run

    cuda = fake_cuda.install(monkeypatch)
    made_on = lambda processes: SimpleNamespace(  # noqa: E731
        running=None,
        accelerator=SimpleNamespace(
            num_processes=processes, device=torch.device("cuda"), prepare_model=lambda model: cuda.current
        ),
    )
    assert _Run.wrapped(made_on(2)) != 0
    assert _Run.wrapped(made_on(1)) == 0


def test_a_bucket_is_what_it_says():
    assert bucket_of(batch_of(30, 20, 10)) == Bucket(128, 8, 32)


def test_a_run_trained_through_buckets_ends_where_a_plain_one_does(make_config, tiny_model, tmp_path, monkeypatch):
    from regraft.engine.config import load_config
    from regraft.engine.training import run, ways

    folder = tmp_path / "without dropout"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    plain = RunningModel.use_kernels

    def as_on_a_gpu(running):
        plain(running)
        assert bind_fused(running)

    def uncaptured(run):
        loss, autocast = step_loss(run.data.task), run.accelerator.autocast
        run.stepper.graphed = GraphedGradients(run.running, loss, run.parameters, autocast=autocast, capture=False)
        ways.capture_update(run.stepper, capture=False)
        assert run.stepper.update is not None

    losses = {}
    for name in ("plain", "buckets"):
        if name == "buckets":
            monkeypatch.setattr(RunningModel, "use_kernels", as_on_a_gpu)
            monkeypatch.setattr(ways, "set_way", uncaptured)
        training = {"max_steps": 6, "batch_size": 24, "learning_rate": 3e-3, "precision": "fp32", "token_budget": 40}
        path = make_config(f"{name}.yaml", run=str(tmp_path / name), training=training, model={"name": str(folder)})
        found = losses[name] = []
        run.train(load_config(path), on_step=lambda info, to=found: to.append(info.loss), quiet=True)
    assert losses["buckets"] == pytest.approx(losses["plain"], rel=1e-3)


# ---- ModernBERT -----------------------------------------------------------------------------------------------------


def modern(
    make=AutoModelForSequenceClassification, *, reads: str = "first", num_labels: int = 3, **options
) -> RunningModel:
    torch.manual_seed(0)
    config = ModernBertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=200, num_labels=num_labels,
        max_position_embeddings=300, local_attention=16, global_attn_every_n_layers=3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, cls_token_id=1, sep_token_id=2, **options,
    )  # fmt: skip
    model = make.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than the usual start, so that mistakes show
            torch.nn.init.normal_(weight, std=0.3)
    running = RunningModel(model, pad_token_id=0, reads=reads)
    running.run_packed()
    assert running.packed, running.reason
    return running


def test_a_rotary_model_as_it_is_exported_gives_the_same_logits():
    from regraft.engine.graphs import GraphLayout

    running = modern().eval()
    batch = batch_of(40, 1, 17)
    lengths = torch.tensor(batch.lengths)
    cells = torch.arange(40)
    inside = cells < lengths[:, None]
    starts = batch.cu_seqlens[:-1, None].long()
    layout = GraphLayout(torch.where(inside, starts + cells, 0), inside.flatten().nonzero()[:, 0], lengths)
    with torch.no_grad():
        expected = running(batch)
        running.use_kernels()
        found = running.run_layout(layout, batch.input_ids, batch.position_ids, None)
        fast = running(batch)
    assert "forward" in vars(running.model.model.layers[1].attn)
    assert torch.allclose(fast, expected, atol=2e-5, rtol=1e-4)
    assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"classifier_pooling": "mean"}, {"mlp_bias": True, "attention_bias": True}])
def test_a_gated_and_rotary_model_gives_the_same_logits_and_gradients_by_fused_modules(options):
    batch = batch_of(40, 1, 17, 33)  # longer than the window of the local layers
    found = []
    for fused in (False, True):
        running = modern(**options).double().eval()
        if fused:
            assert {k: v for k, v in bind_fused(running).items() if v} == {"GeGLU": 3, "rotary attention": 3}
        logits = running(batch)
        logits.square().sum().backward()
        found.append((logits.detach(), gradients(running.model)))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6, rtol=1e-5)  # its angles are in fp32
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        assert torch.allclose(found[1][1][name], gradient, atol=1e-5 * float(gradient.abs().max()) + 1e-9), name


def test_a_module_that_only_looks_like_a_gated_one_stays_as_it_is(monkeypatch):
    running = modern().eval()
    with torch.no_grad():
        before = running(batch_of(9, 4))
    mlp = running.model.model.layers[1].mlp
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: self.Wo(self.act(self.Wi(x).chunk(2, -1)[1])))
    with torch.no_grad():
        other = running(batch_of(9, 4))
    assert not torch.allclose(before, other)
    assert bind_fused(running)["GeGLU"] == 0
    assert "forward" not in vars(mlp)


def test_a_kernel_that_fails_costs_its_kind_alone_and_the_log_says_which(tiny_model, monkeypatch, caplog):
    def broken(*_, **__):
        raise ValueError("head size is 26\nand more")

    monkeypatch.setattr("regraft.engine.fast_gpu.bias_gelu", broken)
    running = bound(tiny_model, last_layer=False)
    assert running.bound["bias + GELU"] == 0 and running.bound["dropout + residual + LayerNorm"] == 4
    assert "bias + GELU stays as it was: ValueError: head size is 26" in caplog.messages
    running.run_padded("to start anew")
    assert running.bound == {}
    running.run_packed()
    monkeypatch.setattr("regraft.engine.varlen_layout.varlen_attention", broken)
    assert bind_fused(running) == {} and "layout_of" not in vars(running)
    assert "attention by cu_seqlens stays as it was: ValueError: head size is 26" in caplog.messages


def test_a_checkpointed_model_is_left_alone_for_its_layers_run_twice(tiny_model):
    running = bound(tiny_model, last_layer=False)
    running.run_padded("to start anew")
    running.run_packed()
    running.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert bind_fused(running) == {}
    assert not any("forward" in vars(m) for m in running.model.modules())


def test_a_model_with_two_kinds_of_logits_is_bound_too(tiny_model):
    running = RunningModel(BertForPreTraining.from_pretrained(tiny_model), pad_token_id=0, reads="marked")
    running.run_packed()
    assert bind_fused(running)["dropout + residual + LayerNorm"] == 4
    assert "marked tokens" in why_not_graphed(running, precision="bf16", kernels="auto", capturable=False)


# ---- heads that read every token ------------------------------------------------------------------------------------


def tagged(batch):
    """Tags at the first token of each word; some tokens belong to no word, one sequence has none at all."""
    rows = []
    for length in batch.lengths:
        tags = torch.randint(0, 3, (length,))
        tags[torch.rand(length) < 0.4] = NO_TARGET
        rows.append(torch.full((length,), NO_TARGET) if length == 4 else tags)
    tags = torch.cat(rows)
    return torch.stack([tags, torch.arange(len(tags))], dim=1)


def answered(batch):
    return torch.stack([torch.randint(0, n, (2,)) for n in batch.lengths])


TOKEN_TASKS = {
    "tagging": (lambda: Tagging(("A",), tags="iob2", label_smoothing=0.1), AutoModelForTokenClassification, tagged),
    "answering": (Answering, AutoModelForQuestionAnswering, answered),
}


@pytest.mark.parametrize("name", TOKEN_TASKS)
@pytest.mark.parametrize("encoder", ["bert", "modern"])
def test_a_head_that_reads_every_token_has_the_loss_and_gradients_of_its_task(tiny_model, name, encoder):
    make_task, make, make_targets = TOKEN_TASKS[name]
    task = make_task()
    torch.manual_seed(0)
    if encoder == "bert":
        running = RunningModel(
            make.from_pretrained(tiny_model, num_labels=task.outputs), pad_token_id=0, reads="tokens"
        )
        running.run_packed()
    else:
        running = modern(make, reads="tokens", num_labels=task.outputs)
    assert bind_fused(running)
    assert why_not_graphed(running, precision="bf16", kernels="auto", capturable=False, task=task) is None
    running.eval()
    graphed = GraphedGradients(running, step_loss(task), list(running.parameters()), capture=False)
    for lengths in ((9, 4, 30), (20, 4, 11, 7)):
        batch = batch_of(*lengths)
        targets, weights = make_targets(batch), torch.rand(len(lengths)) + 0.5
        running.zero_grad(set_to_none=True)
        found = float(graphed(batch, targets, weights, factor=0.25))
        ours = gradients(running)
        running.zero_grad(set_to_none=True)
        wanted = task.batch_loss(running(batch), targets, weights, batch.lengths) * 0.25
        wanted.backward()
        assert found == pytest.approx(wanted.item(), rel=1e-5)
        for key, gradient in gradients(running).items():
            assert torch.allclose(ours[key], gradient, atol=1e-5 * max(1.0, float(gradient.abs().max()))), key


@pytest.mark.parametrize(
    "options, said", [({"crf": True}, "a CRF"), ({"alignment": "mean"}, "a word's tokens are averaged")]
)
def test_a_loss_whose_shape_is_in_the_data_says_why_it_is_not_captured(options, said):
    assert said in step_loss(Tagging(("A",), tags="iob2", **options))
