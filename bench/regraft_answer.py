"""Sentences a second of a bundle in Regraft's own session, without a server.

The argument is one JSON object, the last line printed is one. Keys: folder (the bundle), rows (jsonl, in the order to
answer them), batch, passes, threads.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    spec = json.loads(sys.argv[1])

    from regraft.serve.session import Session

    session = Session(spec["folder"], threads=spec["threads"])
    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text(encoding="utf-8").split("\n") if line]
    batches = [texts[i : i + spec["batch"]] for i in range(0, len(texts), spec["batch"])]
    for batch in batches[: max(1, 64 // spec["batch"])]:
        session.run(session.tokenize(batch))
    began = time.perf_counter()
    for _ in range(spec["passes"]):
        logits = [session.run(session.tokenize(batch)) for batch in batches]
    seconds = time.perf_counter() - began
    predicted = np.concatenate(logits).argmax(axis=1).tolist()
    print(json.dumps({"sentences": spec["passes"] * len(texts), "seconds": seconds, "predicted": predicted}))


if __name__ == "__main__":
    main()
