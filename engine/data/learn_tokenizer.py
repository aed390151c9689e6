"""Tokenizers learned from texts: WordPiece as BERT has it, byte-level BPE as RoBERTa has it.

The vocabulary is learned by the `tokenizers` package; what is made of it is transformers' own class, so that the folder it
is saved to loads wherever BERT's or RoBERTa's does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from regraft.engine.errors import ConfigError

KINDS = ("wordpiece", "bpe")
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
BYTES = 256
SHORTEST = 3
LEAST = {"wordpiece": 100, "bpe": BYTES + len(ROBERTA_TOKENS) + 1}


def learn_tokenizer(
    texts: Sequence[str], *, kind: str, size: int, lowercase: bool = True, min_count: int = 2, max_length: int = 512
) -> Any:
    """transformers' tokenizer with at most `size` tokens, learned from `texts`. The same texts give the same tokenizer.

    `lowercase` (WordPiece): as BERT uncased, which also takes accents away. `min_count`: how often a pair of pieces must
    be seen to become one. Raises ConfigError.
    """
    if kind not in KINDS:
        raise ConfigError(f"--type: {kind!r}; expected {' or '.join(KINDS)}")
    if size < LEAST[kind]:
        raise ConfigError(f"--size: {size}; a {kind} vocabulary has at least {LEAST[kind]} tokens")
    if min_count < 1:
        raise ConfigError(f"--min-count: {min_count}; expected at least 1")
    if max_length < SHORTEST:
        raise ConfigError(
            f"--max-length: {max_length}; expected at least {SHORTEST}: a token between the model's own two"
        )
    learn = _wordpiece if kind == "wordpiece" else _bpe
    return learn(texts, size, lowercase, min_count, max_length)


def _wordpiece(texts: Sequence[str], size: int, lowercase: bool, min_count: int, max_length: int) -> Any:
    from transformers import BertTokenizer

    characters = size // 2  # one may be there twice: at the beginning of a word and within one
    # The trainer numbers what stands within words in an order that differs from run to run, and pairs that are as common
    # are joined by number. So these are looked for first, and given their places.
    within = sorted(t for t in _learned(texts, 0, BERT_TOKENS, characters, lowercase, min_count) if t.startswith("##"))
    vocabulary = _learned(texts, size, (*BERT_TOKENS, *within), characters, lowercase, min_count)
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return BertTokenizer(vocab=ordered, do_lower_case=lowercase, model_max_length=max_length)


def _learned(
    texts: Sequence[str], size: int, first: Sequence[str], characters: int, lowercase: bool, min_count: int
) -> dict[str, int]:
    """WordPieces by number, `first` before all others; with size 0 the characters alone."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_count,
        special_tokens=list(first),
        limit_alphabet=characters,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return learner.get_vocab()


def _bpe(texts: Sequence[str], size: int, lowercase: bool, min_count: int, max_length: int) -> Any:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_count,
        special_tokens=list(ROBERTA_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    # The space before a mask is the mask's: a word is hidden with the space it is written with.
    mask: Any = AddedToken("<mask>", lstrip=True, special=True)
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, mask_token=mask, model_max_length=max_length)
