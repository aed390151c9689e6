"""The layer over the vocabulary held back in training: the same loss and gradients, without the logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from regraft.engine.batches import collate_examples
from regraft.engine.config import load_config
from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.models import RunningModel
from regraft.engine.tasks.mlm import MaskedLanguage
from regraft.engine.training.run import train
from regraft.engine.vocabulary_head import HeldBack, bind_vocabulary_head
from regraft.kernels import cross_entropy

TEXTS = ["good film. bad plot.", "the music was slow. an actor sang. not so good", "warm and cold. very long joke."]
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def model_of(tiny_model, task: MaskedLanguage, *, packed: bool, kernels: bool) -> RunningModel:
    torch.manual_seed(0)
    model = getattr(transformers, task.auto_model).from_pretrained(tiny_model, **WITHOUT_DROPOUT)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    running = RunningModel(model, pad_token_id=0, reads="marked")
    if packed:
        running.run_packed()
        assert running.packed, running.reason
    if kernels:
        running.use_kernels()
        assert running.vocabulary_head is not None
    return running.train()


def drawn_of(tiny_model, task: MaskedLanguage):
    rows = Rows("train", "t", TEXTS * 4, None, np.arange(12))
    made = task.examples(rows, load_fast_tokenizer(tiny_model), 24)
    drawn, units = task.draw(made, np.arange(len(made)), (0,))
    return drawn, drawn.sequences(units)


@pytest.mark.parametrize("values", [16 * 80, 1 << 23], ids=["in chunks", "in one chunk"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("sentences", ["none", "nsp"])
def test_loss_and_gradients_are_those_of_all_logits(tiny_model, monkeypatch, sentences, packed, values):
    monkeypatch.setitem(cross_entropy.CHUNK_VALUES, "cpu", values)
    task = MaskedLanguage(sentences=sentences)
    drawn, sequences = drawn_of(tiny_model, task)
    batch = collate_examples(drawn, sequences)
    targets, weights = torch.from_numpy(task.targets_of(drawn, sequences)), torch.from_numpy(drawn.weights)
    found = []
    for kernels in (False, True):
        running = model_of(tiny_model, task, packed=packed, kernels=kernels)
        output = running(batch)
        tokens = output[0] if isinstance(output, tuple) else output
        assert isinstance(tokens, HeldBack) == kernels
        assert len(tokens) == len(batch.marks) > 20
        loss = task.batch_loss(output, targets, weights, batch.lengths)
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in running.model.named_parameters()}))
    (loss, gradients), (ours, our_gradients) = found
    assert torch.allclose(ours, loss, rtol=1e-5)
    assert gradients.keys() == our_gradients.keys()
    for name, gradient in gradients.items():
        mine = our_gradients[name]
        assert (mine is None) == (gradient is None), name
        if gradient is not None:
            assert torch.allclose(mine, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max() + 1)), name


def test_evaluation_and_what_is_saved_never_notice(tiny_model, tmp_path):
    task = MaskedLanguage()
    drawn, sequences = drawn_of(tiny_model, task)
    batch = collate_examples(drawn, sequences)
    plain, held = (model_of(tiny_model, task, packed=True, kernels=kernels) for kernels in (False, True))
    with torch.no_grad():
        in_training_mode = held(batch)
        assert torch.allclose(in_training_mode, plain(batch), atol=1e-5)
        assert torch.allclose(held.eval()(batch), plain.eval()(batch), atol=1e-5)
    held.model.save_pretrained(tmp_path)
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), held.model.parameters(), strict=True))


def test_products_are_made_in_the_precision_of_autocast(tiny_model):
    task = MaskedLanguage()
    drawn, sequences = drawn_of(tiny_model, task)
    running = model_of(tiny_model, task, packed=True, kernels=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = running(collate_examples(drawn, sequences))
    assert found.hidden.dtype == torch.bfloat16 and found.weight.dtype == torch.float32


def test_a_model_that_does_more_with_its_logits_keeps_its_layer(tiny_model):
    class Scaled(transformers.BertForMaskedLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 2 * output.logits
            return output

    class Shifted(transformers.BertForMaskedLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + self.cls.predictions.bias
            return output

    for kind in (Scaled, Shifted):
        model = kind.from_pretrained(tiny_model)
        torch.nn.init.normal_(model.cls.predictions.bias)
        running = RunningModel(model, pad_token_id=0, reads="marked")
        running.run_packed()
        assert bind_vocabulary_head(running) is None
        assert "forward" not in vars(model.get_output_embeddings())


def test_a_run_with_and_without_kernels_takes_the_same_steps(make_config, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 8))
    data = {"train": str(tmp_path / "texts.txt"), "dev": str(tmp_path / "texts.txt"), "format": "text"}
    # With its usual epsilon AdamW makes whole steps of gradients that are rounding alone, such as those of key biases.
    steps = {"max_steps": 5, "batch_size": 4, "epsilon": 1e-3}
    path = make_config(data=data, task={"type": "mlm"}, model={"dropout": 0.0}, training=steps)
    weights = []
    for kernels in ("auto", "off"):
        result = train(load_config(path, [f"run={tmp_path / kernels}", f"model.kernels={kernels}"]), quiet=True)
        weights.append(load_file(result.folder / "best" / "model.safetensors"))
    assert max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]) < 1e-5
