"""Tokenizers that several test files share, made here: nothing is read from outside."""

from __future__ import annotations

import pytest
from text_samples import trained

from tfcli.text.tokenizers.sentencepiece import Tokenizer


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return trained("bpe")


@pytest.fixture(scope="session")
def unigram() -> Tokenizer:
    return trained("unigram")


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    made: Tokenizer = request.getfixturevalue(request.param)
    return made
