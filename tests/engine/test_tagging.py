"""Tags of words and spans of characters: read, learned, answered with exact offsets, served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import regraft
from regraft.engine.config import DataConfig, load_config
from regraft.engine.data.fast_tokenizer import load_fast_tokenizer
from regraft.engine.data.rows import Rows
from regraft.engine.errors import DataError
from regraft.engine.export import export_bundle
from regraft.engine.heldout import encoded, heldout_rows
from regraft.engine.predict import predict
from regraft.engine.tasks.crf import Crf
from regraft.engine.tasks.schemes import chunks, guess_scheme, refuse, spell, strict_chunks, tag_names
from regraft.engine.tasks.span_metrics import SpanMetrics
from regraft.engine.tasks.tagging import NO_TARGET, Tagging
from regraft.engine.tasks.words import words_of
from regraft.engine.trained import load_trained
from regraft.engine.training.run import train
from regraft.serve.session import Session

ODD = [
    "e\u0301",
    "\u200b",
    "\ufeff",
    "\U0001f600",
    "\U0001f468\u200d\U0001f469",
    "שלום",
    "我",
    "ß",
    "\r\n",
    "\t",
    "ا",
    "\u0300",
]
TEXTS = st.lists(st.one_of(st.sampled_from(ODD), st.text("abgod film.,-'", max_size=6), st.characters(codec="utf-8")), max_size=30).map("".join)  # fmt: skip


def sentences(count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    """Words with their tags: a name is 'sharp' or 'warm' and the words 'long' after it, a place 'plot'."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(rng.integers(2, 7)):
            match rng.integers(4):
                case 0:
                    words += [str(rng.choice(["sharp", "warm"])), *["long"] * (more := int(rng.integers(3)))]
                    tags += ["B-NAME", *["I-NAME"] * more]
                case 1:
                    words, tags = [*words, "plot"], [*tags, "B-PLACE"]
                case _:
                    words, tags = [*words, str(rng.choice(["good", "bad", "film", "very"]))], [*tags, "O"]
        rows.append((words, tags))
    return rows


@pytest.fixture
def conll(tmp_path: Path):
    def write(name: str, count: int, seed: int) -> Path:
        path = tmp_path / name
        path.write_text(
            "".join("".join(f"{w}\t{t}\n" for w, t in zip(*row, strict=True)) + "\n" for row in sentences(count, seed))
        )
        return path

    return write


@pytest.fixture
def tagging_config(make_config, conll):
    def make(name: str = "run.yaml", **task: object) -> Path:
        data = {"train": str(conll("train.conll", 150, 1)), "dev": str(conll("dev.conll", 40, 2))}
        return make_config(
            name,
            data=data,
            task={"type": "tagging", **task},
            training={"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "precision": "fp32", "threads": 1},
        )

    return make


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B", "E-A", "S-A", "E-B", "S-B"]), max_size=12))
@settings(max_examples=300, deadline=None)
def test_spans_are_those_that_seqeval_finds(tags):
    import seqeval.metrics.sequence_labeling as seqeval
    from seqeval import scheme

    assert chunks(tags) == [(a, b + 1, kind) for kind, a, b in seqeval.get_entities(tags)]
    for name, known in (("iob2", scheme.IOB2), ("bioes", scheme.IOBES)):
        mine = [tag for tag in tags if name == "bioes" or tag[0] in "BIO"]
        found = scheme.Entities([mine], known).entities[0]
        assert strict_chunks(mine, name) == sorted((*e.to_tuple()[2:], e.tag) for e in found)


@given(st.lists(st.sampled_from(["O", "B-A", "I-A", "B-B", "I-B"]), min_size=1, max_size=10), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_figures_are_seqevals(gold, seed):
    from seqeval.metrics import f1_score, precision_score, recall_score

    rng = np.random.default_rng(seed)
    found = [str(t) for t in rng.choice(["O", "B-A", "I-A", "B-B", "I-B"], len(gold))]
    metrics = SpanMetrics()
    metrics.add(chunks(gold), chunks(found), strict_chunks(found, "iob2"), len(gold), 0)
    mine = metrics.compute()
    given = {"y_true": [gold], "y_pred": [found], "zero_division": 0}
    assert mine["precision"] == pytest.approx(precision_score(**given))
    assert mine["recall"] == pytest.approx(recall_score(**given))
    assert mine["f1"] == pytest.approx(f1_score(**given))
    if metrics.kinds:  # seqeval has no mean of nothing
        assert mine["macro_f1"] == pytest.approx(f1_score(average="macro", **given))


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("AB")), max_size=8))
@settings(deadline=None)
def test_every_scheme_spells_spans_so_that_they_are_read_back(parts):
    spans, at = [], 0
    for length, kind in parts:
        if length:
            spans.append((at, at + length, kind))
        at += length or 1
    for scheme in ("iob1", "iob2", "bioes"):
        tags = spell(spans, at, scheme)
        assert chunks(tags) == spans
        assert refuse(tags, scheme) is None
        if scheme != "iob1":
            assert strict_chunks(tags, scheme) == spans
        assert chunks(tags) == spans and guess_scheme([tags]) in (scheme, "iob2")
    assert guess_scheme([spell(spans, at, "bioes")]) == ("bioes" if spans else "iob2")


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_words_stand_where_they_say_and_cover_what_is_visible(text):
    words = words_of(text)
    assert all(a < b for a, b in words)
    assert all(one[1] <= other[0] for one, other in zip(words, words[1:], strict=False))
    covered = {i for a, b in words for i in range(a, b)}
    assert all(c.isspace() or i in covered for i, c in enumerate(text))


