"""Whole training steps on a GPU, real tokens a second: Regraft, transformers' Trainer as it comes and at its best.

BERT-base and -large sizes with random weights (speed does not ask for good ones) over rows of random tokens whose
lengths are drawn like SST-2's or SQuAD's, or are all 512. Every turn is a fresh process.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import machine
from harness import Claim, Run, Target, TurnFailed, arguments, publish, run

CLAIM = Claim("train_gpu", "Fine-tuning BERT on one GPU: real tokens a second over whole optimizer steps", "tokens/s")
SIZES = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096), "tiny": (32, 2, 2, 64)}
VOCABULARY = 30522
TOKEN_BUDGET = 65536
SECONDS = 260.0  # for all turns: none is started after this, and none lasts longer


@dataclass(frozen=True)
class Case:
    """`lengths`: sst2, squad or 512. `at_least`, `at_least_best`: promised ratios to Trainer as it comes, at its best."""

    size: str
    lengths: str
    batch_size: int
    compiled: bool
    at_least: float | None = None
    at_least_best: float | None = None
    steps: int = 30
    warm_up: int = 12


CASES = {
    "base, SST-2 lengths, 32 a step": Case("base", "sst2", 32, True, at_least=5.0),
    "base, SST-2 lengths, 512 a step": Case("base", "sst2", 512, True, at_least_best=3.0),
    "base, SQuAD lengths, 32 a step": Case("base", "squad", 32, True, at_least_best=1.8),
    "base, 512 tokens, 32 a step": Case("base", "512", 32, False),
    "large, SQuAD lengths, 32 a step": Case("large", "squad", 32, False),
    "large, 512 tokens, 32 a step": Case("large", "512", 32, False),
}
QUICK = {"tiny": Case("tiny", "sst2", 8, False, at_least=5.0, steps=3, warm_up=1)}


def main() -> None:
    if sys.argv[1:2] == ["--turn"]:
        print(json.dumps(take_turn(json.loads(sys.argv[2]))))
        return
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--device", default="cuda", help="cpu: tiny, to see that it runs")
    options = parser.parse_args()
    options.quick = options.quick or options.device == "cpu"
    chosen = QUICK if options.quick else CASES
    before = machine.facts()
    began = time.perf_counter()
    runs: list[Run] = []
    settings: dict[str, Any] = {name: asdict(case) for name, case in chosen.items()}
    for number in range(options.rounds):
        for name, case in chosen.items():
            for who in ("regraft", "trainer", "trainer-best"):
                left = SECONDS - (time.perf_counter() - began)
                if left < 10:
                    settings[name].setdefault("left out for time", []).append(who)
                    continue
                spec = {"who": who, "device": options.device, "seed": number, **asdict(case)}
                try:
                    found = turn_of(spec, options.threads, min(150.0, left))
                except TurnFailed as error:
                    settings[name].setdefault("failed", {})[who] = str(error)[-400:]
                    print(f"{name}: {who} failed: {str(error)[-400:]}", file=sys.stderr, flush=True)
                    continue
                runs.append(Run(name, who, number, found["tokens"] / found["seconds"], found))
                print(f"{name}: {who} {runs[-1].value:,.0f} tokens/s", file=sys.stderr, flush=True)

    def targets(cases: Mapping[str, Any]) -> list[Target]:
        found = []
        for name, summary in cases.items():
            for who, least in (("trainer", chosen[name].at_least), ("trainer-best", chosen[name].at_least_best)):
                if least is not None and who in summary["ratios"]:
                    found.append(Target(f"regraft / {who} on {name}", summary["ratios"][who], at_least=least))
            share = [r["details"].get("matrix_share") for r in summary["runs"] if r["who"] == "regraft"]
            if name.startswith("base, 512") and share and share[0]:
                found.append(Target(f"share of the matrix ceiling on {name}", share[0], at_least=0.55))
        return found

    versions = {"all": {name: version_of(name) for name in ("torch", "triton", "transformers", "accelerate")}}
    publish(CLAIM, runs, options, versions=versions, settings=settings, targets=targets, before=before)


def turn_of(spec: Mapping[str, Any], threads: int, seconds: float) -> dict[str, Any]:
    from harness import last_line

    command = [sys.executable, __file__, "--turn", json.dumps(spec)]
    return json.loads(last_line(run(command, threads=threads, timeout=seconds), "train_gpu.py"))


def version_of(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


# ---- one turn -----------------------------------------------------------------------------------------------------


def take_turn(spec: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    torch.manual_seed(spec["seed"])
    rows = draw_rows(spec, (spec["steps"] + spec["warm_up"] + 2) * spec["batch_size"])
    found = regraft_turn(spec, rows) if spec["who"] == "regraft" else trainer_turn(spec, rows)
    if spec["device"] != "cpu":
        found["peak_memory_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["matrix_share"] = found["flops"] / found["seconds"] / matrix_ceiling()
    return found


def draw_rows(spec: Mapping[str, Any], count: int) -> list[Any]:
    """Token ids of every row. SST-2's training rows: mean 13.4 tokens; SQuAD's, question and passage: mean about 160."""
    import numpy as np

    draw = np.random.default_rng(spec["seed"])
    if spec["lengths"] == "512":
        lengths = np.full(count, 512)
    else:
        median, spread, low, high = {"sst2": (10.5, 0.65, 3, 66), "squad": (150.0, 0.38, 30, 384)}[spec["lengths"]]
        lengths = np.clip(np.round(np.exp(draw.normal(np.log(median), spread, count))), low, high).astype(int)
    return [draw.integers(1000, VOCABULARY, n) for n in lengths]


def build(spec: Mapping[str, Any]) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    width, layers, heads, inner = SIZES[spec["size"]]
    shape = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=2, **shape)).to(spec["device"])


def flops_of(spec: Mapping[str, Any], lengths: list[int], *, first_rows: bool = False) -> float:
    """Of the matrix products of forward and backward over real tokens. `first_rows`: of the last layer only what the
    head's rows take, one a sequence: keys and values of all tokens, everything else of the first."""
    width, layers, _, inner = SIZES[spec["size"]]
    tokens, rows = sum(lengths), len(lengths)
    both = 2 * 2 * width * width  # keys and values; queries and output are as many
    rest = both + 2 * 2 * width * inner
    full = (both + rest) * tokens + 4 * width * sum(n * n for n in lengths)
    last = both * tokens + rest * rows + 4 * width * tokens if first_rows else full
    return 3.0 * ((layers - 1) * full + last)


