"""Several tasks on one encoder: taking turns, learned together, judged each by itself, one bundle with all heads."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import FORKS, ROOT
from regraft.engine.config import load_config
from regraft.engine.errors import ConfigError, DataError
from regraft.engine.evaluation import evaluate
from regraft.engine.export import export_bundle
from regraft.engine.heldout import heldout_examples
from regraft.engine.predict import load_task, predict
from regraft.engine.several.plan import MixedPlan
from regraft.engine.several.step import Turn
from regraft.engine.tasks.regression import Regression
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from running import running_server

PLACES = ("film", "plot", "music")


def write_rows(folder: Path) -> dict[str, dict]:
    """Mood of a text, names in it, and how much two texts are alike: a class, tags, a number for a pair."""
    for split, count in (("train", 120), ("dev", 40)):
        draw = np.random.default_rng(count)
        mood = []
        for _ in range(count):
            words = [str(w) for w in draw.choice(["film", "plot", "very", "story"], draw.integers(1, 6))]
            label = str(draw.choice(["good", "bad"]))
            mood.append(f"{' '.join([*words, label, 'scene'])},{label}")
        (folder / f"mood-{split}.csv").write_text("\n".join(["text,label", *mood]) + "\n")
        blocks = []
        for _ in range(count):
            words = [str(w) for w in draw.choice([*PLACES, "very", "slow", "good"], draw.integers(2, 9))]
            blocks.append("\n".join(f"{w}\t{'B-THING' if w in PLACES else 'O'}" for w in words))
        (folder / f"things-{split}.conll").write_text("\n\n".join(blocks) + "\n")
        lines = ["one\tother\thow"]
        for _ in range(count):
            goods = int(draw.integers(0, 6))
            lines.append(f"{'good ' * goods}film\t{'bad ' * (5 - goods)}plot\t{100 + 10 * goods}")
        (folder / f"alike-{split}.tsv").write_text("\n".join(lines) + "\n")
    files = {n: {s: str(folder / f"{n}-{s}.{e}") for s in ("train", "dev")} for n, e in (("mood", "csv"), ("things", "conll"), ("alike", "tsv"))}  # fmt: skip
    return {
        "mood": {"type": "classification", "data": files["mood"]},
        "things": {"type": "tagging", "crf": True, "data": files["things"]},
        "alike": {
            "type": "regression",
            "data": {**files["alike"], "columns": {"text": "one", "text_pair": "other", "label": "how"}},
        },
    }


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_model):
    """Writes the configuration of a run of the three tasks; sections replace or extend its own."""
    folder = tmp_path_factory.mktemp("several")
    tasks = write_rows(folder)

    def make(name: str, **sections) -> Path:
        values = {
            "run": str(folder / name),
            "model": {"name": str(tiny_model)},
            "tasks": tasks,
            "training": {
                "learning_rate": 3e-3,
                "head_learning_rate": 1e-2,
                "batch_size": 16,
                "epochs": 6,
                "precision": "fp32",
                "threads": 1,
            },
        }
        for key, value in sections.items():
            both = isinstance(value, dict) and isinstance(values.get(key), dict) and key != "tasks"
            values[key] = {**values[key], **value} if both else value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return SimpleNamespace(make=make, tasks=tasks, folder=folder)


@pytest.fixture(scope="module")
def learned(mixed):
    """The three tasks, learned to the end."""
    return train(load_config(mixed.make("learned")), quiet=True)


@pytest.fixture(scope="module")
def bundle(learned, mixed):
    export_bundle(learned.folder, mixed.folder / "bundle")
    return mixed.folder / "bundle"


# -- whose turn it is --------------------------------------------------------------------------------------------------


def plan_of(sampling: float = 1.0, **options) -> MixedPlan:
    sizes = (100, 37, 9)
    return MixedPlan(sum(sizes), 10, 3, options.pop("epochs", 4), sizes=sizes, exponent=sampling, **options)


def test_an_epoch_in_proportion_has_every_row_of_every_task_once():
    plan = plan_of()
    assert plan.steps_per_epoch == 10 + 4 + 1
    for epoch in range(3):
        order = plan.order(epoch)
        assert sorted(np.concatenate(list(order))) == list(range(146))
        assert all(len({*np.searchsorted([100, 137], rows, side="right")}) == 1 for rows in order)
    assert [list(a) for a in plan.order(1)] == [list(a) for a in plan_of().order(1)]
    assert [list(a) for a in plan.order(1)] != [list(a) for a in plan.order(0)]


def test_rows_are_used_up_before_any_comes_again_however_the_epochs_fall():
    plan = plan_of(0.5)
    seen = np.concatenate([rows for epoch in range(8) for rows in plan.order(epoch)])
    counts = np.bincount(seen, minlength=146)
    for start, end in ((0, 100), (100, 137), (137, 146)):
        assert np.ptp(counts[start:end]) <= 1
    assert plan.taken(8 * 15).tolist() == [sum(plan.turns(e)[t] for e in range(8)) for t in range(3)]
    assert plan.taken(20).sum() == 20


@pytest.mark.parametrize(
    ("exponent", "annealed", "epoch", "expected"),
    [
        (0.5, False, 0, 0.5),
        (1 / 5, False, 2, 0.2),
        (1.0, True, 0, 1.0),
        (1.0, True, 3, 0.2),
        (1.0, True, 1, 1 - 0.8 / 3),
    ],
)
def test_shares_follow_their_formula(exponent, annealed, epoch, expected):
    plan = MixedPlan(3000, 1, 0, 4, sizes=(2500, 400, 100), exponent=exponent, annealed=annealed)
    shares = np.array([2500, 400, 100]) ** expected
    turns = plan.turns(epoch)
    assert turns.sum() == plan.steps_per_epoch == 3000
    assert np.abs(turns - shares / shares.sum() * 3000).max() < 1


# -- learning ----------------------------------------------------------------------------------------------------------


def test_three_kinds_of_tasks_are_learned_together_and_judged_each_by_itself(learned):
    found = learned.metrics["dev"]
    assert found["mood/accuracy"] > 0.9
    assert found["things/f1"] > 0.9
    assert found["alike/pearson"] > 0.9
    assert found["mean"] == pytest.approx(np.mean([found["mood/accuracy"], found["things/f1"], found["alike/pearson"]]))
    history = [json.loads(line) for line in (learned.folder / "metrics.jsonl").read_text().splitlines()]
    means = {r["step"]: r["metrics"]["mean"] for r in history if r["kind"] == "eval"}
    assert learned.best_step == max(means, key=means.get)
    kept = json.loads((learned.folder / "evaluation.json").read_text())
    assert kept["details"]["dev"]["tasks"]["mood"]["details"]["per_class"]
    assert {name: task["steps"] for name, task in kept["mixing"].items()} == {"mood": 48, "things": 48, "alike": 48}


def test_the_report_shows_every_task(learned):
    page = (learned.folder / "report.html").read_text()
    for said in ("Task: mood", "Task: things", "Task: alike", "mean of the tasks", "True and predicted values"):
        assert said in page
    card = (learned.folder / "best" / "README.md").read_text()
    assert "for several tasks on 360 rows" in card


def test_the_encoder_is_a_plain_hugging_face_model(learned, tiny_model):
    from transformers import AutoModel

    found, report = AutoModel.from_pretrained(learned.folder / "best", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before = AutoModel.from_pretrained(tiny_model)
    assert any(not torch.equal(a, b) for a, b in zip(found.parameters(), before.parameters(), strict=True))


def test_a_step_leaves_the_heads_of_other_tasks_as_they_are(mixed):
    heads = []
    for name, rate in (("slow", 1e-3), ("fast", 1e-2)):
        path = mixed.make(name, training={"max_steps": 1, "head_learning_rate": rate, "weight_decay": 0.1})
        train(load_config(path), quiet=True)
        heads.append(load_file(mixed.folder / name / "best" / "heads.safetensors"))
    moved = {name.partition(".")[0] for name, value in heads[0].items() if not torch.equal(value, heads[1][name])}
    assert len(moved) == 1


@pytest.mark.parametrize("seed", range(8))
def test_the_largest_steps_of_each_task_are_among_those_it_takes(seed):
    rng = np.random.default_rng(seed)
    sizes = tuple(int(n) for n in rng.integers(1, 80, 3))
    steps = None if seed % 2 else int(rng.integers(1, 15))
    plan = MixedPlan(sum(sizes), 7, seed, 2.5, steps, sizes=sizes, exponent=0.5)
    lengths, owner = rng.integers(1, 100, plan.rows), np.repeat(np.arange(3), sizes)
    taken = [plan.batch(step, plan.order(plan.epoch_of(step))) for step in range(plan.total_steps)]
    found = plan.largest_steps(lengths)
    for size in (np.sum, np.max):
        for task in {int(owner[rows[0]]) for rows in taken}:
            of_task = [[size(lengths[r]) for r in some if owner[r[0]] == task] for some in (taken, found)]
            assert max(of_task[0]) == max(of_task[1])
    assert all(any(np.array_equal(rows, other) for other in taken) for rows in found)


def built(path: Path):
    """A run that stands before its first step."""
    from regraft.engine.several.run import SeveralRun

    run = SeveralRun(load_config(path), path.parent / "none", None, True)
    run.prepare()
    run.build()
    return run


def test_a_tasks_step_is_the_one_of_a_model_of_its_own(mixed):
    """Loss and gradients of a turn are those of transformers' own model on a padded batch; other heads get none."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    run = built(mixed.make("same", model={"dropout": 0.0, "kernels": "off"}))
    config = run.config
    ours, train_rows = run.running.model, run.data.splits["train"]
    units, names = np.arange(12), list(train_rows.parts)
    first = sum(len(train_rows.parts[name]) for name in names[: names.index("mood")])
    loss = run.stepper.gradients(0, units + first)
    plain = AutoModelForSequenceClassification.from_pretrained(config.model.name, num_labels=2).eval()
    encoder = {f"bert.{name}": value for name, value in ours.backbone.state_dict().items()}
    plain.load_state_dict(encoder | ours.heads[0].state_dict())
    part = train_rows.parts["mood"]
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    batch = tokenizer(part.rows.texts[:12], padding=True, return_tensors="pt")
    expected = torch.nn.functional.cross_entropy(plain(**batch).logits, torch.from_numpy(part.targets[:12]))
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    found = dict(ours.backbone.named_parameters(prefix="bert")) | dict(ours.heads[0].named_parameters())
    for name, weight in plain.named_parameters():
        assert torch.allclose(found[name].grad, weight.grad, atol=1e-6), name
    assert all(p.grad is None for head in ours.heads[1:] for p in head.parameters())


