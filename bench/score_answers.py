"""Exact match and F1 of answers by SQuAD's official rules, whoever gave them, as shares of 1.

The argument is one JSON object, the last line printed is one. Keys: answers (JSON of id to text), rows (SQuAD's json).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    spec = json.loads(sys.argv[1])

    from regraft.engine.tasks.squad_metrics import judge

    given = json.loads(Path(spec["answers"]).read_text(encoding="utf-8"))
    articles = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))["data"]
    items = [item for article in articles for paragraph in article["paragraphs"] for item in paragraph["qas"]]
    judged = [judge("english", given.get(item["id"], ""), [a["text"] for a in item["answers"]]) for item in items]
    exact, f1 = (sum(column) / len(items) for column in zip(*judged, strict=True))
    print(json.dumps({"exact_match": exact, "f1": f1}))


if __name__ == "__main__":
    main()
