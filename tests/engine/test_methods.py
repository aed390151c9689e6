"""Each method on each packed architecture: what trains is what should, and saved, reloaded, merged and plain peft's
logits are the trained model's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from test_models import PACKED, PADDED, some_batch
from transformers import AutoModelForSequenceClassification

from regraft.engine.bundle import BundleInfo
from regraft.engine.config import parse_config
from regraft.engine.errors import ConfigError, ModelError
from regraft.engine.graph_inputs import graph_inputs
from regraft.engine.graphs import PackedGraph
from regraft.engine.methods.adapt import Adaptation, adapt, trained_weights
from regraft.engine.methods.folder import load_adapter, put_adapter
from regraft.engine.methods.quantise import is_quantised, whole_weight
from regraft.engine.methods.speed import use_method_kernels
from regraft.engine.methods.virtual import Prompt
from regraft.engine.methods.walk import backbone_linears, head_modules
from regraft.engine.models import RunningModel
from regraft.engine.pretrained import load_classifier
from regraft.engine.tasks import task_from_spec

TASK = {"type": "classification", "labels": ["a", "b", "c"]}
METHODS = ("lora", "qlora", "int8", "ia3", "adapter", "prompt", "prefix")
TAKES_NO_PREFIX = ("DistilBert", "Albert", "NomicBert", "ModernBert", "ModernBert/mean")


_BACKBONES: dict[str, Path] = {}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a random backbone, without a head, for each architecture; made once for all files that ask."""
    folders = _BACKBONES
    if folders:
        return folders
    for name, settings in {**PACKED, "DebertaV2": PADDED["DebertaV2"]}.items():
        config = getattr(transformers, f"{name.split('/')[0]}Config")(**settings)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.15)
        folder = tmp_path_factory.mktemp("backbones") / name.replace("/", "-")
        model.base_model.save_pretrained(folder)
        folders[name] = folder
    return folders


def config_for(folder: Path, method: str, **sections: object):
    if method in ("prompt", "prefix"):
        sections = {"prompt": {"tokens": 5}} | sections  # the tiny models have few positions
    values = {"method": method, "model": {"name": str(folder)}, "data": {"train": "none.csv"}, **sections}
    return parse_config(values)


def adapted(folder: Path, method: str, **sections: object) -> tuple[Adaptation, RunningModel]:
    config = config_for(folder, method, **sections)
    torch.manual_seed(1)
    model = load_classifier(config.model, task_from_spec(TASK))
    adaptation = adapt(model, config)
    for weight in trained_weights(adaptation.model).values():
        weight.data.add_(torch.randn_like(weight) * 0.05)
    return adaptation, running(adaptation.model)


def running(model: torch.nn.Module) -> RunningModel:
    return RunningModel(model, pad_token_id=model.config.pad_token_id or 0).eval()


def facts_of(folder: Path, adaptation: Adaptation) -> dict:
    return {
        "method": adaptation.method,
        "model": {"name": str(folder)},
        "base_model": str(folder),
        "task": TASK,
        "backbone": adaptation.fingerprint,
        "quantise": {},
    }


@torch.no_grad()
def logits(model: RunningModel, batch) -> torch.Tensor:
    return model(batch)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, atol=3e-5, rtol=3e-4)


def graph_logits(model: RunningModel, batch) -> torch.Tensor:
    """Logits of what would be exported, from the arrays that a server makes."""
    layout = {"layout": "packed", "precision": "fp32", "task": TASK, "max_length": 50, "pad_token_id": 0}
    prompt = [model.virtual.first, model.virtual.count] if isinstance(model.virtual, Prompt) else []
    info = BundleInfo(
        **layout, position_offset=model.position_offset, token_types=model.uses_token_types, prompt=prompt
    )
    ids = [part.numpy() for part in batch.input_ids.split(batch.lengths)]
    with torch.no_grad():
        return PackedGraph(model)(**{k: torch.from_numpy(v) for k, v in graph_inputs(info, ids).items()})


CASES = [(name, method) for name in PACKED for method in METHODS if method != "prefix" or name not in TAKES_NO_PREFIX]


