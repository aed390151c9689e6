"""Files that the encoder tasks learn from where the published ones have to be cut, joined or unpacked first.

Everything is written under bench/.data/tasks/ and is the same each time it is made. `quick`: a few rows of each.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import sources
from harness import WORK

ADAPTED, HELD_OUT = 10_000, 500  # unlabelled reviews to go on with, and to judge by
LABELLED, DEV, TEST = 1000, 500, 5000  # labelled reviews
RATED, RATED_TEST = 3000, 2000  # labelled reviews whose stars count
ASKED, ASKED_DEV, ASKED_TEST = 4000, 400, 2000  # questions, for which of a paragraph's sentences answers them
LAW_CHARACTERS, LAW_DEV = 8_000_000, 60  # Chinese text, and documents held out of it
A_DOCUMENT = 8  # lines of news that make a document
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])")
QUICK = 40


def squad(quick: bool) -> dict[str, str]:
    """SQuAD 1.1: two of the 44 articles at hand are held out of the training part, to choose an epoch by."""
    parts = _articles()
    if quick:
        parts = {name: [{**some[0], "paragraphs": some[0]["paragraphs"][:4]}] for name, some in parts.items()}
    return {
        name: _write(f"squad-{name}{'-quick' if quick else ''}.json", json.dumps({"version": "1.1", "data": some}))
        for name, some in parts.items()
    }


def reviews_unlabelled(quick: bool) -> dict[str, str]:
    """IMDb's reviews without labels: to go on pretraining with, and held out."""
    some = list(_reviews("imdb/aclImdb-unsup.tar.gz", "train", "unsup"))
    random.Random(0).shuffle(some)
    counts = (2 * QUICK, QUICK) if quick else (ADAPTED, HELD_OUT)
    parts = {"train": some[: counts[0]], "dev": some[counts[0] : sum(counts)]}
    return {name: _rows(f"imdb-unlabelled-{name}", rows, quick) for name, rows in parts.items()}


def reviews_labelled(quick: bool) -> dict[str, str]:
    """A thousand labelled reviews to learn from, others to choose an epoch by, and part of the test reviews."""
    return _drawn("imdb-labelled", lambda row, stars: row, {"train": LABELLED, "dev": DEV, "test": TEST}, quick)


def reviews_rated(quick: bool) -> dict[str, str]:
    """Labelled reviews with the stars that came with them: 1 to 4 and 7 to 10."""
    counts = {"train": RATED, "dev": DEV, "test": RATED_TEST}
    return _drawn("imdb-rated", lambda row, stars: {**row, "label": stars}, counts, quick)


def _drawn(
    name: str, row_of: Callable[[dict[str, str], int], dict[str, Any]], counts: dict[str, int], quick: bool
) -> dict[str, str]:
    """Labelled reviews as rows, made of their texts and labels and of their stars; dev are rows of train that are left."""
    found = {}
    for split in ("train", "test"):
        some = [
            row_of(*one) for label in ("pos", "neg") for one in _rated("imdb/aclImdb-labelled.tar.gz", split, label)
        ]
        random.Random(0).shuffle(some)
        found[split] = some[: counts[split]]
        if split == "train":
            found["dev"] = some[counts["train"] : counts["train"] + counts["dev"]]
    return {split: _rows(f"{name}-{split}", rows[: QUICK if quick else None], quick) for split, rows in found.items()}


def answering_sentences(quick: bool) -> dict[str, str]:
    """SQuAD 1.1 as a choice: a question, and the sentences of its paragraph, one of which holds the answer. Articles are
    held out whole."""
    counts, found = {"train": ASKED, "dev": ASKED_DEV, "test": ASKED_TEST}, {}
    for name, articles in _articles().items():
        rows = [row for article in articles for row in _choices(article)]
        random.Random(0).shuffle(rows)
        found[name] = _rows(f"squad-sentences-{name}", rows[: QUICK if quick else counts[name]], quick)
    return found


