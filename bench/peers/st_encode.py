"""sentence-transformers' `encode` over rows: sentences a second at a batch size, or at the best of several.

Runs in the peer's environment and imports nothing of this repository. The argument is one JSON object, the last line
printed is one. Keys: model, rows (jsonl), batch_sizes (the first rows try all, the best one runs), try_rows, threads,
precision (fp32 or bf16), embeddings (file to write, .npy).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    spec = json.loads(sys.argv[1])

    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(spec["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SentenceTransformer(spec["model"], device=device)
    if spec["precision"] == "bf16":
        model = model.to(torch.bfloat16)
    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text(encoding="utf-8").split("\n") if line]

    def encode(some: list[str], batch: int) -> tuple[float, np.ndarray]:
        began = time.perf_counter()
        found = model.encode(some, batch_size=batch, show_progress_bar=False, normalize_embeddings=True)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, found

    encode(texts[:64], 32)
    tried = {batch: encode(texts[: spec["try_rows"]], batch)[0] for batch in spec["batch_sizes"]}
    best = min(tried, key=tried.__getitem__)
    seconds, found = encode(texts, best)
    np.save(spec["embeddings"], found.astype(np.float32))
    print(json.dumps({"sentences": len(texts), "seconds": seconds, "batch_size": best, "tried": tried}))


if __name__ == "__main__":
    main()