def answer_all(task: Tagging, tokenizer, texts: list[str], max_length: int, seed: int = 0):
    """Answers to texts from logits drawn at random."""
    rows = Rows("t", "t", texts, None, np.arange(len(texts)))
    made = task.examples(rows, tokenizer, max_length, labelled=False)
    rng = np.random.default_rng(seed)
    return task.answers(made, [rng.normal(size=(n, task.outputs)) for n in made.store.lengths]), made


@pytest.mark.parametrize("alignment", ["first", "mean"])
@pytest.mark.parametrize("crf", [False, True])
def test_what_is_reported_is_what_stands_there(tiny_model, alignment, crf):
    tokenizer = load_fast_tokenizer(tiny_model)
    task = Tagging(("A", "B"), tags="bioes", crf=crf, alignment=alignment, stride=3)

    @given(TEXTS, st.integers(0, 9))
    @settings(max_examples=120, deadline=None)
    def check(text, seed):
        (answer,), made = answer_all(task, tokenizer, [text], 9, seed)
        assert all(text[s.start : s.end] == s.text for s in answer.spans)
        assert all(one.end <= other.start for one, other in zip(answer.spans, answer.spans[1:], strict=False))
        judged = made.words[made.words >= 0]
        first = np.flatnonzero(np.diff(judged, prepend=-1))
        assert len(set(judged[first])) == len(first), "a word is judged once"

    check()


def test_long_texts_are_read_in_windows_and_every_word_is_learned_once(tiny_model):
    tokenizer = load_fast_tokenizer(tiny_model)
    words = ["good", "plot", "xyz"] * 40
    spans = [(0, 1, "A"), (50, 53, "B")]
    text = " ".join(words)
    bounds = words_of(text)
    label = tuple((bounds[a][0], bounds[b - 1][1], kind) for a, b, kind in spans)
    rows = Rows("train", "t", [text], [label], np.arange(1))
    task = Tagging(("A", "B"), stride=8)
    made = task.examples(rows, tokenizer, 24)
    assert len(made.store) > 5 and made.store.lengths.max() <= 24
    assert (made.targets != NO_TARGET).sum() == len(words) == made.weights.sum()
    # The right answer, given back as logits, is the right spans.
    logits = np.eye(task.outputs)[np.maximum(made.targets, 0)] * 9
    (answer,) = task.answers(made, np.split(logits, made.store.offsets[1:-1]))
    assert [(s.start, s.end, s.label) for s in answer.spans] == list(label)


def test_a_crf_never_leaves_its_scheme_and_its_marginals_are_exact():
    task = Tagging(("A", "B"), tags="bioes", crf=True)
    rng = np.random.default_rng(0)
    emissions = [rng.normal(size=(n, task.outputs)) * 3 for n in (1, 9, 4, 30)]
    for path in task.crf.best(emissions):
        assert refuse([task.labels[i] for i in path], "bioes") is None
    small = Crf(tag_names(("A",), "iob2"), "iob2", [rng.normal(size=(3, 3)), rng.normal(size=3), rng.normal(size=3)])
    moves, starts, ends = (v.astype(float) for v in small.values())
    e = rng.normal(size=(3, 3))
    total, expected = 0.0, np.zeros((3, 3))
    for path in np.ndindex(3, 3, 3):
        score = starts[path[0]] + ends[path[2]] + sum(e[t, i] for t, i in enumerate(path))
        chance = np.exp(score + moves[path[0], path[1]] + moves[path[1], path[2]])
        total += chance
        expected[np.arange(3), list(path)] += chance
    assert np.allclose(small.marginals([e])[0], expected / total, atol=1e-9)


