"""transformers' Trainer on tokens, answers and hidden words, as its examples for these tasks prepare the rows.

Runs in the peer's environment and imports nothing of this repository. The argument is one JSON object, the last line
printed is one. Keys: kind (tagging, answering, mlm), model, train, max_length, seed, threads, folder, arguments (for
TrainingArguments), doc_stride and pad_to_max_length (answering); warmup_steps and window_steps for the speed over a
window of steps, or test and answers (a file to write), n_best_size and max_answer_length for answers to questions.
Rows: tagging {text: [words], label: [tags]}, mlm {text}, answering {id, question, context, answers} or SQuAD's json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

KINDS = {"tagging": "AutoModelForTokenClassification", "answering": "AutoModelForQuestionAnswering"}
KINDS |= {"mlm": "AutoModelForMaskedLM"}


def main() -> None:
    spec = json.loads(sys.argv[1])

    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    transformers.set_seed(spec["seed"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"])
    make = {"tagging": tagging, "answering": answering, "mlm": language}[spec["kind"]]
    examples, pad, settings = make(spec, tokenizer)
    model = getattr(transformers, KINDS[spec["kind"]]).from_pretrained(spec["model"], **settings)
    tokens: list[int] = []

    def collate(features: list[dict[str, Any]]) -> Any:
        tokens.append(sum(sum(feature["attention_mask"]) for feature in features))
        return pad(features)

    arguments = transformers.TrainingArguments(
        output_dir=spec["folder"], seed=spec["seed"], disable_tqdm=True, **spec["arguments"]
    )
    clock = stopwatch()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[clock]
    )
    began = time.perf_counter()
    trainer.train()
    found: dict[str, Any] = {"seconds": time.perf_counter() - began, "threads": torch.get_num_threads()}
    if "answers" in spec:
        given = answer(spec, tokenizer, model)
        Path(spec["answers"]).write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")
    else:
        first, last = spec["warmup_steps"], spec["warmup_steps"] + spec["window_steps"]
        window = clock.ended[last - 1] - clock.ended[first - 1]
        # One worker collates in the order of the steps, so that entry k is the k-th step's.
        found |= {"tokens": sum(tokens[first:last]), "seconds": window, "steps": last - first}
    print(json.dumps(found))


def stopwatch() -> Any:
    """A callback with the time at which every optimizer step ended."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.ended: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())

    return Stopwatch()


def tagging(spec: dict[str, Any], tokenizer: Any) -> tuple[list[dict[str, Any]], Any, dict[str, Any]]:
    """A word's first token has its tag, the others none."""
    from transformers import DataCollatorForTokenClassification

    rows = lines(spec["train"])
    names = sorted({tag for row in rows for tag in row["label"]})
    number = {name: i for i, name in enumerate(names)}
    found = tokenizer(
        [row["text"] for row in rows], is_split_into_words=True, truncation=True, max_length=spec["max_length"]
    )
    examples = []
    for i, row in enumerate(rows):
        words = found.word_ids(i)
        first = [w is not None and (k == 0 or words[k - 1] != w) for k, w in enumerate(words)]
        labels = [number[row["label"][w]] if new else -100 for w, new in zip(words, first, strict=True)]
        examples.append({**{key: values[i] for key, values in found.items()}, "labels": labels})
    return examples, DataCollatorForTokenClassification(tokenizer), {"num_labels": len(names)}


def answering(spec: dict[str, Any], tokenizer: Any) -> tuple[list[dict[str, Any]], Any, dict[str, Any]]:
    """Windows of a context that share `doc_stride` tokens; one without the answer points to its first token."""
    from transformers import DataCollatorWithPadding, default_data_collator

    rows = questions(spec["train"])
    windows = windowed(spec, tokenizer, rows)
    examples = []
    for i, row in enumerate(windows["overflow_to_sample_mapping"]):
        offsets, parts = windows["offset_mapping"][i], windows.sequence_ids(i)
        gold = rows[row]["answers"][0]
        begins, ends = gold["answer_start"], gold["answer_start"] + len(gold["text"])
        inside = [k for k, part in enumerate(parts) if part == 1]
        start = end = 0
        if inside and offsets[inside[0]][0] <= begins and offsets[inside[-1]][1] >= ends:
            start = max(k for k in inside if offsets[k][0] <= begins)
            end = min(k for k in inside if offsets[k][1] >= ends)
        inputs = {key: windows[key][i] for key in ("input_ids", "attention_mask", "token_type_ids") if key in windows}
        examples.append({**inputs, "start_positions": start, "end_positions": end})
    return examples, default_data_collator if spec.get("pad_to_max_length") else DataCollatorWithPadding(tokenizer), {}


def language(spec: dict[str, Any], tokenizer: Any) -> tuple[list[dict[str, Any]], Any, dict[str, Any]]:
    """All texts one after the other, cut into blocks of the same length; tokens are hidden anew each time."""
    from transformers import DataCollatorForLanguageModeling

    found = tokenizer([row["text"] for row in lines(spec["train"])])["input_ids"]
    flat = [token for ids in found for token in ids]
    length = spec["max_length"]
    blocks = [flat[i : i + length] for i in range(0, len(flat) // length * length, length)]
    examples = [{"input_ids": block, "attention_mask": [1] * length} for block in blocks]
    return examples, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15), {}


def answer(spec: dict[str, Any], tokenizer: Any, model: Any) -> dict[str, str]:
    """The best span of each question: of the likeliest starts and ends, the pair with the highest sum."""
    import numpy as np
    import torch

    rows = questions(spec["test"])
    windows = windowed({**spec, "pad_to_max_length": False}, tokenizer, rows)
    owners = windows["overflow_to_sample_mapping"]
    order = sorted(range(len(owners)), key=lambda i: len(windows["input_ids"][i]))
    best: dict[int, tuple[float, str]] = {}
    model.eval()
    for at in range(0, len(order), 32):
        some = order[at : at + 32]
        keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in windows]
        inputs = tokenizer.pad([{key: windows[key][i] for key in keys} for i in some], return_tensors="pt")
        with torch.inference_mode():
            output = model(**inputs)
        starts, ends = output.start_logits.float().numpy(), output.end_logits.float().numpy()
        for k, i in enumerate(some):
            offsets, parts = windows["offset_mapping"][i], windows.sequence_ids(i)
            likely = [np.argsort(-scores[k, : len(parts)])[: spec["n_best_size"]] for scores in (starts, ends)]
            for s in likely[0]:
                for e in likely[1]:
                    if parts[s] == parts[e] == 1 and s <= e < s + spec["max_answer_length"]:
                        score = float(starts[k, s] + ends[k, e])
                        if owners[i] not in best or score > best[owners[i]][0]:
                            text = rows[owners[i]]["context"][offsets[s][0] : offsets[e][1]]
                            best[owners[i]] = score, text
    return {row["id"]: best[i][1] if i in best else "" for i, row in enumerate(rows)}


def windowed(spec: dict[str, Any], tokenizer: Any, rows: list[dict[str, Any]]) -> Any:
    return tokenizer(
        [row["question"].lstrip() for row in rows],
        [row["context"] for row in rows],
        truncation="only_second",
        max_length=spec["max_length"],
        stride=spec["doc_stride"],
        padding="max_length" if spec.get("pad_to_max_length") else False,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def questions(path: str) -> list[dict[str, Any]]:
    if not path.endswith(".json"):
        return lines(path)
    articles = json.loads(Path(path).read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    return [{**item, "context": paragraph["context"]} for paragraph in paragraphs for item in paragraph["qas"]]


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


if __name__ == "__main__":
    main()
