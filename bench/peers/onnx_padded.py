"""Sentences a second of a padded ONNX classifier in plain ONNX Runtime, as most servers would run it.

Runs in the peer's environment and imports nothing of this repository: every batch is padded to its longest text. The
argument is one JSON object, the last line printed is one. Keys: folder (model.onnx, tokenizer.json), rows (jsonl,
in the order to answer them), batch, passes, threads, max_length, pad_token_id.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    spec = json.loads(sys.argv[1])

    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    folder = Path(spec["folder"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(spec["max_length"])
    tokenizer.enable_padding(pad_id=spec["pad_token_id"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    wanted = {item.name for item in session.get_inputs()}
    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text(encoding="utf-8").split("\n") if line]
    batches = [texts[i : i + spec["batch"]] for i in range(0, len(texts), spec["batch"])]

    def answer(batch: list[str]) -> np.ndarray:
        found = tokenizer.encode_batch(batch)
        inputs = {
            "input_ids": np.array([item.ids for item in found], dtype=np.int64),
            "attention_mask": np.array([item.attention_mask for item in found], dtype=np.int64),
            "token_type_ids": np.array([item.type_ids for item in found], dtype=np.int64),
        }
        return session.run(None, {name: value for name, value in inputs.items() if name in wanted})[0]

    for batch in batches[: max(1, 64 // spec["batch"])]:
        answer(batch)
    began = time.perf_counter()
    for _ in range(spec["passes"]):
        logits = [answer(batch) for batch in batches]
    seconds = time.perf_counter() - began
    predicted = np.concatenate(logits).argmax(axis=1).tolist()
    print(json.dumps({"sentences": spec["passes"] * len(texts), "seconds": seconds, "predicted": predicted}))


if __name__ == "__main__":
    main()
