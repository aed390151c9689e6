"""One run of transformers' Trainer: its speed over a window of steps, or the model it ends with.

Runs in the peer's environment and imports nothing of this repository. The argument is one JSON object, the last line
printed is one. Keys: model, train, dev (jsonl with text, text_pair, label), max_length, seed, threads, folder,
arguments (for TrainingArguments), lora (for peft's LoraConfig), warmup_steps and window_steps (speed), save (folder for the best model).
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    spec = json.loads(sys.argv[1])

    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    torch.set_num_threads(spec["threads"])
    set_seed(spec["seed"])
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    train = read(spec["train"])
    labels = sorted({row["label"] for row in train})
    number = {label: i for i, label in enumerate(labels)}
    examples = encode(train, tokenizer, number, spec["max_length"])
    model = AutoModelForSequenceClassification.from_pretrained(
        spec["model"], num_labels=len(labels), id2label=dict(enumerate(labels)), label2id=number
    )
    if "lora" in spec:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **spec["lora"]))
    tokens: list[int] = []
    pad = DataCollatorWithPadding(tokenizer)

    def collate(features: list[dict[str, Any]]) -> Any:
        tokens.append(sum(len(feature["input_ids"]) for feature in features))
        return pad(features)

    saving = spec.get("save")
    dev = encode(read(spec["dev"]), tokenizer, number, spec["max_length"]) if saving else None
    arguments = TrainingArguments(output_dir=spec["folder"], seed=spec["seed"], disable_tqdm=True, **spec["arguments"])
    clock = stopwatch()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=dev,
        data_collator=pad if saving else collate,
        compute_metrics=accuracy if saving else None,
        callbacks=[clock],
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    if saving:
        trainer.save_model(saving)  # the best one: load_best_model_at_end
        tokenizer.save_pretrained(saving)
        history = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
        print(json.dumps({"dev_accuracy_by_epoch": history, "seconds": seconds, "threads": torch.get_num_threads()}))
        return
    first, last = spec["warmup_steps"], spec["warmup_steps"] + spec["window_steps"]
    window = clock.ended[last - 1] - clock.ended[first - 1]
    print(
        json.dumps(
            {
                # One worker collates in the order of the steps, so that entry k is the k-th step's.
                "tokens": sum(tokens[first:last]),
                "seconds": window,
                "steps": last - first,
                "first_step_seconds": clock.wall[0] - spec["started"] if "started" in spec else None,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "threads": torch.get_num_threads(),
            }
        )
    )


def stopwatch() -> Any:
    """A callback with the time at which every optimizer step ended."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.ended: list[float] = []
            self.wall: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())
            self.wall.append(time.time())

    return Stopwatch()


def read(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def encode(rows: list[dict[str, Any]], tokenizer: Any, number: dict[str, int], max_length: int) -> list[dict[str, Any]]:
    """Token ids of all rows at once, with class numbers."""
    pairs = [row["text_pair"] for row in rows] if "text_pair" in rows[0] else None
    found = tokenizer([row["text"] for row in rows], pairs, truncation=True, max_length=max_length)
    return [{**{k: v[i] for k, v in found.items()}, "labels": number[row["label"]]} for i, row in enumerate(rows)]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(axis=-1) == prediction.label_ids).mean())}


if __name__ == "__main__":
    main()