def matrix_ceiling() -> float:
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (start.elapsed_time(end) / 1e3)


def regraft_turn(spec: Mapping[str, Any], rows: list[Any]) -> dict[str, Any]:
    """The engine's own step: packed, fused modules, one graph a bucket, clipping and AdamW as another."""
    import torch

    from regraft.engine.fast_gpu import bind_fused
    from regraft.engine.models import RunningModel, last_layer
    from regraft.engine.packing import pack, split_by_tokens
    from regraft.engine.training.captured_optimizer import CapturedOptimizer
    from regraft.engine.training.graphed import GraphedGradients, why_not_graphed

    cuda = spec["device"] != "cpu"
    running = RunningModel(build(spec), pad_token_id=0)
    running.run_packed()
    running.use_kernels()
    bound = running.bound if cuda else bind_fused(running)
    last = last_layer(running.model)
    skips = last is not None and "forward" in vars(last)
    running.train()
    reason = why_not_graphed(running, precision="bf16", kernels="auto", capturable=cuda)
    if reason is not None:
        raise RuntimeError(f"Regraft's steps are not captured: {reason}")
    parameters = list(running.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.01, fused=True)
    autocast = (lambda: torch.autocast("cuda", torch.bfloat16, cache_enabled=True)) if cuda else nullcontext

    def loss(logits: Any, targets: Any, weights: Any) -> Any:
        return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()

    graphed = GraphedGradients(running, loss, parameters, autocast=autocast, capture=cuda)

    update = CapturedOptimizer(optimizer, parameters, 1.0, capture=cuda)
    size = spec["batch_size"]
    ahead: dict[int, list[Any]] = {}

    def batches(number: int) -> list[Any]:
        chosen = rows[number * size : (number + 1) * size]
        return [pack([chosen[i] for i in part]) for part in split_by_tokens([len(r) for r in chosen], TOKEN_BUDGET)]

    def step(number: int) -> int:
        lost = torch.zeros((), dtype=torch.float64, device=spec["device"])
        made = ahead.pop(number, None) or batches(number)
        for batch in made:
            ones = torch.ones(batch.sequences)
            lost += graphed(batch, ones.long(), ones, factor=1 / size, seed=number)
        update(lost)
        ahead.clear()
        ahead[number + 1] = batches(number + 1)  # as the engine does, while the device works
        if not all(map(math.isfinite, update.report())):
            raise RuntimeError("loss or gradient is not finite")
        return sum(batch.tokens for batch in made)

    # Buckets are captured when they are first met: the window's own rows go through once before it is measured.
    first = spec["warm_up"]
    window = range(first, first + spec["steps"])
    for number in [*range(first), *window]:
        step(number)
    synchronise(spec)
    began = time.perf_counter()
    tokens = sum(step(number) for number in window)
    synchronise(spec)
    seconds = time.perf_counter() - began
    lengths = [len(r) for n in window for r in rows[n * spec["batch_size"] : (n + 1) * spec["batch_size"]]]
    return {
        "tokens": tokens, "seconds": seconds, "flops": flops_of(spec, lengths, first_rows=skips), "buckets": len(graphed.seen),
        "graphs": sum(s.graph is not None for s in graphed.seen.values()), "not captured": graphed.reason or update.reason, "bound": bound,
        "last layer for first rows": skips,
        "launches_a_step": launches(lambda: step(first)) if cuda else None,
    }  # fmt: skip


