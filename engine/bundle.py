"""What is served: a folder with the graph, the tokenizer, the task and the proof that it answers like the model.

    bundle.json      everything below as `BundleInfo`
    model.onnx       the graph
    tokenizer.json   as the `tokenizers` package reads it
    labels and thresholds are in bundle.json; README.md says the same to a person

This file knows neither torch nor ONNX Runtime: the server and the exporter both read it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regraft.engine.errors import BundleError
from regraft.engine.files import file_sha256

FORMAT = 1


@dataclass(frozen=True)
class BundleInfo:
    """Content of bundle.json.

    layout 'packed': graph inputs int64 `input_ids [T]`, `position_ids [T]`, (`token_type_ids [T]` if
    `token_types`), `pad_index [B, L]` (row of each attention cell; 0 where the cell is padding), `token_index [T]`
    (b * L + l of each token), `lengths [B]`; output `logits [B, C]` float32.
    layout 'padded': int64 `input_ids [B, L]`, `attention_mask [B, L]` (, `token_type_ids [B, L]`); output
    `logits [B, C]`.
    `reads` 'tokens': logits stand at tokens, packed [T, C], padded [B, L, C]. 'marked': the packed graph has one more
    input `marks [M]`, rows of T, and gives logits [M, C]; the padded one gives [B, L, C].
    `prompt` (first id, count): ids that stand before every sequence, in both layouts; tokens' logits include theirs.
    `adapters`: names; the packed graph has one more input `adapter [B]`, the place of each sequence's, and logits
    [B, the largest C].
    `pairs`: whether the model learned from pairs of texts; None where the task says what it takes.
    """

    layout: str
    precision: str
    task: Mapping[str, Any]
    max_length: int
    pad_token_id: int
    position_offset: int
    token_types: bool
    reads: str = "first"
    prompt: Sequence[int] = ()
    adapters: Sequence[str] = ()
    source: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    quality: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, str] = field(default_factory=dict)
    pairs: bool | None = None
    format: int = FORMAT


def write_info(folder: Path, info: BundleInfo) -> None:
    """Write bundle.json with the checksums of every other file in `folder`."""
    sums = {p.name: file_sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != "bundle.json"}
    content = {**asdict(info), "checksums": sums}
    (folder / "bundle.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_info(folder: str | Path, *, verify: bool = True) -> BundleInfo:
    """Read and check a bundle. Raises BundleError naming the file that is missing or was changed."""
    folder = Path(folder)
    path = folder / "bundle.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any((folder / name).is_file() for name in ("run.json", "regraft.json")):
            raise BundleError(
                f"{folder}: a trained model, not a bundle: `regraft export {folder} --to BUNDLE` makes one of it"
            ) from None
        raise BundleError(
            f"{folder}: not a bundle: bundle.json is missing; `regraft export RUN --to {folder}` makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read: {error}") from None
    if content.get("format") != FORMAT:
        raise BundleError(f"{path}: format {content.get('format')!r}; this version reads format {FORMAT}")
    known = BundleInfo.__dataclass_fields__
    try:
        info = BundleInfo(**{k: v for k, v in content.items() if k in known})
    except TypeError as error:
        raise BundleError(f"{path}: {error}") from None
    for name, expected in info.checksums.items() if verify else ():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file}: missing, though bundle.json lists it")
        if file_sha256(file) != expected:
            raise BundleError(f"{file}: changed since it was exported (checksum differs); export again")
    return info
