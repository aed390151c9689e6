"""Fixtures for every part: tiny models with real tokenizers, small data, and where the real data sets are."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Forks

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Kernels are tested on CPU by the interpreter of Triton, which reads this once, when it is imported. `make test-gpu` sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("REGRAFT_DATA", ROOT.parent / "shared" / "data"))
WORDS = [
    "good",
    "bad",
    "fine",
    "film",
    "plot",
    "slow",
    "sharp",
    "dull",
    "warm",
    "cold",
    "joke",
    "actor",
    "scene",
    "music",
    "long",
    "short",
    "story",
    "ending",
    "very",
    "not",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another run left in the user's cache."""
    monkeypatch.setenv("REGRAFT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random BERT, two layers of 32, with a WordPiece tokenizer over WORDS."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    folder.mkdir()
    pieces = [chr(c) for c in range(97, 123)] + [f"##{chr(c)}" for c in range(97, 123)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *pieces]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Labelled sentences a tiny model can learn: 'pos' where good words outnumber bad ones."""
    import random

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.randint(2, 14))
        score = sum(w in {"good", "fine", "sharp", "warm"} for w in words) - sum(
            w in {"bad", "dull", "cold", "slow"} for w in words
        )
        rows.append((" ".join(words), "pos" if score >= 0 else "neg"))
    return rows


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Write labelled sentences to a csv in the test's folder."""

    def write(name: str = "train.csv", count: int = 64, seed: int = 1) -> Path:
        path = tmp_path / name
        lines = ["text,label", *(f"{text},{label}" for text, label in sentences(count, seed))]
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


@pytest.fixture
def make_config(tmp_path: Path, tiny_model: Path, write_rows: Callable[..., Path]) -> Callable[..., Path]:
    """Write a run's YAML over the tiny model and 64 sentences; keyword arguments replace whole sections."""
    import yaml

    def make(name: str = "run.yaml", **sections: object) -> Path:
        values = {
            "run": str(tmp_path / "run"),
            "model": {"name": str(tiny_model)},
            "data": {"train": str(write_rows()), "dev": str(write_rows("dev.csv", 24, 2))},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "precision": "fp32"},
        }
        for key, value in sections.items():
            if isinstance(value, dict) and isinstance(values.get(key), dict):
                values[key] = {**values[key], **value}  # type: ignore[dict-item]
            else:
                values[key] = value  # type: ignore[assignment]
        path = tmp_path / name
        path.write_text(yaml.safe_dump(values))
        return path

    return make


FORKS = Forks()


def regraft(*arguments: object, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does, in a process of its own."""
    given = [str(argument) for argument in arguments]
    if options.keys() <= {"input", "cwd"} and FORKS.can_run():
        return FORKS.run(given, timeout=timeout, **options)
    command = [sys.executable, "-m", "regraft.engine", *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that need it are skipped where it is absent."""
    if not (DATA / "glue-sst2").is_dir():
        pytest.skip(f"real data sets are not here: {DATA} (set REGRAFT_DATA)")
    return DATA


@pytest.fixture
def full_disk(tmp_path):
    """A real file system of 1 MB, full but for a few KB: mounted, so the test is skipped where it may not be."""
    disk = FullDisk(tmp_path / "disk")
    yield disk
    subprocess.run(["umount", "-l", disk.path], check=True)  # lazily: what a test mapped may still be


class FullDisk:
    def __init__(self, path: Path) -> None:
        self.path, self._fill = path, path / "fill"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip(f"cannot mount a small file system here: {done.stderr.decode().strip()}")
        self.fill(leave=100_000)

    def fill(self, leave: int = 0) -> None:
        """Fill it up, but for about so many bytes."""
        with self._fill.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"0" * 4096)
        os.truncate(self._fill, max(0, self._fill.stat().st_size - leave))

    def make_room(self) -> None:
        self._fill.unlink()
        subprocess.run(["mount", "-o", "remount,size=50m", self.path], check=True)


@pytest.fixture
def any_precision():
    """A process has one precision, unless it is told to forget it."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def any_vendor(monkeypatch):
    """Products of fp32 in C wherever they can be computed, on processors too where torch's are as fast."""
    from regraft.kernels import linear_native

    monkeypatch.setattr(linear_native, "_by_intel", lambda: False)
    linear_native._form.cache_clear()
    yield
    linear_native._form.cache_clear()
