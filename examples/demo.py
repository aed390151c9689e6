"""`make demo`: fine-tune a real encoder on customer messages, export it, serve it, ask it, stop it.

Runs what a user runs: the `regraft` command and HTTP.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

from sklearn.metrics import accuracy_score, f1_score

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "examples/support.yaml"
MESSAGES = [
    "still waiting for my money from the toaster i sent back",
    "cant log in to cancel my subscription",
    "the parcel was due on tuesday, any news?",
    "You charged me twice for one kettle!!",
]


def regraft(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "regraft.engine", *arguments]


def say(line: str = "") -> None:
    print(line, flush=True)


def labels(split: str) -> list[str]:
    with (ROOT / "examples" / "support" / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return [row["label"] for row in csv.DictReader(file)]


def majority() -> dict[str, float]:
    started = time.perf_counter()
    most, _ = Counter(labels("train")).most_common(1)[0]
    true = labels("test")
    guesses = [most] * len(true)
    return {
        "accuracy": accuracy_score(true, guesses),
        "macro_f1": f1_score(true, guesses, average="macro"),
        "seconds": time.perf_counter() - started,
    }


def trained(title: str, run: str, *settings: str) -> dict[str, float]:
    say(f"\n== {title}")
    sets = [part for setting in (f"run={run}", *settings) for part in ("--set", setting)]
    subprocess.run(regraft("train", CONFIG, "--restart", *sets), cwd=ROOT, check=True)
    result = json.loads((ROOT / run / "run.json").read_text(encoding="utf-8"))["result"]
    return {**result["metrics"]["test"], "seconds": result["seconds"]}


def table(rows: dict[str, dict[str, float]]) -> None:
    say(f"\n{'132 test messages, 8 intents':32} accuracy  macro F1  seconds")
    for name, row in rows.items():
        say(f"{name:32} {row['accuracy']:8.3f}  {row['macro_f1']:8.3f}  {row['seconds']:7.1f}")


def ask(url: str) -> None:
    body = json.dumps({"inputs": MESSAGES, "top_k": 2}).encode()
    request = urllib.request.Request(f"{url}/predict", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        answers = json.load(reply)
    for message, answer in zip(MESSAGES, answers["predictions"], strict=True):
        scores = ", ".join(f"{name} {score:.2f}" for name, score in answer["scores"].items())
        say(f"  {message:58} {answer['label']:20} ({scores})")


def serve_and_ask(bundle: str) -> None:
    say(f"\n== regraft serve {bundle} --port 0")
    server = subprocess.Popen(regraft("serve", bundle, "--port", "0"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            say(line.rstrip())
            if line.startswith("ready on "):
                ask(line.removeprefix("ready on ").split()[0])
                break
    finally:
        server.terminate()
        code = server.wait(timeout=30)
    if code != 0:
        raise SystemExit(f"the server ended with {code}")
    say("server stopped")


def main() -> None:
    started = time.perf_counter()
    rows = {"majority class": majority()}
    frozen = ("method=frozen", "training.learning_rate=3e-3", "training.epochs=10")
    rows["frozen encoder, trained head"] = trained("frozen encoder, trained head", "runs/demo-frozen", *frozen)
    rows["fine-tuned"] = trained("fine-tuned", "runs/demo")
    table(rows)
    say("\n== regraft export runs/demo --to bundles/demo")
    subprocess.run(regraft("export", "runs/demo", "--to", "bundles/demo", "--force"), cwd=ROOT, check=True)
    serve_and_ask("bundles/demo")
    say(f"\ndone in {time.perf_counter() - started:.0f} s; the run's report: runs/demo/report.html")


if __name__ == "__main__":
    main()