def trainer_turn(spec: Mapping[str, Any], rows: list[Any]) -> dict[str, Any]:
    """Trainer with its defaults; at its best with bf16, grouping by length and, where the case says so, torch.compile."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    best = spec["who"] == "trainer-best"
    changes: dict[str, Any] = {}
    if best:
        changes = {"train_sampling_strategy": "group_by_length", "bf16": True, "torch_compile": spec["compiled"]}
    if spec["device"] == "cpu":
        changes |= {"use_cpu": True, "bf16": False}

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"input_ids": rows[index].tolist(), "labels": 1}

    seen: list[int] = []

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(i["input_ids"]) for i in items)
        ids = torch.tensor([i["input_ids"] + [0] * (longest - len(i["input_ids"])) for i in items])
        seen.append([len(i["input_ids"]) for i in items])  # type: ignore[arg-type]
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.ones(len(items)).long()}

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step in (spec["warm_up"], spec["warm_up"] + spec["steps"]):
                synchronise(spec)
                self.began, self.ended = self.ended, time.perf_counter()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=spec["batch_size"], max_steps=spec["warm_up"] + spec["steps"],
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", seed=spec["seed"], **changes,
        )  # fmt: skip
        Trainer(build(spec), settings, train_dataset=Rows(), data_collator=collate, callbacks=[clock]).train()
    lengths = [n for batch in seen[spec["warm_up"] : spec["warm_up"] + spec["steps"]] for n in batch]  # type: ignore[attr-defined]
    return {
        "tokens": sum(lengths),
        "seconds": clock.ended - clock.began,
        "flops": flops_of(spec, lengths),
        "settings": changes,
    }


def synchronise(spec: Mapping[str, Any]) -> None:
    if spec["device"] != "cpu":
        import torch

        torch.cuda.synchronize()


def launches(step: Any) -> int:
    """Kernels and graphs that the host launches in one step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    return sum(e.count for e in found.key_averages() if "LaunchKernel" in e.key or "GraphLaunch" in e.key)


if __name__ == "__main__":
    main()
