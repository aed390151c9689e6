"""Regraft's feature pass over rows: sentences a second, embeddings kept for comparison.

The argument is one JSON object, the last line printed is one. Keys: config (of a frozen run), rows (jsonl), embeddings
(file to write, .npy). Loading, and a first small pass, lie before the measured window.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    spec = json.loads(sys.argv[1])

    import numpy as np

    from regraft.engine.config import parse_config
    from regraft.engine.features.extract import Encoder
    from regraft.engine.features.spec import feature_spec

    config = parse_config(spec["config"])
    encoder = Encoder(config, *feature_spec(config))
    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text(encoding="utf-8").split("\n") if line]
    encoder(texts[:64])
    began = time.perf_counter()
    _, found = encoder(texts)
    seconds = time.perf_counter() - began
    np.save(spec["embeddings"], found[:, 0].numpy())
    print(json.dumps({"sentences": len(texts), "seconds": seconds, "packed": encoder.running.packed}))


if __name__ == "__main__":
    main()
