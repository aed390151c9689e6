"""Packed running: proven for what transformers' attention interface reaches, refused aloud for the rest."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from regraft.engine.models import RunningModel
from regraft.engine.packing import PackedBatch, pack

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
DISTIL = {
    "dim": 32,
    "n_layers": 3,
    "n_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "num_labels": 3,
}
WINDOWED = SIZES | {
    "max_position_embeddings": 300,
    "local_attention": 16,
    "global_attn_every_n_layers": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
PACKED = {
    "Bert": SIZES,
    "Roberta": SIZES | {"pad_token_id": 1},
    "XLMRoberta": SIZES | {"pad_token_id": 1},
    "Camembert": SIZES | {"pad_token_id": 1},
    "Data2VecText": SIZES | {"pad_token_id": 1},
    "DistilBert": DISTIL,
    "Electra": SIZES | {"embedding_size": 16},
    "Albert": SIZES | {"embedding_size": 16},
    "Ernie": SIZES,
    "NomicBert": SIZES,
    "ModernBert": WINDOWED,
    "ModernBert/mean": WINDOWED | {"classifier_pooling": "mean"},
}
PADDED = {
    "DebertaV2": SIZES,
    "MPNet": SIZES,
    "MobileBert": SIZES | {"embedding_size": 16, "intra_bottleneck_size": 16},
}


def build(name: str, settings: dict, seed: int = 0) -> RunningModel:
    config = getattr(transformers, f"{name.split('/')[0]}Config")(**settings)
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:  # larger than the usual start, so that mistakes show
            torch.nn.init.normal_(weight, std=0.3)
    running = RunningModel(model, pad_token_id=config.pad_token_id or 0)
    return running.eval()


def some_batch(seed: int | None = None) -> PackedBatch:
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    ids = [torch.randint(10, 200, (n,), generator=generator).numpy() for n in (3, 31, 1, 12, 12, 47)]
    return pack(ids)


@pytest.mark.parametrize("name", PACKED)
def test_packed_logits_are_the_padded_logits(name):
    running = build(name, PACKED[name])
    batch = some_batch()
    with torch.no_grad():
        padded = running(batch)
        running.run_packed()
        assert running.packed, running.reason
        packed = running(batch)
        running.use_kernels()
        fast = running(batch)
    assert torch.allclose(packed, padded, atol=2e-5, rtol=1e-4)
    assert torch.allclose(fast, padded, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert", "ModernBert", "Albert"])
def test_packed_gradients_are_the_padded_gradients(name):
    gradients = []
    batch = some_batch(3)
    for packed in (False, True):
        running = build(name, PACKED[name]).double()
        if packed:
            running.run_packed()
            running.use_kernels()
        running.eval()  # dropout off
        running(batch).square().sum().backward()
        gradients.append({n: p.grad for n, p in running.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    # transformers turns ModernBERT's queries and keys in fp32, whatever the rest is calculated in
    exact = 1e-5 if name == "ModernBert" else 1e-8
    for key, expected in gradients[0].items():
        atol = exact * max(1.0, float(expected.abs().max()))
        assert torch.allclose(gradients[1][key], expected, atol=atol, rtol=1e-6), key


@pytest.mark.parametrize("name", PADDED)
def test_what_cannot_run_packed_runs_padded_and_says_why(name):
    running = build(name, PADDED[name])
    batch = some_batch(5)
    with torch.no_grad():
        before = running(batch)
        running.run_packed()
        assert not running.packed
        assert name in running.reason
        assert torch.allclose(running(batch), before, atol=1e-6)


def test_a_model_that_mixes_neighbours_is_caught_by_the_proof():
    running = build("Bert", PACKED["Bert"])
    embeddings = running.model.bert.embeddings
    plain = embeddings.forward
    embeddings.forward = lambda *a, **k: plain(*a, **k) + 0.1 * plain(*a, **k).roll(1, dims=1)
    running.run_packed()
    assert not running.packed
    assert "mixes sequences" in running.reason


def test_a_model_whose_last_layer_is_not_found_runs_padded():
    running = build("DistilBert", PACKED["DistilBert"])
    batch = some_batch(5)
    with torch.no_grad():
        before = running(batch)
        running.model.config.n_layers = 7  # no list of seven layers is there
        running.run_packed()
        assert not running.packed
        assert "last layer was not found" in running.reason
        assert torch.allclose(running(batch), before, atol=1e-6)


def test_kernels_leave_the_state_dict_untouched():
    running = build("Bert", PACKED["Bert"])
    before = {k: v.clone() for k, v in running.model.state_dict().items()}
    running.run_packed()
    running.use_kernels()
    after = running.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "ModernBert"])
def test_a_sequence_answers_the_same_alone_and_in_company(name):
    running = build(name, PACKED[name])
    running.run_packed()
    running.use_kernels()
    batch = some_batch(9)
    starts = batch.cu_seqlens.tolist()
    with torch.no_grad():
        together = running(batch)
        for i, (a, b) in enumerate(zip(starts, starts[1:], strict=False)):
            alone = running(pack([batch.input_ids[a:b].numpy()]))
            assert torch.allclose(alone[0], together[i], atol=2e-5, rtol=1e-4)


def test_a_packed_batch_refuses_what_does_not_fit():
    good = some_batch(1)
    with pytest.raises(ValueError, match="lengths sum to"):
        PackedBatch(good.input_ids, good.position_ids, good.cu_seqlens, good.lengths[:-1])
    with pytest.raises(ValueError, match="at least one token"):
        PackedBatch(good.input_ids[:0], good.position_ids[:0], torch.zeros(1, dtype=torch.int32), ())