@pytest.mark.parametrize("most", [None, 1e-2])
def test_a_weight_counts_with_gradients_clipped_too(mixed, most):
    """What a step adds to the moments is the task's own clipped gradient times its weight."""
    first = []
    for weight in (1.0, 0.25):
        tasks = {name: {**task, "weight": weight} for name, task in mixed.tasks.items()}
        path = mixed.make("weighs", tasks=tasks, training={"max_grad_norm": most})
        run = built(path)
        run.stepper(0, np.arange(8))
        encoder = run.running.model.backbone.encoder.parameters()
        first.append(torch.cat([run.stepper.optimizer.state[p]["exp_avg"].flatten() for p in encoder]))
    assert torch.allclose(first[1], 0.25 * first[0], rtol=1e-3, atol=1e-9)
    assert first[1].abs().max() > 1e-6


def test_a_mixed_evaluation_is_that_of_each_task_alone(learned):
    whole = load_trained(learned.folder)
    together = evaluate(whole.running, heldout_examples(whole, None), whole.task, token_budget=300).metrics
    for name in whole.task.tasks:
        one = load_task(str(learned.folder), name)
        alone = evaluate(one.running, heldout_examples(one, None), one.task).metrics
        alone.pop("spearman", None)  # ranks of numbers that are equal but for rounding
        assert alone == pytest.approx({k: together[f"{name}/{k}"] for k in alone}, rel=1e-4)