@pytest.mark.parametrize(("name", "method"), CASES)
def test_saved_reloaded_merged_unmerged_packed_and_exported_answer_as_trained(name, method, backbones, tmp_path):
    folder = backbones[name]
    adaptation, plain = adapted(folder, method)
    batch = some_batch(4)
    expected = logits(plain, batch)
    plain.run_packed()
    assert plain.packed, plain.reason
    plain.use_kernels()
    use_method_kernels(plain, config_for(folder, method), "fp32")
    assert close(logits(plain, batch), expected)
    assert close(graph_logits(plain, batch), expected)

    adaptation.save(tmp_path)
    again = load_adapter(tmp_path, facts_of(folder, adaptation))
    reloaded = running(again.model)
    assert close(logits(reloaded, batch), expected)
    if method in ("lora", "ia3"):  # nothing is rounded on the way there and back
        again.peft.merge_adapter()
        assert close(logits(reloaded, batch), expected)
        again.peft.unmerge_adapter()
        assert close(logits(reloaded, batch), expected)
    if again.mergeable:
        merged = running(again.merge())
        assert close(logits(merged, batch), expected)
        merged.run_packed()
        merged.use_kernels()
        assert close(logits(merged, batch), expected)
        assert close(graph_logits(merged, batch), expected)


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("name", PACKED)
def test_an_adapter_folder_loads_in_plain_peft(name, method, backbones, tmp_path):
    from peft import PeftModel

    folder = backbones[name]
    adaptation, ours = adapted(folder, method)
    batch = some_batch(4)
    expected = logits(ours, batch)
    adaptation.save(tmp_path)
    torch.manual_seed(99)  # a head drawn otherwise must be replaced by the saved one
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype="float32")
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert close(logits(running(loaded.base_model.model), batch), expected)


