"""Sentences a second of optimum's ONNX Runtime model, exported by optimum itself from the trained Hugging Face folder.

Runs in the peer's environment and imports nothing of this repository. The argument is one JSON object, the last line
printed is one. Keys: model (the Hugging Face folder), work (where the exported model is kept), rows (jsonl, in the
order to answer them), batch, passes, threads, max_length.
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
    from optimum.onnxruntime import ORTModelForSequenceClassification
    from transformers import PreTrainedTokenizerFast

    exported = Path(spec["work"])
    if not (exported / "model.onnx").is_file():
        ORTModelForSequenceClassification.from_pretrained(spec["model"], export=True).save_pretrained(exported)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = spec["threads"]
    model = ORTModelForSequenceClassification.from_pretrained(exported, session_options=options)
    # By file: the folder's settings name a class that this older transformers does not know.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(spec["model"]) / "tokenizer.json"),
        pad_token="[PAD]",
        model_max_length=spec["max_length"],
    )
    texts = [json.loads(line)["text"] for line in Path(spec["rows"]).read_text(encoding="utf-8").split("\n") if line]
    batches = [texts[i : i + spec["batch"]] for i in range(0, len(texts), spec["batch"])]

    def answer(batch: list[str]) -> np.ndarray:
        return model(**tokenizer(batch, padding=True, truncation=True, return_tensors="np")).logits

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