@pytest.mark.parametrize("tags", ["iob2", "bioes"])
def test_a_crf_learns_a_span_that_windows_cut(make_config, tmp_path, tags):
    text = "good film " * 2 + "sharp long plot " * 6 + "bad story " * 4
    span = [text.index("sharp"), text.rindex("plot") + 4, "NAME"]
    (tmp_path / "t.jsonl").write_text((json.dumps({"text": text, "label": [span]}) + "\n") * 12)
    path = make_config(
        data={"train": str(tmp_path / "t.jsonl"), "dev": str(tmp_path / "t.jsonl")},
        model={"max_length": 16},
        task={"type": "tagging", "crf": True, "tags": tags},
        training={"epochs": 12, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "threads": 1},
    )
    losses: list[float] = []
    result = train(load_config(path), quiet=True, on_step=lambda info: losses.append(info.loss))
    assert max(losses) < 4, "a window's gold tags are a path that the scheme forbids"
    assert result.metrics["dev"]["f1"] == 1.0


def test_chains_that_begin_or_end_within_a_text_are_free_to(tiny_model):
    task = Tagging(("A",), tags="bioes", crf=True)
    model = torch.nn.Module()
    task.attach(model)
    with torch.no_grad():
        for parameter in task.crf.parameters():
            parameter.normal_()
    moves, starts, ends = (torch.from_numpy(v).double() for v in task.crf.values())
    emissions = torch.randn(3, task.outputs, dtype=torch.float64)
    tags = torch.tensor([task.labels.index(t) for t in ("I-A", "E-A", "B-A")])

    def chance(begins: bool, ends_too: bool) -> float:
        def score(path):
            own = emissions[range(3), list(path)].sum() + moves[path[0], path[1]] + moves[path[1], path[2]]
            return own + begins * starts[path[0]] + ends_too * ends[path[2]]

        every = torch.stack([score(path) for path in np.ndindex(*[task.outputs] * 3)])
        return float(score(tags.tolist()) - every.logsumexp(0))

    for begins, stops in ((False, False), (True, False), (False, True), (True, True)):
        edges = [torch.tensor([x]) for x in (begins, stops)]
        found = task.crf.log_likelihood(emissions, tags, torch.tensor([0, 3]), *edges)
        assert float(found.detach()) == pytest.approx(chance(begins, stops), rel=1e-5)
    assert chance(False, False) > -20 > -9000 > chance(True, False)


def test_a_word_without_tokens_breaks_no_span(tiny_model):
    tokenizer = load_fast_tokenizer(tiny_model)
    text = "film \u200b sharp long \u200b plot"
    spans = ((5, 17, "A"), (18, 24, "B"))  # each begins with a word that the tokenizer makes nothing of
    rows = Rows("train", "t", [text], [spans], np.arange(1))
    for tags, expected in (("iob2", "O B-A I-A B-B"), ("bioes", "O B-A E-A S-B")):
        task = Tagging(("A", "B"), tags=tags, crf=True)
        made = task.examples(rows, tokenizer, 24)
        found = [task.labels[t] for t in made.targets[made.targets != NO_TARGET]]
        assert found == expected.split()
        assert refuse(found, tags) is None


def test_spans_that_begin_or_end_within_a_word_take_the_whole_word_and_are_counted(
    tagging_config, tmp_path, tiny_model
):
    text = "filmgood plot music"
    label = ((4, 8, "A"), (9, 13, "A"), (15, 18, "B"))
    rows = Rows("train", "t", [text, text], [label, ((0, 4, "A"), (4, 13, "B"))], np.arange(2))
    task = Tagging(("A", "B"), tags="iob2")
    made = task.examples(rows, load_fast_tokenizer(tiny_model), 32)
    found = [task.labels[t] for t in made.targets[made.targets != NO_TARGET]]
    assert found == ["B-A", "B-A", "B-B", "B-A", "B-B", "O"]
    assert made.counts["spans that do not fit words"] == 4
    (tmp_path / "t.jsonl").write_text((json.dumps({"text": text, "label": label}) + "\n") * 10)
    told: list[str] = []
    from regraft.engine.training.setup import prepare

    prepare(
        load_config(tagging_config(), [f"data.train={tmp_path / 't.jsonl'}", f"data.dev={tmp_path / 't.jsonl'}"]),
        told.append,
    )
    assert any("spans that do not fit words" in line for line in told), told


