"""Names that columns of labelled text usually have, the likeliest first."""

from __future__ import annotations

TEXT_NAMES = (
    "text",
    "sentence",
    "review",
    "comment",
    "content",
    "message",
    "utterance",
    "query",
    "question",
    "document",
    "body",
    "tweet",
    "post",
    "description",
    "input",
    "headline",
    "title",
    "abstract",
)
PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("text_1", "text_2"),
    ("question1", "question2"),
    ("text", "text_pair"),
    ("query", "passage"),
    ("query", "document"),
    ("question", "sentence"),
    ("question", "answer"),
    ("question", "passage"),
    ("anchor", "positive"),
)
LABEL_NAMES = (
    "label",
    "labels",
    "category",
    "categories",
    "class",
    "intent",
    "target",
    "gold_label",
    "sentiment",
    "topic",
    "emotion",
    "emotions",
    "score",
    "rating",
    "stars",
    "tag",
    "tags",
    "similarity",
    "is_duplicate",
    "polarity",
    "type",
    "y",
)
HEADER_WORDS = frozenset(
    (*TEXT_NAMES, *LABEL_NAMES, *(name for pair in PAIR_NAMES for name in pair), "id", "idx", "index")
)
