"""Training with the rows in use changes no result and saves the whole table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from regraft.engine.config import load_config
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.recipes import recipe_of
from regraft.engine.training.run import train
from regraft.engine.vocabulary import UsedRows, rows_in_use


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 3, padding_idx=0)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table


def test_rows_left_out_decay_as_adamw_would_have_decayed_them():
    torch.manual_seed(0)
    small, full = Holder(), Holder()
    full.load_state_dict(small.state_dict())
    ids = np.array([3, 7, 7, 21])
    rows = rows_in_use([ids], [0], 40)
    assert rows.tolist() == [0, 3, 7, 21]
    used = UsedRows(small, rows, ema=None)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.3) for m in (small, full)]
    used.decay_with(optimizers[0])
    for _ in range(5):
        for module, optimizer, batch in zip((small, full), optimizers, (used.renumber(ids), ids), strict=True):
            optimizer.zero_grad()
            module.table(torch.from_numpy(batch).long()).square().sum().backward()
            optimizer.step()
        used.stepped(optimizers[0])
    with used.whole():
        assert torch.allclose(small.table.weight, full.table.weight, atol=1e-6)
    assert small.table.weight.shape == (4, 3)


def test_a_run_saves_the_table_that_training_all_of_it_gives(make_config, tmp_path):
    training = {"ema": 0.8, "weight_decay": 0.5, "learning_rate": 1e-2, "precision": "fp32"}
    path = make_config(model={"dropout": 0.0}, training=training)
    tables = []
    for name in ("auto", "off"):
        train(load_config(path, [f"run={tmp_path / name}", f"model.kernels={name}"]), quiet=True)
        tables.append(load_file(tmp_path / name / "best" / "model.safetensors"))
    key = "bert.embeddings.word_embeddings.weight"
    assert tables[0][key].shape == tables[1][key].shape
    for name, value in tables[0].items():
        # a softmax does not see what is added to all its scores: the gradient of the keys' bias is rounding and nothing else
        assert name.endswith("key.bias") or torch.allclose(value, tables[1][name], atol=2e-5), name


def test_under_an_adapter_rows_that_no_text_names_are_not_held_and_nothing_else_changes(make_config, tmp_path):
    path = make_config(method="lora", model={"dropout": 0.0}, training={"learning_rate": 1e-2})
    saved, held = [], []
    for name in ("auto", "off"):
        config = load_config(path, [f"run={tmp_path / name}", f"model.kernels={name}"])
        recipe = recipe_of(config)(config, tmp_path / name, None, True)
        recipe.prepare()
        recipe.build()
        held.append(recipe.running.model.get_input_embeddings().weight)
        train(config, quiet=True)
        saved.append(load_file(tmp_path / name / "best" / "adapter_model.safetensors"))
    vocabulary = AutoConfig.from_pretrained(load_config(path).model.name).vocab_size
    assert held[0].shape[0] < held[1].shape[0] == vocabulary
    assert not held[0].requires_grad
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        assert "embed" not in name
        assert torch.allclose(value, saved[1][name], atol=2e-5), name
    words = ["a word that training never saw: zebra"]
    (ours,), (plain,) = (list(predict(load_trained(tmp_path / name), words)) for name in ("auto", "off"))
    assert ours.prediction.scores == pytest.approx(plain.prediction.scores, abs=1e-4)
