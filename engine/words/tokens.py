"""Texts to words or characters, as a tokenizer that the `tokenizers` package runs, so that serving splits alike."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regraft.engine.data.fast_tokenizer import FastTokenizer, _from_content
from regraft.engine.errors import ModelError

SPECIAL = ("[PAD]", "[UNK]", "[START]", "[SEP]")
PAD, UNKNOWN = 0, 1
CJK = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
# What a text is split into, by unit, for people.
PIECES = {
    "word": "words",
    "mixed": "words and characters",
    "character": "characters",
    "longest": "words",
}
AT_ONCE = 1000  # texts


def choose_unit(texts: Sequence[str], words: Sequence[str] = ()) -> str:
    """word, or mixed where some Chinese stands between them; for mostly Chinese texts the longest words of the vocabulary,
    or characters where it has none."""
    sample = "".join(texts[:: max(1, len(texts) // 500)])
    letters = [c for c in sample if c.isalpha()]
    if sum(bool(CJK.match(c)) for c in letters) * 2 <= len(letters):
        return "mixed" if any(not t.isascii() and CJK.search(t) for t in texts) else "word"
    return "longest" if any(len(w) > 1 and CJK.match(w) for w in words[:5000]) else "character"


def splitter(unit: str, lowercase: bool) -> Any:
    """A tokenizer without words yet: normaliser and the splitting of texts."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordLevel(dict.fromkeys(SPECIAL, 0), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=unit == "mixed", strip_accents=False, lowercase=lowercase
    )
    if unit in ("word", "mixed"):
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif unit == "character":
        parts = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("."), "isolated")]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    else:
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def count_words(texts: Sequence[str], unit: str, lowercase: bool, words: Sequence[str] = ()) -> Counter[str]:
    """How often each word or character occurs in the texts; for 'longest', of these `words` and the characters between."""
    counts: Counter[str] = Counter()
    if unit == "longest" and words:
        backend = word_tokenizer(words, unit, lowercase).backend
        for start in range(0, len(texts), AT_ONCE):
            some = texts[start : start + AT_ONCE]
            for text, found in zip(some, backend.encode_batch(list(some), add_special_tokens=False), strict=True):
                known = zip(found.ids, found.tokens, found.offsets, strict=True)
                counts.update(text[slice(*place)] if number == UNKNOWN else piece for number, piece, place in known)
        return counts
    backend = splitter("character" if unit == "longest" else unit, lowercase)
    for text in texts:
        normal = backend.normalizer.normalize_str(text)
        counts.update(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal))
    return counts


def word_tokenizer(words: Sequence[str], unit: str, lowercase: bool) -> FastTokenizer:
    """A tokenizer over SPECIAL and `words`; for 'longest', behind them the characters of words that are none by themselves.
    Every text starts with [START], so none is empty."""
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    backend = splitter(unit, lowercase)
    if unit == "longest":
        # Greedy from the left, the longest known word first. One unknown character would take with it all that it is not
        # separated from: what stands in no word of several is split off, and the others are known by themselves.
        inside = set().union(*(w for w in words if len(w) > 1))
        for character in sorted(inside - vocabulary.keys()):
            vocabulary[character] = len(vocabulary)
        backend.model = models.WordPiece(
            vocabulary, unk_token="[UNK]", continuing_subword_prefix="", max_input_chars_per_word=100_000
        )
        known = "".join(re.escape(c) for c in sorted(inside))
        alone = pre_tokenizers.Split(Regex(f"[^{known}]" if known else "."), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), alone])
    else:
        backend.model = models.WordLevel(vocabulary, unk_token="[UNK]")
    backend.post_processor = TemplateProcessing(
        single="[START] $A",
        pair="[START] $A [SEP] $B",
        special_tokens=[(name, vocabulary[name]) for name in ("[START]", "[SEP]")],
    )
    return _with_settings(backend.to_str())


def read_word_tokenizer(folder: Path) -> FastTokenizer:
    """The tokenizer of a model folder that `WordsRun` wrote. Raises ModelError."""
    file = folder / "tokenizer.json"
    try:
        content = file.read_text(encoding="utf-8")
        json.loads(content)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None
    return _with_settings(content)


def _with_settings(content: str) -> FastTokenizer:
    settings = {"max_length": None, "pad_token_id": PAD, "token_types": False, "truncation_side": "right"}
    return _from_content(content, {**settings, "split_special_tokens": True})
