"""A tagging run whose CRF is the task's own module: it learns under every method, and travels with the adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_method_runs import run
from test_tagging import conll, tagging_config  # noqa: F401  (fixtures)

from regraft.engine.bundle import BundleInfo
from regraft.engine.errors import ModelError
from regraft.engine.evaluation import run_all
from regraft.engine.graph_inputs import graph_inputs, graph_outputs
from regraft.engine.graphs import PackedGraph
from regraft.engine.heldout import encoded, heldout_rows
from regraft.engine.methods.merge import merge
from regraft.engine.tasks.crf import NEVER
from regraft.engine.trained import Trained, load_trained

SHORT = ["training.max_steps=8", "training.learning_rate=2e-2"]


def emissions(trained: Trained) -> np.ndarray:
    made = encoded(trained, heldout_rows(trained, None, split="dev"))
    return np.concatenate(run_all(trained.running, made))


@pytest.mark.parametrize("method", ["lora", "adapter", "prompt", "prefix"])
def test_a_crf_learns_is_saved_and_reloaded_with_its_adapter(method, tagging_config, tmp_path):  # noqa: F811
    folder = tmp_path / "r"
    sections = ["prompt.tokens=4"] if method in ("prompt", "prefix") else []
    result = run(tagging_config(crf=True), folder, f"method={method}", *sections, *SHORT)
    kept = load_trained(folder, merge=False)
    assert kept.task.crf is not None
    scores = np.concatenate([values[values > NEVER / 2] for values in kept.task.crf.values()])
    assert np.abs(scores).max() > 1e-3  # they start at zero
    weights = {n: p for n, p in kept.running.model.named_parameters() if "crf" in n and "original" not in n}
    trained = next(p for n, p in weights.items() if n.endswith("transitions"))
    allowed = ~kept.task.crf.never[0]
    assert np.allclose(trained.detach().numpy()[allowed], kept.task.crf.values()[0][allowed])

    expected = emissions(kept)
    assert np.allclose(emissions(load_trained(folder)), expected, atol=1e-4)
    if method == "lora":
        merge(folder, tmp_path / "merged")
        merged = load_trained(tmp_path / "merged")
        assert np.allclose(emissions(merged), expected, atol=1e-4)
        assert all(np.array_equal(a, b) for a, b in zip(merged.task.crf.values(), kept.task.crf.values(), strict=True))
    else:
        with pytest.raises(ModelError, match="cannot be merged"):
            merge(folder, tmp_path / "merged")
    assert result.metrics["dev"]["f1"] >= 0


def test_what_is_exported_of_an_adapter_with_a_crf_gives_the_same_emissions(tagging_config, tmp_path):  # noqa: F811
    run(tagging_config(crf=True), tmp_path / "r", "method=lora", *SHORT)
    trained = load_trained(tmp_path / "r")
    made = encoded(trained, heldout_rows(trained, None, split="dev"))
    store, running = made.store, trained.running
    ids = [store.ids[a:b] for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    spec, limit, pad = trained.task.spec(), trained.max_length, trained.tokenizer.pad_token_id
    info = BundleInfo("packed", "fp32", spec, limit, pad, running.position_offset, running.uses_token_types, "tokens")
    arrays = {name: torch.from_numpy(values) for name, values in graph_inputs(info, ids).items()}
    with torch.no_grad():
        found = PackedGraph(running)(**arrays).numpy()
    assert np.allclose(found, emissions(trained), atol=1e-4)
    again = type(trained.task).from_spec(spec)  # what a server reads
    assert all(np.array_equal(a, b) for a, b in zip(again.crf.values(), trained.task.crf.values(), strict=True))
    assert [len(rows) for rows in graph_outputs(info, found, ids)] == list(store.lengths)


def test_the_gradient_of_a_crf_reaches_the_copy_that_is_trained(tiny_model):
    from regraft.engine.config import parse_config
    from regraft.engine.methods.adapt import adapt
    from regraft.engine.pretrained import load_classifier
    from regraft.engine.tasks import task_from_spec

    spec = {"type": "tagging", "kinds": ["A"], "tags": "iob2", "crf": True, "scores": None}
    task = task_from_spec({"alignment": "first", "stride": None, "metric": "f1", **spec})
    values = {"method": "lora", "model": {"name": str(tiny_model)}, "data": {"train": "x"}, "task": {"type": "tagging"}}
    config = parse_config(values)
    model = load_classifier(config.model, task)
    task.attach(model)
    adapt(model, config)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    task.crf.log_likelihood(torch.randn(3, 3), torch.tensor([1, 2, 0]), bounds).sum().backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and "crf" in n}
    assert found == {f"crf.modules_to_save.default.{part}" for part in ("transitions", "starts", "ends")}