@pytest.mark.parametrize(("crf", "alignment"), [(True, "first"), (False, "mean")])
def test_a_run_learns_predicts_exports_and_serves_the_same(tagging_config, tmp_path, crf, alignment):
    result = train(load_config(tagging_config(crf=crf, alignment=alignment)), quiet=True)
    assert result.metrics["dev"]["f1"] > 0.9
    assert result.metrics["dev"]["strict_f1"] <= result.metrics["dev"]["f1"]
    trained = load_trained(result.folder)
    texts = ["sharp long, film plot", "", "warm\r\nlong  \u200b plot", "good " * 200 + "sharp long"]
    answers = [a.prediction for a in predict(trained, [(t, None) for t in texts])]
    assert [(s.text, s.label) for s in answers[0].spans] == [("sharp long", "NAME"), ("plot", "PLACE")]
    assert answers[-1].spans[-1].start == 1000
    for layout in ("packed",) if crf else ("padded",):
        export_bundle(result.folder, tmp_path / layout, layout=layout)
        session = Session(tmp_path / layout, threads=1)
        prepared = session.prepare(texts)
        served = session.answers(prepared, session.run(prepared.items))
        for mine, theirs in zip(answers, served, strict=True):
            assert [(s.start, s.end, s.label) for s in mine.spans] == [(s.start, s.end, s.label) for s in theirs.spans]
            assert np.allclose([s.score for s in mine.spans], [s.score for s in theirs.spans], atol=1e-4)


def test_it_speaks_on_the_command_line_and_over_http(tagging_config, tmp_path, conll):
    from fastapi.testclient import TestClient

    from regraft.serve.http import create_app
    from regraft.serve.scheduler import Scheduler

    path = tagging_config()
    result = train(load_config(path, ["training.epochs=3"]), quiet=True)
    done = regraft("predict", result.folder, "sharp plot", "--format", "jsonl")
    assert done.returncode == 0, done.stderr
    (record,) = map(json.loads, done.stdout.splitlines())
    assert record["spans"][0]["text"] == "sharp"
    done = regraft("evaluate", result.folder, str(conll("more.conll", 20, 5)))
    assert done.returncode == 0 and "strict_f1" in done.stdout and "PLACE" in done.stdout, done.stderr
    assert "PLACE" in (result.folder / "report.html").read_text()
    export_bundle(result.folder, tmp_path / "bundle")
    session = Session(tmp_path / "bundle", threads=1)
    scheduler = Scheduler(session.run, probe=session.probe(), max_batch_tokens=4096, queue_tokens=65536).start()
    try:
        with TestClient(create_app(session, scheduler)) as client:
            body = {"inputs": ["warm long plot", {"words": ["plot", "sharp long"]}, "\ud800", "plot " * 300]}
            answer = client.post("/predict", content=json.dumps(body), headers={"content-type": "application/json"})
            assert answer.status_code == 200, answer.text
            first, second, third, fourth = answer.json()["predictions"]
            assert first["spans"][0] | {"score": 0} == {
                "start": 0,
                "end": 9,
                "label": "NAME",
                "text": "warm long",
                "score": 0,
            }
            assert second["spans"][-1]["text"] == "sharp long"
            assert third["error"]["code"] == "item_failed"
            assert len(fourth["spans"]) == 300 and fourth["tokens"] > 300
            refused = client.post("/predict", json={"inputs": [{"words": ["a", ""]}]})
            assert refused.status_code == 422 and refused.json()["error"]["field"] == "inputs[0].words"
    finally:
        scheduler.stop(5)


def rows_of(path: Path, content: str, **data: object) -> Rows:
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    return Tagging.read(str(path), DataConfig(train=str(path), **data), split="train")