def _articles() -> dict[str, list[dict[str, Any]]]:
    """SQuAD 1.1's articles; two of those at hand for training are held out of it."""
    whole = json.loads(_text("squad1/train-part-du-test.json.gz"))["data"]
    return {"train": whole[2:], "dev": whole[:2], "test": json.loads(_text("squad1/dev-v1.1.json.gz"))["data"]}


def _choices(article: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for paragraph in article["paragraphs"]:
        ends = [m.start() for m in SENTENCE.finditer(paragraph["context"])]
        spans = list(zip([0, *ends], [*ends, len(paragraph["context"])], strict=True))
        sentences = [paragraph["context"][start:end].strip() for start, end in spans]
        for item in paragraph["qas"]:
            first, text = item["answers"][0]["answer_start"], item["answers"][0]["text"]
            right = [n for n, (start, end) in enumerate(spans) if start <= first and first + len(text) <= end]
            if len(sentences) > 1 and right and len(set(sentences)) == len(sentences):
                yield {"text": item["question"], "choices": sentences, "label": right[0]}


def chinese_texts(quick: bool) -> dict[str, str]:
    """Statutes, and the lines of CLUENER's training part: documents for pretraining."""
    laws: list[str] = []
    with tarfile.open(sources.data_root() / "zh-laws-text/laws-md.tar.gz") as archive:
        members = [m for m in archive if m.isfile() and m.name.endswith(".md")]
        random.Random(0).shuffle(members)
        left = 200_000 if quick else LAW_CHARACTERS
        for member in members:
            file = archive.extractfile(member)
            lines = (line.strip() for line in io.TextIOWrapper(file, "utf-8")) if file else iter(())
            text = "\n".join(line for line in lines if line and not line.startswith(("#", "<!--", "---")))
            if len(text) < 200:
                continue
            laws.append(text)
            left -= len(text)
            if left <= 0:
                break
    news = [json.loads(line)["text"] for line in _lines("zh-cluener/train.jsonl.gz")]
    news = news[: 20 * A_DOCUMENT] if quick else news
    joined = ["\n".join(news[i : i + A_DOCUMENT]) for i in range(0, len(news), A_DOCUMENT)]
    held = 4 if quick else LAW_DEV
    parts = {"train": laws[held:] + joined[held:], "dev": laws[:held] + joined[:held]}
    return {name: _rows(f"zh-texts-{name}", ({"text": t} for t in texts), quick) for name, texts in parts.items()}


def chinese_reviews(quick: bool) -> dict[str, str]:
    """ChnSentiCorp out of its zip, as objects a line."""
    found = {}
    with zipfile.ZipFile(sources.data_root() / "zh-chnsenticorp/chnsenticorp.zip") as archive:
        for split in ("train", "dev", "test"):
            lines = archive.read(f"{split}.tsv").decode("utf-8-sig").replace("\r", "").split("\n")[1:]
            rows = [dict(zip(("label", "text"), line.split("\t", 1), strict=True)) for line in lines if "\t" in line]
            found[split] = _rows(f"chnsenticorp-{split}", rows[: QUICK if quick else None], quick)
    return found


def chinese_entities(quick: bool) -> dict[str, str]:
    """CLUENER: its dev rows are the test, for its test rows have no labels; a tenth of train is held out."""
    train = _lines("zh-cluener/train.jsonl.gz")
    random.Random(0).shuffle(train)
    test = _lines("zh-cluener/dev.jsonl")
    parts = {"train": train[len(train) // 10 :], "dev": train[: len(train) // 10], "test": test}
    if quick:
        parts = {name: lines[:QUICK] for name, lines in parts.items()}
    end = "-quick" if quick else ""
    return {name: _write(f"cluener-{name}{end}.jsonl", "\n".join(lines) + "\n") for name, lines in parts.items()}


def chinese_vocabulary() -> str:
    """A folder with bert-base-chinese's vocabulary as transformers reads it."""
    vocabulary = sources.data_root().parent / "models/tokenizers-bert/bert-base-chinese/vocab.txt"
    if not vocabulary.is_file():
        raise SystemExit(f"{vocabulary}: no such file; it is BERT's Chinese vocabulary, beside the data sets' folder")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 512}
    _write("zh-vocabulary/tokenizer_config.json", json.dumps(settings))
    return str(Path(_write("zh-vocabulary/vocab.txt", vocabulary.read_text(encoding="utf-8"))).parent)


def entity_words(quick: bool) -> dict[str, str]:
    """UD English EWT as words and tags, for both sides of a comparison of speeds."""
    rows: list[dict[str, Any]] = []
    words: list[str] = []
    tags: list[str] = []
    for line in _text("ud-en-ewt/en_ewt-ud-train.conllu.gz").split("\n"):
        cells = line.split("\t")
        if len(cells) == 10 and cells[0].isdecimal():
            words.append(cells[1])
            tags.append(cells[3])
        elif not line and words:
            rows.append({"text": words, "label": tags})
            words, tags = [], []
    return {
        "train": _rows("ewt-words", rows[: 4 * QUICK if quick else None], quick),
        "dev": _rows("ewt-dev", rows[:32], quick),
    }


def questions(quick: bool) -> dict[str, str]:
    """SQuAD's training part as one object a line, for both sides of a comparison of speeds."""
    found = []
    for article in json.loads(_text("squad1/train-part-du-test.json.gz"))["data"]:
        for paragraph in article["paragraphs"]:
            for item in paragraph["qas"]:
                answers = [{"text": a["text"], "answer_start": a["answer_start"]} for a in item["answers"]]
                found.append(
                    {
                        "id": item["id"],
                        "question": item["question"],
                        "context": paragraph["context"],
                        "answers": answers,
                    }
                )
    random.Random(0).shuffle(found)
    return {
        "train": _rows("squad-lines", found[: 2 * QUICK if quick else None], quick),
        "dev": _rows("squad-lines-dev", found[:32], quick),
    }


def running_text(quick: bool) -> dict[str, str]:
    """Unlabelled reviews, for both sides of a comparison of speeds."""
    train = reviews_unlabelled(quick)["train"]
    some = [json.loads(line) for line in Path(train).read_text(encoding="utf-8").split("\n")[:16]]
    return {"train": train, "dev": _rows("imdb-few", some, quick)}


def _reviews(archive: str, split: str, kind: str) -> Iterator[dict[str, str]]:
    for row, _ in _rated(archive, split, kind):
        yield row


def _rated(archive: str, split: str, kind: str) -> Iterator[tuple[dict[str, str], int]]:
    """Reviews, and their stars, which are the last part of a file's name."""
    with tarfile.open(sources.data_root() / archive) as opened:
        for member in opened:
            parts = member.name.split("/")
            if len(parts) == 4 and parts[1:3] == [split, kind]:
                file = opened.extractfile(member)
                if file is not None:
                    text = file.read().decode("utf-8").replace("<br />", "\n")
                    stars = int(Path(parts[3]).stem.rpartition("_")[2])
                    yield {"text": text} if kind == "unsup" else {"text": text, "label": kind}, stars


def _text(name: str) -> str:
    path = sources.data_root() / name
    with gzip.open(path, "rt", encoding="utf-8") if name.endswith(".gz") else path.open(encoding="utf-8") as file:
        return file.read()


def _lines(name: str) -> list[str]:
    return [line for line in _text(name).split("\n") if line]


def _rows(name: str, rows: Any, quick: bool) -> str:
    return str(sources.write_jsonl(rows, f"tasks/rows/{name}{'-quick' if quick else ''}.jsonl"))


def _write(name: str, text: str) -> str:
    path = WORK / "tasks" / "rows" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return str(path)