@pytest.mark.parametrize("name", PACKED)
def test_lora_takes_every_linear_layer_of_the_backbone_and_never_the_head(name, backbones):
    config = config_for(backbones[name], "lora")
    model = load_classifier(config.model, task_from_spec(TASK))
    linears, head = list(backbone_linears(model)), head_modules(model)
    adapt(model, config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for layer in linears:
        assert {f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"} <= trained
        trained -= {f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"}
    assert trained
    assert all(any(n.startswith(f"{h}.modules_to_save.") for h in head) for n in trained)


def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_saved(backbones, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(backbones["Bert"] / "model.safetensors")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text((backbones["Bert"] / "config.json").read_text())
    kept = {k: v for k, v in weights.items() if "pooler" not in k}
    save_file(kept, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    adaptation, model = adapted(tmp_path / "base", "lora")
    adaptation.save(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.bert.pooler.dense.weight" in saved
    batch = some_batch(4)
    expected = logits(model, batch)
    torch.manual_seed(123)
    again = load_adapter(tmp_path / "adapter", facts_of(tmp_path / "base", adaptation))
    assert close(logits(running(again.model), batch), expected)


@pytest.mark.parametrize("name", ["Bert", "Albert", "DistilBert", "ModernBert", "NomicBert"])
@pytest.mark.parametrize(
    "lora", [{}, {"rslora": True}, {"rank_pattern": {"0.*": 3}}], ids=["plain", "rslora", "pattern"]
)
def test_gradients_of_lora_as_one_product_are_those_of_peft(name, lora, backbones):
    if name == "Albert" and "rank_pattern" in lora:
        lora = {"rank_pattern": {".*query": 3}}
    found = []
    batch = some_batch(3)
    for fast in (False, True):
        _, model = adapted(backbones[name], "lora", lora=lora)
        model.run_packed()
        if fast:
            model.use_kernels()
            assert use_method_kernels(model, config_for(backbones[name], "lora", lora=lora), "fp32")
        model.double().eval()
        model(batch).square().sum().backward()
        found.append({n: p.grad for n, p in model.model.named_parameters() if p.grad is not None})
        assert found[-1].keys() == {n for n, p in model.model.named_parameters() if p.requires_grad}
    # transformers turns ModernBERT's queries and keys in fp32, whatever the rest is calculated in
    exact = 1e-5 if name == "ModernBert" else 1e-8
    for key, expected in found[0].items():
        atol = exact * max(1.0, float(expected.abs().max()))
        assert torch.allclose(found[1][key], expected, atol=atol, rtol=1e-6), key


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ModernBert"])
@pytest.mark.parametrize("method", ["qlora", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_over_quantised_weights_is_as_near_as_over_whole_ones_and_keeps_none(name, method, precision, backbones):
    batch, found, biggest = some_batch(6), [], []
    for kind, fast in (("fp32", False), (precision, False), (precision, True)):
        half = kind == "bf16"
        sections = {"quantise": {"compute": kind}} if method == "qlora" else {}
        _, model = adapted(backbones[name], method, **sections)
        model.run_packed()
        assert model.packed  # rounding by the layers themselves is no mixing of sequences
        if not fast:
            for layer in [m for m in model.modules() if hasattr(m, "base_layer") and is_quantised(m.base_layer)]:
                whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.base_layer.bias is not None)
                whole.weight.data, whole.bias = whole_weight(layer.base_layer), layer.base_layer.bias
                layer.base_layer = whole.requires_grad_(False)
        else:
            model.use_kernels()
            assert use_method_kernels(model, config_for(backbones[name], method, **sections), precision)
        kept: list[int] = []
        held = lambda t, kept=kept: kept.append(t.numel() if t.dtype.is_floating_point else 0) or t  # noqa: E731
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = model(batch).float()
            with torch.autograd.graph.saved_tensors_hooks(held, lambda t: t):
                model(batch).float().square().sum().backward()
        biggest.append(max(kept))
        found.append({"logits": out} | {n: p.grad for n, p in model.model.named_parameters() if p.grad is not None})
    exact, pefts, ours = found
    assert exact.keys() == ours.keys() and biggest[2] <= biggest[1]
    # of one gradient chance decides which of two roundings is nearer; the mean would show one that is wrong
    error, allowed = (
        sum(float((some[key] - wanted).norm() / wanted.norm()) for key, wanted in exact.items()) / len(exact)
        for some in (ours, pefts)
    )
    assert error <= 1.5 * allowed + 1e-5, (error, allowed)


@pytest.mark.parametrize("lora", [{"dora": True}, {"dropout": 0.2}, {"alpha_pattern": {".*query": 3.0}}])
def test_options_of_lora_survive_saving_and_merging(lora, backbones, tmp_path):
    adaptation, model = adapted(backbones["Roberta"], "lora", lora=lora)
    batch = some_batch(4)
    expected = logits(model, batch)
    adaptation.save(tmp_path)
    again = load_adapter(tmp_path, facts_of(backbones["Roberta"], adaptation))
    assert close(logits(running(again.model), batch), expected)
    assert close(logits(running(again.merge()), batch), expected)


def test_an_adapter_for_another_backbone_is_refused(backbones, tmp_path):
    from safetensors.torch import load_file, save_file

    adaptation, _ = adapted(backbones["Bert"], "lora")
    adaptation.save(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(backbones["Bert"], other)
    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    facts = facts_of(other, adaptation)
    with pytest.raises(ModelError, match=r"made for another backbone.*other"):
        load_adapter(tmp_path, facts)


def test_an_adapter_of_another_rank_is_refused(backbones, tmp_path):
    adaptation, _ = adapted(backbones["Bert"], "lora")
    adaptation.save(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 8', '"r": 4'))
    other = Adaptation("lora", load_classifier(config_for(backbones["Bert"], "lora").model, task_from_spec(TASK)))
    with pytest.raises(ModelError, match="does not fit"):
        put_adapter(other, tmp_path)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"targets": ["qery"]}, ["lora.targets", "'qery'", "query"]),
        ({"rank_pattern": {"nothing_here": 4}}, ["lora.rank_pattern", "matches none"]),
        ({"rank_pattern": {"(": 4}}, ["lora.rank_pattern", "regular expression"]),
    ],
)
def test_targets_that_match_nothing_are_refused_before_training(lora, words, backbones):
    with pytest.raises(ModelError) as error:
        adapted(backbones["Bert"], "lora", lora=lora)
    assert all(w in str(error.value) for w in words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method": "full", "lora": {"rank": 4}}, ["lora", "method: full does not use it"]),
        ({"method": "qlora", "lora": {"dora": True}}, ["lora.dora"]),
        ({"method": "adapter", "adapter": {"size": 8, "reduction": 2}}, ["adapter.reduction"]),
        ({"method": "lroa"}, ["method"]),
    ],
)
def test_sections_that_do_not_fit_the_method_are_refused(values, words):
    with pytest.raises(ConfigError) as error:
        parse_config({"model": {"name": "x"}, "data": {"train": "t.csv"}, **values})
    assert all(w in str(error.value) for w in words)


def test_bitfit_trains_biases_and_the_head_alone(backbones):
    adaptation, _ = adapted(backbones["Bert"], "bitfit")
    trained = {n for n, p in adaptation.model.named_parameters() if p.requires_grad}
    assert all(n.endswith("bias") or n.startswith(("classifier", "bert.pooler")) for n in trained)
    assert "bert.encoder.layer.0.attention.self.query.bias" in trained
    with pytest.raises(ModelError, match="no biases"):
        adapted(backbones["ModernBert"], "bitfit")


def test_the_last_layers_alone_train(backbones):
    adaptation, _ = adapted(backbones["Bert"], "full", unfreeze={"last_layers": 1})
    trained = {n for n, p in adaptation.model.named_parameters() if p.requires_grad}
    assert {n.split(".")[3] for n in trained if ".layer." in n} == {"2"}
    assert not any("embeddings" in n for n in trained)
    with pytest.raises(ConfigError, match="the model has 3"):
        adapted(backbones["Bert"], "full", unfreeze={"last_layers": 9})
    with pytest.raises(ConfigError, match="share their weights"):
        adapted(backbones["Albert"], "full", unfreeze={"last_layers": 1})


def test_quantised_weights_take_little_and_the_head_stays(backbones):
    adaptation, _ = adapted(backbones["Bert"], "qlora")
    model = adaptation.model
    assert model.bert.encoder.layer[0].output.dense.base_layer.weight.dtype == torch.uint8
    assert model.classifier.modules_to_save["default"].weight.dtype == torch.float32
    assert not any(p.requires_grad for n, p in model.named_parameters() if "base_layer" in n)
