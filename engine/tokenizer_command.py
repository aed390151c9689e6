"""`regraft tokenizer`: learn a vocabulary from texts, for an encoder that is trained from nothing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regraft.engine.errors import ConfigError, DataError

SHOWN = 2000  # texts that the closing figures are taken from


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tokenizer",
        help="learn a tokenizer (WordPiece or BPE) from texts, into a folder that transformers loads",
        description="Learn a tokenizer from texts. Name the folder in model.name, with model.config for the architecture.",
    )
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="texts: txt, jsonl, csv, tsv or parquet (each also .gz)"
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--type", choices=("wordpiece", "bpe"), default="wordpiece", help="as BERT has it, or as RoBERTa"
    )
    parser.add_argument("--size", type=int, default=16000, metavar="N", help="tokens at most (%(default)s)")
    parser.add_argument("--cased", action="store_true", help="wordpiece: keep capitals and accents")
    parser.add_argument(
        "--min-count",
        type=int,
        default=2,
        metavar="N",
        help="how often two pieces must be seen to become one (%(default)s)",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        metavar="TOKENS",
        help="longest sequence of the model to come (%(default)s)",
    )
    parser.add_argument("--text", default="text", metavar="COLUMN", help="column of the texts (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an existing folder")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Learn, write and say how well the vocabulary fits. Raises ConfigError, DataError."""
    out = Path(args.to)
    if out.exists() and not args.force:
        raise ConfigError(f"{out}: exists already; --force replaces it, --to FOLDER writes another")
    if args.cased and args.type == "bpe":
        raise ConfigError("--cased: byte-level BPE always keeps capitals; remove it")
    from regraft.engine.data.learn_tokenizer import learn_tokenizer
    from regraft.engine.files import new_folder

    texts = list(texts_of(args.files, args.text))
    if not texts:
        raise DataError(f"{', '.join(args.files)}: there is no text to learn a tokenizer from")
    tokenizer = learn_tokenizer(
        texts,
        kind=args.type,
        size=args.size,
        lowercase=not args.cased,
        min_count=args.min_count,
        max_length=args.max_length,
    )
    with new_folder(out) as beside:
        tokenizer.save_pretrained(beside)
    print(f"{out}: {len(tokenizer):,} tokens; {fit(tokenizer, texts[:SHOWN])}")
    return 0


def texts_of(files: list[str], column: str) -> Iterator[str]:
    """Texts of all files, half characters replaced. Raises DataError."""
    from regraft.engine.config import ColumnsConfig, DataConfig
    from regraft.engine.data.read import iter_texts
    from regraft.engine.data.source import find_source

    columns = ColumnsConfig(text=int(column) if column.isdecimal() else column)
    for file in files:
        data = DataConfig(train=file, columns=columns, empty="drop")
        form = "hub" if file.startswith("hub:") else find_source(file, data, plain_text=True).format
        if form in ("conll", "conllu"):
            raise ConfigError(
                f"{file}: is {form}; a tokenizer is learned from running text: txt, jsonl, csv, tsv, parquet"
            )
        for row in iter_texts(file, data, dropped={}):
            yield row.text.encode("utf-8", "replace").decode()


def fit(tokenizer: Any, texts: list[str]) -> str:
    """Tokens a word, and the share of tokens that are unknown."""
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = sum(map(len, found))
    words = sum(len(text.split()) for text in texts)
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in found)
    return (
        f"{tokens / max(words, 1):.2f} tokens a word, {100 * unknown / max(tokens, 1):.2f}% unknown, on the first texts"
    )