def test_every_format_gives_the_same_spans(tmp_path):
    expected = [((0, 8, "PER"), (9, 12, "LOC"))]
    iob1 = rows_of(tmp_path / "a.conll", "Jo\tI-PER\r\nSmith\tI-PER\r\nUSA\tI-LOC\r\n\r\n", tag_scheme="iob1")
    iob2 = rows_of(tmp_path / "b.conll", "-DOCSTART- O\n\nJo NN B-PER\nSmith NN I-PER\nUSA NN B-LOC\n")
    bioes = rows_of(tmp_path / "c.iob", "Jo\tB-PER\nSmith\tE-PER\nUSA\tS-LOC\n")
    words = {"text": ["Jo", "Smith", "USA"], "label": ["B-PER", "I-PER", "B-LOC"]}
    listed = rows_of(tmp_path / "d.jsonl", json.dumps(words))
    spans = {"text": "Jo Smith USA", "label": [{"start": 9, "end": 12, "label": "LOC"}, [0, 8, "PER"]]}
    marked = rows_of(tmp_path / "e.jsonl", json.dumps(spans))
    surfaces = {"text": "Jo Smith USA", "label": {"PER": {"Jo Smith": [[0, 7]]}, "LOC": {"USA": [[9, 11]]}}}
    cluener = rows_of(tmp_path / "f.jsonl", json.dumps(surfaces))
    for rows in (iob1, iob2, bioes, listed, marked, cluener):
        assert rows.texts == ["Jo Smith USA"] and list(rows.labels) == expected, rows.path
    table = "# text = don't\n1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_\n1\tdo\tdo\tAUX\tVB\t_\t_\t_\t_\t_\n2\tn't\tnot\tPART\tRB\t_\t_\t_\t_\t_\n"
    pos = rows_of(tmp_path / "g.conllu", table)
    assert pos.labels == [((0, 2, "AUX"), (3, 6, "PART"))]


def test_iob1_is_read_where_the_file_can_only_be_that(tmp_path):
    iob1 = "Jo\tI-PER\nSmith\tI-PER\nAnn\tB-PER\nin\tO\nUSA\tI-LOC\n"
    rows = rows_of(tmp_path / "a.conll", iob1)
    assert rows.labels == [((0, 8, "PER"), (9, 12, "PER"), (16, 19, "LOC"))] and rows.scheme == "iob1"
    assert rows_of(tmp_path / "b.conll", "Jo\tB-PER\nSmith\tB-PER\nx\tI-PER\n").scheme == "iob2"
    with pytest.raises(DataError, match=r"c\.conll:3: tag 'I-LOC' continues .*data\.tag_scheme: iob1"):
        rows_of(tmp_path / "c.conll", "Jo\tB-PER\nin\tO\nUSA\tI-LOC\n")


def test_a_mistyped_tag_does_not_change_what_the_others_mean(tmp_path):
    content = "Jo\tB-PER\nSmith\tI-PER\n\nAnn\tB_PER\nUSA\tB-LOC\n"
    with pytest.raises(
        DataError, match=r"a\.conll:4: tag 'B_PER' is not of the scheme iob2 \(did you mean 'B-PER'\?\)"
    ):
        rows_of(tmp_path / "a.conll", content)
    listed = {"text": ["a", "b", "c"], "label": ["B-PER", "PERS", "B-LOC"]}
    with pytest.raises(DataError, match=r"b\.jsonl:1, column 'label': tag 'PERS' is not of the scheme iob2"):
        rows_of(tmp_path / "b.jsonl", json.dumps(listed))
    # Where the rows are only read to be answered, their tags are nobody's business.
    found = Tagging.read(str(tmp_path / "a.conll"), DataConfig(train="x"), split="predict", need_labels=False)
    assert found.texts == ["Jo Smith", "Ann USA"] and found.labels is None


def test_a_file_of_o_alone_has_no_spans_and_held_out_rows_are_read_as_the_training_rows_are(tagging_config, tmp_path):
    empty = rows_of(tmp_path / "o.conll", "good\tO\nfilm\tO\n")
    assert empty.labels == [()]
    only = [f"data.dev={tmp_path / 'o.conll'}", "training.max_steps=1"]
    result = train(load_config(tagging_config(), only), quiet=True)
    done = regraft("evaluate", result.folder, tmp_path / "o.conll")
    assert done.returncode == 0 and "1 rows" in done.stdout, done.stderr
    # A tag of each word may be called O, too.
    (tmp_path / "pos.conll").write_text("good\tJ\nfilm\tN\nvery\tO\n\n" * 8)
    (tmp_path / "o2.conll").write_text("very\tO\n\nvery\tO\n\n")
    data = [f"data.train={tmp_path / 'pos.conll'}", f"data.dev={tmp_path / 'o2.conll'}", "task.metric=accuracy"]
    result = train(load_config(tagging_config("p.yaml"), [*data, f"run={tmp_path / 'pos'}"]), quiet=True)
    assert result.metrics["dev"]["accuracy"] == 1.0
    held_out = heldout_rows(load_trained(result.folder), None)
    assert held_out.labels == [((0, 4, "O"),)] * 2