@pytest.mark.parametrize(("share", "task"), [(1.0, SimpleNamespace(type="classification")), (0.5, Regression())])
def test_a_learned_weight_follows_kendall(share, task):
    task = SimpleNamespace(type=task.type, batch_loss=lambda logits, targets, weights, lengths: 3.0 * weights.sum())
    s = torch.tensor([0.7], requires_grad=True)
    weights = torch.tensor([1.0, 2.0])
    loss = Turn(task, lambda logits, lengths: logits, 1.0, s).batch_loss(None, None, weights, ())
    (slope,) = torch.autograd.grad(loss, s)
    assert float(loss.detach()) / 3 == pytest.approx(share * np.exp(-0.7) * 3.0 + 0.35, rel=1e-6)
    assert float(slope) / 3 == pytest.approx(0.5 - share * np.exp(-0.7) * 3.0, rel=1e-6)
    plain = Turn(task, lambda logits, lengths: logits, 2.0, None).batch_loss(None, None, weights, ())
    assert float(plain) == 18.0


KILLED = """
import os, signal, sys
from regraft.engine.config import load_config
from regraft.engine.training.run import train

def stop(info):
    if info.step == 22:
        os.kill(os.getpid(), signal.SIGKILL)

train(load_config(sys.argv[1]), quiet=True, on_step=stop)
"""


