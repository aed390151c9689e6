"""Words that a tokenizer cuts into pieces made tokens of their own, each starting as the mean of its pieces.

A text of a field has words that the vocabulary of a general encoder knows in splinters only. Such a word gets an entry in
the tokenizer's vocabulary (for BPE with the merges that lead to it) and a row in the model's tables.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from regraft.engine.data.fast_tokenizer import FastTokenizer, with_content
from regraft.engine.errors import ConfigError

LEAST_SEEN = 2


@dataclass(frozen=True)
class NewWords:
    """Tokens that were added, by ascending id. `pieces`: the old ids of what each was cut into before. BPE needs steps
    on the way to a word, which are tokens too; `words` are those that were asked for."""

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    words: tuple[str, ...]


def grow(
    tokenizer: FastTokenizer, wanted: int | Sequence[str], texts: Iterable[str]
) -> tuple[FastTokenizer, NewWords | None]:
    """The tokenizer with the `wanted` words, or with as many of the commonest words of `texts` that it cuts into pieces;
    None beside it where there are none.

    Raises ConfigError for a word that is none to this tokenizer, and for a tokenizer of another kind.
    """
    backend = tokenizer.backend
    state = json.loads(backend.to_str())
    add = {"WordPiece": _add_to_wordpiece, "BPE": _add_to_bpe}.get(state["model"].get("type"))
    if add is None:
        raise ConfigError(
            f"model.new_words: the tokenizer is of kind {state['model'].get('type')}; WordPiece and BPE can be extended"
        )
    chosen = _commonest(backend, wanted, texts) if isinstance(wanted, int) else _named(backend, wanted)
    cut = {word: tuple(token.id for token in backend.model.tokenize(word)) for word in chosen}
    cut = {word: pieces for word, pieces in cut.items() if _in_pieces(backend, word, pieces)}
    cut = {word: pieces for word, pieces in cut.items() if _can_be_added(state["model"], backend, word, pieces)}
    old = backend.get_vocab()
    first = max(old.values()) + 1
    pieces_of = add(state["model"], cut, backend, first)
    if not pieces_of:
        return tokenizer, None
    grown = with_content(tokenizer, json.dumps(state, ensure_ascii=False))
    found = NewWords(
        tuple(pieces_of), tuple(range(first, first + len(pieces_of))), tuple(pieces_of.values()), tuple(cut)
    )
    _check(grown.backend, old, found)
    return grown, found


def _commonest(backend: Any, count: int, texts: Iterable[str]) -> list[str]:
    seen: Counter[str] = Counter()
    for text in texts:
        clean = text.encode("utf-8", "replace").decode()
        seen.update(_split(backend, clean))
    able = [(word, n) for word, n in seen.items() if n >= LEAST_SEEN and _has_letters(backend, word)]
    cut = [(word, n) for word, n in able if _in_pieces(backend, word, [t.id for t in backend.model.tokenize(word)])]
    return [word for word, _ in sorted(cut, key=lambda item: (-item[1], item[0]))[:count]]


def _split(backend: Any, text: str) -> list[str]:
    """A text's words as the tokenizer's model is given them."""
    normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return normal.split()
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]


def _named(backend: Any, words: Sequence[str]) -> list[str]:
    found = []
    for word in words:
        parts = _split(backend, f"a {word}")[1:]  # as it stands behind another word
        if len(parts) != 1:
            raise ConfigError(
                f"model.new_words: {word!r}: to this tokenizer it is {len(parts)} words: {', '.join(parts)}"
            )
        found.append(parts[0])
    return list(dict.fromkeys(found))


def _has_letters(backend: Any, word: str) -> bool:
    text = word if backend.decoder is None else backend.decoder.decode([word])
    return any(c.isalpha() for c in text)


def _in_pieces(backend: Any, word: str, pieces: Sequence[int]) -> bool:
    """Whether a word is more than one token, or one that stands for all that is unknown."""
    return len(pieces) > 1 or (len(pieces) == 1 and backend.id_to_token(pieces[0]) != word)


def _can_be_added(model: dict[str, Any], backend: Any, word: str, pieces: Sequence[int]) -> bool:
    """Whether the tokenizer would look a word up, and for BPE has characters for all of it."""
    if model["type"] == "WordPiece":
        return len(word) <= model["max_input_chars_per_word"]
    unknown = model.get("unk_token")
    return unknown is None or backend.token_to_id(unknown) not in pieces


def _add_to_wordpiece(
    model: dict[str, Any], cut: dict[str, tuple[int, ...]], backend: Any, first: int
) -> dict[str, tuple[int, ...]]:
    model["vocab"].update({word: first + i for i, word in enumerate(cut)})
    return cut


def _add_to_bpe(
    model: dict[str, Any], cut: dict[str, tuple[int, ...]], backend: Any, first: int
) -> dict[str, tuple[int, ...]]:
    """Merges behind those that are there, so that no word that was a token before is cut otherwise now."""
    merges, as_text = model["merges"], bool(model["merges"]) and isinstance(model["merges"][0], str)
    rank: dict[tuple[str, str], int] = {}
    added: dict[str, tuple[int, ...]] = {}
    for ids in cut.values():
        parts: list[tuple[str, tuple[int, ...]]] = [(backend.id_to_token(i), (i,)) for i in ids]
        while len(parts) > 1:
            pairs = [(parts[i][0], parts[i + 1][0]) for i in range(len(parts) - 1)]
            # What an earlier word's merges do to this one comes first; then from the left.
            at = min(range(len(pairs)), key=lambda i: (rank.get(pairs[i], len(rank)), i))
            if pairs[at] not in rank:
                rank[pairs[at]] = len(rank)
                merges.append(" ".join(pairs[at]) if as_text else list(pairs[at]))
            (left, mine), (right, others) = parts[at], parts[at + 1]
            token, pieces = left + right, mine + others
            if token not in model["vocab"]:
                model["vocab"][token] = first + len(added)
                added[token] = pieces
            parts[at : at + 2] = [(token, pieces)]
    return added


def _check(backend: Any, old: dict[str, int], new: NewWords) -> None:
    moved = next((token for token, i in old.items() if backend.token_to_id(token) != i), None)
    if moved is not None:
        raise ConfigError(
            f"model.new_words: this tokenizer cannot be extended: its token {moved!r} would get another id"
        )
    for word in new.words:
        if len(backend.model.tokenize(word)) != 1:
            raise ConfigError(f"model.new_words: {word!r} cannot be made one token of this tokenizer")


def add_rows(model: Any, new: NewWords) -> None:
    """Rows for the new tokens in the word embedding and, where the model has one, the layer over the vocabulary."""
    import torch

    size = new.ids[-1] + 1
    if size > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(size, mean_resizing=False)
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None:
        tables += [] if head.weight is tables[0] else [head.weight]
        tables += [] if getattr(head, "bias", None) is None else [head.bias]
    with torch.no_grad():
        for table in tables:
            for row, pieces in zip(new.ids, new.pieces, strict=True):
                table[row] = table[list(pieces)].mean(dim=0)