@pytest.mark.parametrize(
    ("name", "content", "data", "message"),
    [
        ("a.jsonl", '{"text": "Ann", "label": {"start": 0, "end": 3, "label": "A"}}', {}, r"a\.jsonl:1.*one span that is in no list"),
        ("a.jsonl", '{"text": "Ann", "label": {"PER": ["Ann"]}}', {}, r"a\.jsonl:1.*expected \{type: \{surface: \[\[first, last\]\]\}\}.*'PER': \['Ann'\]"),
        ("a.jsonl", '{"text": "Ann", "label": {"PER": {"Ann": [0, 2]}}}', {}, r"a\.jsonl:1.*expected \{type: \{surface: \[\[first, last\]\]\}\}"),
        ("a.conll", "Jo\tB-PER\nSmith\n", {}, r"a\.conll:2: expected 2 columns, found 1: Smith"),
        ("a.conll", "Jo\tO\nSmith\tI-PER\n", {"tag_scheme": "iob2"}, r"a\.conll:2: tag 'I-PER' continues what did not begin"),
        ("a.conll", "Jo\tS-PER\n", {"tag_scheme": "iob2"}, r"a\.conll:1: tag 'S-PER' is not of the scheme iob2"),
        ("a.conll", "Jo\tB-PER\nB\tO\n", {"tag_scheme": "bioes"}, r"a\.conll:2: tag 'O' does not follow 'B-PER'"),
        ("a.conll", "Jo\tO\n", {"columns": {"label": 5}}, r"no column 5 \(data\.columns\.label\); there are 2"),
        ("a.conllu", "1\tdo\n", {}, r"a\.conllu:1: expected 10 columns, found 2"),
        ("a.conllu", "", {}, "no rows"),
        ("a.jsonl", '{"text": "abc", "label": [[0, 2, "A"], [1, 3, "B"]]}', {}, r"a\.jsonl:1.*overlap: 'ab' \(A\) and 'bc' \(B\)"),
        ("a.jsonl", '{"text": "abc", "label": [[0, 4, "A"]]}', {}, r"span 0 to 4 \(A\) is out of range: the text has 3"),
        ("a.jsonl", '{"text": "abc", "label": [[2, 2, "A"]]}', {}, r"span 2 to 2 \(A\) is empty"),
        ("a.jsonl", '{"text": "abc", "label": [[0, "A"]]}', {}, r"expected a span as \[start, end, label\]"),
        ("a.jsonl", '{"text": "abc", "label": [{"start": 0, "stop": 1, "label": "A"}]}', {}, "a span needs start, end and label"),
        ("a.jsonl", '{"text": ["a", "b"], "label": ["O"]}', {}, "expected a list of 2 tags, one a word, found 1 tags"),
        ("a.jsonl", '{"text": ["a", ""], "label": ["O", "O"]}', {}, "word 2: expected a text, found ''"),
        ("a.jsonl", '{"text": "\\ud83d x", "label": []}', {}, "half of a character"),
        ("a.jsonl", '{"text": "abc", "label": {"A": {"bc": [[0, 1]]}}}', {}, "'bc' \\(A\\) does not stand at 0 to 1"),
    ],
)  # fmt: skip
def test_bad_rows_are_told_by_file_and_line(tmp_path, name, content, data, message):
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name, content, **data)


def test_of_spans_that_overlap_the_longer_stays_where_that_is_asked_for(tmp_path):
    row = {"text": "abcdef", "label": [[0, 3, "A"], [2, 6, "B"], [5, 6, "C"]]}
    rows = rows_of(tmp_path / "a.jsonl", json.dumps(row), overlap="longest")
    assert rows.labels == [((2, 6, "B"),)] and rows.dropped == {"overlapping spans": 2}


def test_a_new_type_in_dev_is_an_error_or_is_counted(tagging_config, tmp_path):
    path = tagging_config()
    trained = load_trained(train(load_config(path, ["training.max_steps=1"]), quiet=True).folder)
    rows = rows_of(tmp_path / "x.conll", "Jo\tB-NAMES\n\nsharp\tB-NAME\n")
    with pytest.raises(DataError, match=r"x\.conll:1, column 'label': 'NAMES' is not a label.*did you mean 'NAME'"):
        encoded(trained, rows)