def test_killed_and_started_again_is_as_if_never_killed(mixed):
    """With a sampling that changes by epoch and weights that are learned."""
    options = {"mixing": {"sampling": "annealed", "weighting": "uncertainty"}}
    steps = {"epochs": 1.5, "checkpoint_every": 7, "evaluate_every": 9, "ema": 0.9}
    whole = train(load_config(mixed.make("whole", training=steps, **options)), quiet=True)
    path = mixed.make("killed", training=steps, **options)
    process = FORKS.start(["-c", KILLED, str(path)])
    assert process.wait(120) == -signal.SIGKILL, process.communicate()[1]
    seen: list[int] = []
    killed = train(load_config(path), quiet=True, on_step=lambda info: seen.append(info.step))
    assert seen[0] == 21 and killed.steps == whole.steps == 36
    for name in ("model.safetensors", "heads.safetensors"):
        one, two = (load_file(run.folder / "best" / name) for run in (whole, killed))
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert lines_that_matter(whole.folder) == lines_that_matter(killed.folder)
    told = json.loads((killed.folder / "evaluation.json").read_text())["mixing"]
    assert told == json.loads((whole.folder / "evaluation.json").read_text())["mixing"]
    assert all(task["log_variance"] != 0 for task in told.values())
    assert "Log-variance" in (killed.folder / "report.html").read_text()


