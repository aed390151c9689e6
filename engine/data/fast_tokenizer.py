"""A model folder's tokenizer as the `tokenizers` package runs it, exactly as transformers would set it up.

transformers takes seconds to import and may change what tokenizer.json says (lower case, accents, added tokens) by
what it finds in tokenizer_config.json. So it is asked once for each content of the folder, and its answer is kept in
the cache folder; afterwards `tokenizers` alone reads that.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.engine.data.cache import cache_folder
from regraft.engine.data.reach import offline_if_unreachable
from regraft.engine.errors import ModelError
from regraft.engine.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1
UNLIMITED = 10**9  # transformers writes "no limit" as 1e30
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")
SETTING_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "tokenizer.model",
    "config.json",  # names the model, and by that the tokenizer class
)


@dataclass(frozen=True)
class FastTokenizer:
    """`backend` without padding or truncation; the rest as transformers has it.

    `max_length`: what tokenizer_config.json allows (`model_max_length`), None for no limit. `token_types`: whether
    the model is fed token_type_ids. `fingerprint` covers all that decides the token ids.
    """

    backend: Tokenizer
    max_length: int | None
    pad_token_id: int
    token_types: bool
    truncation_side: str
    fingerprint: str

    def special_tokens(self, pair: bool) -> int:
        """How many tokens the template adds to a text, or to a pair."""
        return self.backend.num_special_tokens_to_add(pair)

    def settings(self) -> dict[str, Any]:
        """All that is not in `backend`'s own file, for `_from_content`."""
        return {
            "max_length": self.max_length,
            "pad_token_id": self.pad_token_id,
            "token_types": self.token_types,
            "truncation_side": self.truncation_side,
            "split_special_tokens": bool(self.backend.encode_special_tokens),
        }

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, which `tokenizers.Tokenizer.from_file` reads without any other file."""
        write_text(Path(folder) / "tokenizer.json", self.backend.to_str(pretty=True))


def load_fast_tokenizer(
    name: str | Path, *, revision: str | None = None, cache_dir: Path | None = None
) -> FastTokenizer:
    """The tokenizer of a model folder, or of a name on the hub.

    `cache_dir`: where the set-up tokenizer is kept, `cache_folder()` for None.
    Raises ModelError when there is none, naming the files looked for, or it cannot be run by `tokenizers`.
    """
    folder = Path(name)
    if not folder.is_dir():
        return from_transformers(_ask_transformers(str(name), revision))
    if not any((folder / file).is_file() for file in (*VOCABULARY_FILES, "tokenizer.model")):
        looked = ", ".join(VOCABULARY_FILES)
        raise ModelError(f"{folder}: has no tokenizer; looked for {looked}: copy them from where the model came from")
    kept = (cache_dir or cache_folder()) / "tokenizers" / f"{_content_key(folder)}.json"
    found = _read_kept(kept)
    if found is None:
        found = from_transformers(_ask_transformers(str(folder), None))
        _keep(found, kept)
    return found


def from_transformers(tokenizer: Any) -> FastTokenizer:
    """What `tokenizer`, a transformers fast tokenizer, would do; it is not changed.

    Raises ModelError for one that runs in Python.
    """
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__}: this tokenizer runs in Python; expected a fast one, with a tokenizer.json"
        )
    pad = tokenizer.pad_token_id
    limit = tokenizer.model_max_length
    settings = {
        "max_length": int(limit) if limit and limit < UNLIMITED else None,
        "pad_token_id": 0 if pad is None else int(pad),
        "token_types": "token_type_ids" in tokenizer.model_input_names,
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": bool(tokenizer.backend_tokenizer.encode_special_tokens),
    }
    return _from_content(tokenizer.backend_tokenizer.to_str(), settings)


def with_content(tokenizer: FastTokenizer, content: str) -> FastTokenizer:
    """The same settings over another tokenizer.json."""
    return _from_content(content, tokenizer.settings())


def _from_content(content: str, settings: dict[str, Any]) -> FastTokenizer:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(content)
    # A tokenizer.json may carry the padding and truncation of whoever saved it; neither is part of a text's tokens.
    backend.no_padding()
    backend.no_truncation()
    # The one switch that tokenizer.json does not hold.
    backend.encode_special_tokens = settings["split_special_tokens"]
    decisive = json.dumps([backend.to_str(), settings["split_special_tokens"], settings["truncation_side"]])
    return FastTokenizer(
        backend=backend,
        max_length=settings["max_length"],
        pad_token_id=settings["pad_token_id"],
        token_types=settings["token_types"],
        truncation_side=settings["truncation_side"],
        fingerprint=hashlib.sha256(decisive.encode()).hexdigest(),
    )


def _ask_transformers(name: str, revision: str | None) -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    try:
        if Path(name).is_dir():
            return AutoTokenizer.from_pretrained(name)
        with offline_if_unreachable():
            return AutoTokenizer.from_pretrained(name, revision=revision)
    except Exception as error:  # transformers raises whatever its parts raise
        told = " ".join(str(error).split())[:300]
        raise ModelError(f"{name}: its tokenizer cannot be loaded: {told}") from None


def _content_key(folder: Path) -> str:
    digest = hashlib.sha256(f"{FORMAT} {version('transformers')} {version('tokenizers')}".encode())
    for file in sorted({*VOCABULARY_FILES, *SETTING_FILES, *(p.name for p in folder.glob("*.model"))}):
        path = folder / file
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"\0{file}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _keep(tokenizer: FastTokenizer, path: Path) -> None:
    content = {"settings": tokenizer.settings(), "tokenizer": tokenizer.backend.to_str()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content))
    except OSError as error:
        log.warning("%s: the tokenizer cannot be kept there for the next run: %s", path.parent, error)


def _read_kept(path: Path) -> FastTokenizer | None:
    try:
        content = json.loads(path.read_bytes())
        return _from_content(content["tokenizer"], content["settings"])
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file is made again, whatever the damage
        log.warning("%s: damaged, made again: %s", path, error)
        return None
