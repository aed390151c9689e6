"""SetFit's own package on a few rows a class: accuracy on test rows and seconds.

Runs in the peer's environment and imports nothing of this repository. The argument is one JSON object, the last line
printed is one. Keys: model, train, test (jsonl), seed, threads, iterations, batch_size.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main() -> None:
    spec = json.loads(sys.argv[1])

    import torch
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    torch.set_num_threads(spec["threads"])
    rows = {name: [json.loads(x) for x in Path(spec[name]).read_text().split("\n") if x] for name in ("train", "test")}
    labels = sorted({row["label"] for row in rows["train"]})
    train = Dataset.from_list([{"text": r["text"], "label": labels.index(r["label"])} for r in rows["train"]])
    model = SetFitModel.from_pretrained(str(spec["model"]))
    arguments = TrainingArguments(
        batch_size=spec["batch_size"],
        num_iterations=spec["iterations"],
        num_epochs=1,
        seed=spec["seed"],
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    predicted = [int(p) for p in model.predict([row["text"] for row in rows["test"]])]
    right = sum(labels[p] == row["label"] for p, row in zip(predicted, rows["test"], strict=True))
    print(json.dumps({"accuracy": right / len(predicted), "seconds": seconds}))


if __name__ == "__main__":
    main()