def lines_that_matter(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = {"seconds", "tokens_per_second", "seconds_to_first_step"}
    return [{k: v for k, v in r.items() if k not in times} for r in records]


def test_heads_that_all_read_first_rows_run_as_fast_as_one(mixed, tmp_path):
    """Then the last layer is computed for those rows alone, as for a single task; and logits stand by sequence."""
    import onnx

    tasks = {name: mixed.tasks[name] for name in ("mood", "alike")}
    result = train(load_config(mixed.make("firsts", tasks=tasks, training={"max_steps": 8})), quiet=True)
    trained = load_trained(result.folder)
    assert trained.task.reads == "first" and trained.running.packed
    assert "forward" in vars(trained.running.model.backbone.encoder.layer[-1])
    report = export_bundle(result.folder, tmp_path / "bundle")
    assert "heads: mood, alike; the encoder runs once" in report and "mean on 80 rows" in report
    graph = onnx.load(tmp_path / "bundle" / "model.onnx").graph
    assert [n.op_type for n in graph.node].count("Softmax") == 2  # one attention a layer of the two


def test_every_kind_of_task_stands_beside_every_other(mixed):
    """Windows, spans of contexts and choices with several sequences a row: each is judged and answered as it is alone."""
    own = {"entities": "conll", "questions": "jsonl", "choices": "jsonl", "stars": "csv"}
    kinds = {"entities": "tagging", "questions": "answering", "choices": "choice", "stars": "ordinal"}
    tasks = {
        name: {
            "type": kinds[name],
            "data": {s: str(ROOT / "examples" / "tasks" / f"{name}-{s}.{end}") for s in ("train", "dev")}
            | {"limit": 24},
        }
        for name, end in own.items()
    }
    result = train(load_config(mixed.make("kinds", tasks=tasks, training={"max_steps": 6})), quiet=True)
    trained = load_trained(result.folder)
    assert trained.task.reads == "tokens" and trained.running.packed
    for name in tasks:
        one = load_task(str(result.folder), name)
        alone = evaluate(one.running, heldout_examples(one, None), one.task, token_budget=200).metrics
        # A tie that rounding breaks otherwise may move a row.
        assert alone == pytest.approx({k: result.metrics["dev"][f"{name}/{k}"] for k in alone}, abs=0.05)
    items = [
        {"text": "a text that is much longer than what the model takes " * 4},
        {"question": "Who?", "context": "Ada came. " * 30},
        {"text": "It fell.", "choices": ["It broke.", "It sang."]},
    ]
    taken = [trained.task.take(item) for item in items]
    found = [trained.task.answer(a.prediction, None)["tasks"] for a in predict(trained, taken)]
    assert [sorted(each) for each in found] == [["entities", "stars"], ["questions"], ["choices"]]
    assert found[2]["choices"]["label"] in ("It broke.", "It sang.")
    # What is cut is counted though another task reads the same tokens as a window, of which nothing is lost.
    words = {"text": items[0]["text"], "tasks": ["entities"]}
    long = [{"question": "Who came? " * 60, "context": "Ada came."}, items[0], words]
    cut = [a.cut_tokens > 0 for a in predict(trained, [trained.task.take(item) for item in long])]
    assert cut == [True, True, False]


# -- answering ---------------------------------------------------------------------------------------------------------

ASKED = ["good fine film", "very slow music plot", "film"]
PAIR = ("good good film", "bad bad bad plot")


def close(mine: dict, theirs: dict, path: str = "") -> None:
    """The same answer, probabilities and numbers to 1e-4 (a number in the hundreds: relatively)."""
    assert mine.keys() == theirs.keys(), path
    for key, value in mine.items():
        if isinstance(value, dict):
            close(value, theirs[key], f"{path}.{key}")
        elif isinstance(value, float):
            assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-4), f"{path}.{key}"
        elif isinstance(value, list):
            for a, b in zip(value, theirs[key], strict=True):
                close(a, b, f"{path}.{key}") if isinstance(a, dict) else close({"": a}, {"": b}, path)
        elif key != "label" or "; " not in str(value):  # the label of several is a line to read, with rounded numbers
            assert theirs[key] == value, f"{path}.{key}"


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_torch_onnx_and_http_agree(learned, bundle, tmp_path, layout):
    from regraft.serve.session import Session

    folder = bundle
    if layout == "padded":
        folder = tmp_path / "padded"
        export_bundle(learned.folder, folder, layout="padded")
    trained = load_trained(learned.folder)
    texts = [*((text, None) for text in ASKED), PAIR]
    expected = [trained.task.answer(a.prediction, None) for a in predict(trained, texts)]
    assert [sorted(e["tasks"]) for e in expected] == [["mood", "things"]] * 3 + [["alike"]]
    session = Session(folder, threads=1, warm_tokens=64)
    taken = [session.task.take({"text": t} | ({"text_pair": p} if p else {})) for t, p in texts]
    prepared = session.prepare([t for t, _ in taken], [beside for _, beside in taken])
    assert len(prepared.items) == 4  # a text that two tasks read goes through the encoder once
    for mine, found in zip(expected, session.answers(prepared, session.run(prepared.items)), strict=True):
        close(mine, json.loads(json.dumps(session.task.answer(found, None))))
    if layout == "padded":
        return
    with running_server(folder) as server:
        inputs = [*ASKED, {"text": PAIR[0], "text_pair": PAIR[1]}]
        found = httpx.post(f"{server.url}/predict", json={"inputs": inputs}, timeout=30).json()["predictions"]
        for mine, theirs in zip(expected, found, strict=True):
            assert theirs.pop("tokens") > 0 and theirs.pop("truncated") == 0
            close(mine, theirs)
        one = httpx.post(f"{server.url}/predict", json={"inputs": ASKED[0], "tasks": ["things"]}, timeout=30).json()
        assert list(one["predictions"][0]["tasks"]) == ["things"]
        for body, field, said in (
            ({"inputs": "film", "tasks": ["thing"]}, "tasks", "did you mean 'things'"),
            ({"inputs": "film", "tasks": ["alike"]}, "inputs.text_pair", "alike reads pairs"),
            ({"inputs": [{"text": "a", "text_pair": "b"}], "tasks": ["mood"]}, "inputs[0].text_pair", "mood reads one"),
        ):
            refused = httpx.post(f"{server.url}/predict", json=body, timeout=30)
            error = refused.json()["error"]
            assert refused.status_code == 422 and error["field"] == field and said in error["message"]
        long = httpx.post(f"{server.url}/predict", json={"inputs": ["film", "good " * 90]}, timeout=30).json()
        assert [p["truncated"] > 0 for p in long["predictions"]] == [False, True]


