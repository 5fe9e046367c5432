"""Every arm gets the same requests, and no two requests share a prefix."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from benchmarks.workload import MAX_PROMPT_TOKENS, MIN_PROMPT_TOKENS, TEXT_PATH, Wave, waves

CONCURRENCIES, NUM_REPEATS = (1, 8, 32), 3


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose tokenizer gives every word of the text a number."""
    folder = tmp_path_factory.mktemp("model")
    words = [word for word, _ in Whitespace().pre_tokenize_str(TEXT_PATH.read_text(encoding="utf-8"))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(dict.fromkeys([*words, "?"]))}, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def work(model_folder: Path) -> list[Wave]:
    return waves(model_folder, CONCURRENCIES, NUM_REPEATS, num_new_tokens=64)


def test_each_concurrency_is_warmed_up_once_and_then_measured(work: list[Wave]) -> None:
    assert [(wave.concurrency, wave.measured) for wave in work] == [
        (concurrency, measured) for concurrency in CONCURRENCIES for measured in (False, True, True, True)
    ]


def test_prompts_keep_their_bounds(work: list[Wave]) -> None:
    lengths = {len(prompt) for wave in work for prompt in wave.prompts}

    assert MIN_PROMPT_TOKENS <= min(lengths) <= max(lengths) <= MAX_PROMPT_TOKENS


def test_no_two_prompts_begin_with_the_same_page(work: list[Wave]) -> None:
    beginnings = [prompt[:16] for wave in work for prompt in wave.prompts]

    assert len(set(beginnings)) == len(beginnings)


def test_same_seed_makes_the_same_requests(model_folder: Path, work: list[Wave]) -> None:
    assert waves(model_folder, CONCURRENCIES, NUM_REPEATS, num_new_tokens=64) == work
