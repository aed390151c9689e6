"""Real data sets as rows, read with the standard library alone, for peers and for scoring.

Regraft reads the original files with its own reader wherever it can (`data_section`); what it learns from and what
a peer learns from are therefore read by two programs, and a row that one of them lost would show.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import ROOT, WORK

Row = dict[str, Any]  # text, label (str, float or list of str), and text_pair for pairs


def data_root() -> Path:
    """REGRAFT_DATA, or ../shared/data beside the repository. Raises SystemExit naming it where it is absent."""
    root = Path(os.environ.get("REGRAFT_DATA", ROOT.parent / "shared" / "data"))
    if not root.is_dir():
        raise SystemExit(
            f"{root}: no such folder; set REGRAFT_DATA to the folder that holds glue-sst2, imdb, banking77, ..."
        )
    return root


@dataclass(frozen=True)
class Source:
    """Where a data set lies and how it is written. Columns are header names, or numbers without a header."""

    files: dict[str, str]
    text: str | int
    label: str | int
    text_pair: str | int | None = None
    header: bool = True
    quoted: bool = False
    encoding: str = "utf-8"
    task: str = "classification"
    labels_file: str | None = None
    lines: bool = False  # "LABEL text" a line, which is no table

    def labels(self) -> list[str] | None:
        """Label names in order where the data set lists them: numbers in the data are places in that list."""
        return (data_root() / self.labels_file).read_text(encoding="utf-8").split() if self.labels_file else None


SOURCES = {
    "sst2": Source({"train": "glue-sst2/train.tsv.gz", "dev": "glue-sst2/dev.tsv"}, "sentence", "label"),
    "banking77": Source(
        {"train": "banking77/train.csv", "test": "banking77/test.csv"}, "text", "category", quoted=True
    ),
    "stsb": Source(
        {"train": "glue-stsb/train.tsv", "dev": "glue-stsb/dev.tsv"},
        "sentence1",
        "score",
        "sentence2",
        task="regression",
    ),
    "cola": Source({"train": "glue-cola/train.tsv", "dev": "glue-cola/dev.tsv"}, 3, 1, header=False),
    "rte": Source({"train": "glue-rte/train.tsv", "dev": "glue-rte/dev.tsv"}, "sentence1", "label", "sentence2"),
    "trec6": Source(
        {"train": "trec6/TREC.train.all", "test": "trec6/TREC.test.all"},
        "text",
        "label",
        encoding="latin-1",
        lines=True,
    ),
    "agnews": Source(
        {"train": "agnews-part/train-part10k.tsv.gz", "test": "agnews-part/test.tsv.gz"}, 0, 1, header=False
    ),
    "goemotions": Source(
        {"train": "goemotions/train.tsv.gz", "dev": "goemotions/dev.tsv", "test": "goemotions/test.tsv"},
        0,
        1,
        header=False,
        task="multilabel",
        labels_file="goemotions/labels.txt",
    ),
}


def read(name: str, split: str) -> list[Row]:
    """All rows of a split, in the file's order."""
    source = SOURCES[name]
    path = data_root() / source.files[split]
    with _open(path, source.encoding) as file:
        if source.lines:
            return [{"text": text.strip(), "label": label} for label, _, text in (line.partition(" ") for line in file)]
        quoting = csv.QUOTE_MINIMAL if source.quoted else csv.QUOTE_NONE
        table = csv.reader(file, delimiter="," if path.name.endswith(".csv") else "\t", quoting=quoting)
        place = {name: i for i, name in enumerate(next(table))} if source.header else {}
        column = lambda key: key if isinstance(key, int) else place[key]  # noqa: E731
        names = source.labels()
        return [_row(cells, source, column, names) for cells in table]


def _row(cells: list[str], source: Source, column: Any, names: list[str] | None) -> Row:
    label: Any = cells[column(source.label)]
    if source.task == "regression":
        label = float(label)
    elif source.task == "multilabel":
        label = [names[int(part)] if names else part for part in label.split(",")]
    row = {"text": cells[column(source.text)], "label": label}
    return row if source.text_pair is None else {**row, "text_pair": cells[column(source.text_pair)]}


def imdb(count: int, seed: int = 0) -> list[Row]:
    """`count` labelled training reviews, half of each class, shuffled with `seed`."""
    rows: list[Row] = []
    wanted = {"pos": count // 2, "neg": count - count // 2}
    with tarfile.open(data_root() / "imdb" / "aclImdb-labelled.tar.gz") as archive:
        for member in archive:
            parts = member.name.split("/")
            if len(parts) != 4 or parts[1] != "train" or not wanted.get(parts[2]):
                continue
            file = archive.extractfile(member)
            if file is not None:
                wanted[parts[2]] -= 1
                rows.append({"text": file.read().decode("utf-8"), "label": parts[2]})
            if not any(wanted.values()):
                break
    random.Random(seed).shuffle(rows)
    return rows


def sample(rows: list[Row], count: int | None, seed: int = 0) -> list[Row]:
    """`count` rows drawn with `seed`; all of them for None."""
    return rows if count is None or count >= len(rows) else random.Random(seed).sample(rows, count)


def write_jsonl(rows: Iterable[Row], name: str) -> Path:
    """Rows under bench/.data/, written whole; the same rows give the same file."""
    path = WORK / name
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")  # of two commands at once, each writes its own
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    beside.replace(path)
    return path


def data_section(name: str, *, limit: int | None = None) -> dict[str, Any]:
    """The `data` section of a Regraft run on the original files (TREC's lines, which are no table, as jsonl)."""
    source = SOURCES[name]
    section: dict[str, Any] = {} if limit is None else {"limit": limit}
    if source.lines:
        return section | {split: str(write_jsonl(read(name, split), f"{name}/{split}.jsonl")) for split in source.files}
    columns = {"text": source.text, "label": source.label}
    if source.text_pair is not None:
        columns["text_pair"] = source.text_pair
    return {
        **section,
        **{split: str(data_root() / file) for split, file in source.files.items()},
        "format": "csv" if source.quoted else "tsv",
        "header": source.header,
        "quoting": "standard" if source.quoted else "none",
        "columns": columns,
    }


def _open(path: Path, encoding: str) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline="\n")
    return path.open(encoding=encoding, newline="" if path.suffix == ".csv" else "\n")