def test_a_head_is_transformers_own(learned):
    """The saved encoder with the saved head gives the same probabilities in plain transformers."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    best = learned.folder / "best"
    plain = AutoModelForSequenceClassification.from_pretrained(best, num_labels=2).eval()
    heads = load_file(best / "heads.safetensors")
    plain.classifier.load_state_dict({n: heads[f"0.classifier.{n}"] for n in ("weight", "bias")})
    batch = AutoTokenizer.from_pretrained(best)(ASKED, padding=True, return_tensors="pt")
    with torch.no_grad():
        chances = plain(**batch).logits.softmax(-1).numpy()
    trained = load_task(str(learned.folder), "mood")
    for answer, row in zip(predict(trained, [(text, None) for text in ASKED]), chances, strict=True):
        found = [answer.prediction.scores[label] for label in trained.task.labels]
        assert found == pytest.approx(row, abs=1e-5)


def test_on_the_command_line_a_task_is_named(learned, mixed, capsys, monkeypatch):
    from regraft.engine.cli import main

    def said(*arguments: str) -> list[dict]:
        assert main([str(a) for a in arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert said("predict", learned.folder, "good film", "--task", "mood", "--format", "jsonl")[0]["label"] == "good"
    lines = b'film\n{"text": "good film", "text_pair": "bad plot"}\n\n{"words": ["good", "film"]}\n{"text": "film", "tasks": ["mood"]}\n'
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines)))
    found = said("predict", learned.folder, "--format", "jsonl")
    assert [sorted(record["tasks"]) for record in found] == [["mood", "things"], ["alike"], ["things"], ["mood"]]
    assert found[1]["text_pair"] == "bad plot" and found[2]["words"] == ["good", "film"]
    for options, texts in ([], ["film", ""]), (["--set", "data.empty=drop"], ["film"]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"film\n\n")))
        assert [record["text"] for record in said("predict", learned.folder, "--format", "jsonl", *options)] == texts
    for line, message in (
        (b"film \xff", "<stdin>:2: byte 0xff at position 6 of the line is not utf-8"),
        (b'{"txt": "film"}', "<stdin>:2: "),
        (b"{broken", "<stdin>:2: not valid JSON"),
        (b'{"words": ["\\ud800"]}', "<stdin>:2: \\ud800 is half of a character"),
    ):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"film\n" + line)))
        assert main(["predict", str(learned.folder), "--format", "jsonl"]) == 2
        assert message in capsys.readouterr().err
    rows = mixed.tasks["alike"]["data"]["dev"]
    (record,) = said("evaluate", learned.folder, rows, "--task", "alike", "--format", "json")
    assert record["metrics"]["mse"] == pytest.approx(learned.metrics["dev"]["alike/mse"], rel=1e-4)
    (record,) = said("evaluate", learned.folder, "--format", "json")
    assert record["metrics"]["mean"] == pytest.approx(learned.metrics["dev"]["mean"], rel=1e-4)
    assert record["rows"] == 120


def test_what_cannot_be_asked_is_told(learned, mixed):
    from regraft.engine.predict import evaluate_file, predict_command

    with pytest.raises(
        ConfigError, match=r"--task moods: no task 'moods' here \(did you mean 'mood'\?\); there are mood"
    ):
        load_task(str(learned.folder), "moods")
    rows = mixed.tasks["mood"]["data"]["dev"]
    with pytest.raises(DataError, match=r"its rows are of one task; name it with --task: mood, things, alike"):
        evaluate_file(str(learned.folder), rows, "json")
    options = {"pair": None, "top_k": None, "style": None}
    with pytest.raises(DataError, match=r"its columns are those of one task; name it with --task"):
        predict_command(str(learned.folder), [], file=rows, **options)


# -- configurations ----------------------------------------------------------------------------------------------------


def one(**changed) -> dict:
    return {"type": "classification", "data": {"train": "rows.csv"}} | changed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": {"a": one(), "b": {"type": "regression"}}}, r"a\.yaml:\d+: tasks\.b\.data: missing, and has no default"),
        ({"tasks": {"a": one(), "b": one(weight=-1)}}, r"a\.yaml:\d+: tasks\.b\.weight: should be greater than 0, found -1"),
        ({"mixing": {"sampling": "root"}}, r"a\.yaml:\d+: mixing\.sampling: should be 'proportional', 'sqrt'.*found 'root'"),
        ({"mixing": {"sampling": "temperature"}}, r"mixing\.temperature: missing; sampling: temperature needs a number"),
        ({"mixing": {"temperature": 3}}, r"mixing\.temperature: sampling: proportional does not use it"),
        ({"mixing": {"weighting": "uncertainty"}, "tasks": {"a": one(), "b": one(weight=2)}}, r"tasks\.b\.weight: learned"),
        ({"tasks": {"a": one(kind="x"), "b": one()}}, r"a\.yaml:\d+: tasks\.a\.kind: unknown key; valid here: type, "),
        ({"tasks": {"a": one(tpye="x"), "b": one()}}, r"tasks\.a\.tpye: unknown key \(did you mean 'type'\?\)"),
        ({"tasks": {"a": one(type="tagger"), "b": one()}}, r"a\.yaml:\d+: tasks\.a\.type: 'tagger' is not known"),
        ({"tasks": {"a": one(type="mlm"), "b": one()}}, r"a\.yaml:\d+: tasks\.a\.type: mlm hides words"),
        ({"tasks": {"a": one(metric="loss"), "b": one()}}, r"tasks\.a\.metric: loss is better when smaller"),
        ({"tasks": {"a": one()}}, r"tasks: expected at least two"),
        ({"tasks": {"a b": one(), "b": one()}}, r"tasks\.a b: expected a name of letters"),
        ({"task": {"type": "regression"}}, r"a\.yaml:\d+: task: each of tasks says its own; remove it"),
        ({"data": {"train": "x.csv"}}, r"a\.yaml:\d+: data: each of tasks has its own; remove it"),
        ({"model": {"name": "m", "new_words": 5}}, r"a\.yaml:\d+: model\.new_words: every task's rows would add words"),
        ({"head": {"type": "mlp"}}, r"a\.yaml:\d+: head\.type: mlp: heads of several tasks are transformers' own"),
        ({"training": {"sharding": "full"}}, r"a\.yaml:\d+: training\.sharding: the heads of several tasks take turns"),
        ({"method": "lora"}, r"a\.yaml:\d+: method: lora trains one task; for several: full or bitfit"),
        ({"tasks": {"a": one(data={"train": "x", "columns": {"label": "text"}}), "b": one()}}, r"tasks\.a\.data\.columns: the same column 'text' is named twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_by_key_and_line(tmp_path, values, message):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "m"}, "tasks": {"a": one(), "b": one()}} | values))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "model: {name: m}\ntasks:\n  a: {data: {train: x}}\n  b: {data: {train: x}}\n  a: {data: {train: y}}\n"
    )
    with pytest.raises(ConfigError, match=r"a\.yaml:5: tasks\.a: already set in line 3"):
        load_config(path)


def test_a_mixture_without_tasks_is_refused(make_config):
    with pytest.raises(ConfigError, match=r"mixing: for several tasks; remove it or list them under tasks"):
        load_config(make_config(mixing={"sampling": "sqrt"}))


def test_rows_that_are_not_there_are_told(mixed):
    tasks = {**mixed.tasks, "mood": {"data": {"train": str(mixed.folder / "nowhere.csv")}}}
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        train(load_config(mixed.make("nowhere", tasks=tasks)), quiet=True)


def test_the_example_reads_its_four_data_sets(real_data, monkeypatch):
    from regraft.engine.several.data import one_run
    from regraft.engine.training.splits import read_parts

    config = load_config(ROOT / "examples" / "tasks" / "glue.yaml")
    assert list(config.tasks) == ["sentiment", "acceptable", "entailed", "alike"]
    for name, task in config.tasks.items():
        here = {split: str(real_data / getattr(task.data, split).removeprefix("data/")) for split in ("train", "dev")}
        task = task.model_copy(update={"data": task.data.model_copy(update={**here, "limit": 50})})
        found, parts = read_parts(one_run(config.model_copy(update={"tasks": {name: task}}), name))
        assert len(parts["train"]) == 50 and len(parts["dev"]) > 200
        assert (parts["train"].pairs is not None) == (name in ("entailed", "alike"))
        assert found.type == task.type
