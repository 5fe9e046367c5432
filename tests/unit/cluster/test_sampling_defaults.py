"""What requests get for what they leave open: by the model's file, by the configuration, and at every door's parser."""

import json

import pytest

from cluster.config import SamplingDefaultsConfig
from cluster.grpc_messages import default_sampling, parse_sampling
from cluster.messages_api import parse_message
from cluster.openai_api import parse_chat, parse_completion
from cluster.responses_api import parse_response
from cluster.sampling_defaults import left_open, sampling_defaults, with_defaults
from core.errors import InvalidConfig, InvalidRequest
from core.request import SamplingParams

ALL = frozenset({"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
SAYS = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True, "eos_token_id": 2, "max_new_tokens": 300}


def write(folder, says):
    (folder / "generation_config.json").write_text(says if isinstance(says, str) else json.dumps(says))


def test_the_models_file_then_the_configuration(tmp_path):
    write(tmp_path, SAYS)
    defaults, told = sampling_defaults(SamplingDefaultsConfig(), tmp_path)
    assert defaults == SamplingParams(max_tokens=300, temperature=0.6, top_p=0.9, top_k=20)
    assert told == "max_tokens 300, temperature 0.6, top_p 0.9, top_k 20 (generation_config.json)"

    defaults, told = sampling_defaults(SamplingDefaultsConfig(temperature=0, max_tokens=64), tmp_path)
    assert defaults == SamplingParams(max_tokens=64, temperature=0, top_p=0.9, top_k=20)
    assert told == "max_tokens 64, temperature 0 (sampling_defaults); top_p 0.9, top_k 20 (generation_config.json)"

    assert sampling_defaults(SamplingDefaultsConfig(from_model=False), tmp_path) == (SamplingParams(), "")


def test_a_model_that_says_nothing(tmp_path):
    assert sampling_defaults(SamplingDefaultsConfig(), tmp_path) == (SamplingParams(), "")
    write(tmp_path, {"eos_token_id": 2, "temperature": None, "top_k": -1})
    assert sampling_defaults(SamplingDefaultsConfig(), tmp_path)[0] == SamplingParams()


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"temperature": 3}, "temperature must be between 0 and 2, got 3"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"top_p": "0.9"}, "top_p must be a number, got '0.9'"),
        ({"min_p": True}, "min_p must be a number, got True"),
        ("{", "is no JSON"),
        ([1], "must hold a JSON object"),
    ],
)
def test_a_model_that_says_what_no_request_may(tmp_path, says, message):
    write(tmp_path, says)
    with pytest.raises(InvalidConfig) as caught:
        sampling_defaults(SamplingDefaultsConfig(), tmp_path)
    assert caught.value.key == "sampling_defaults.from_model"
    assert message in str(caught.value)
    assert sampling_defaults(SamplingDefaultsConfig(from_model=False), tmp_path)[0] == SamplingParams()


@pytest.mark.parametrize(("key", "value"), [("temperature", 2.5), ("top_p", 0), ("max_tokens", 0), ("top_k", -1)])
def test_the_configuration_names_its_wrong_key(key, value):
    with pytest.raises(InvalidConfig) as caught:
        SamplingDefaultsConfig(**{key: value})
    assert caught.value.key == f"sampling_defaults.{key}"


def test_only_what_was_left_open_is_filled():
    defaults = SamplingParams(max_tokens=50, temperature=0.2, top_p=0.8, repetition_penalty=1.1)
    given = SamplingParams(temperature=1.0, seed=5)
    done = with_defaults(given, left_open(["temperature", "seed"]), defaults, room=1000)
    assert done == SamplingParams(max_tokens=50, temperature=1.0, top_p=0.8, repetition_penalty=1.1, seed=5)


def test_a_default_of_max_tokens_gives_way():
    defaults = SamplingParams(max_tokens=50)
    assert with_defaults(SamplingParams(min_tokens=80), left_open(()), defaults, room=1000).max_tokens == 80
    assert with_defaults(SamplingParams(), left_open(()), defaults, room=30).max_tokens == 30
    assert with_defaults(SamplingParams(max_tokens=70), left_open(["max_tokens"]), defaults, room=60).max_tokens == 70
    with pytest.raises(InvalidRequest, match="at most max_tokens") as caught:
        with_defaults(SamplingParams(min_tokens=80), left_open(()), defaults, room=60)
    assert caught.value.field == "min_tokens"


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("parse", "body", "given"),
    [
        (parse_chat, CHAT, {}),
        (parse_chat, CHAT | {"temperature": 1, "top_p": None, "top_k": -1}, {"temperature", "top_k"}),
        (parse_chat, CHAT | {"max_completion_tokens": 9}, {"max_tokens"}),
        (parse_completion, {"model": "m", "prompt": "hi", "min_p": 0}, {"max_tokens", "min_p"}),  # OpenAI: 16 tokens
        (parse_response, {"model": "m", "input": "hi", "top_p": 1}, {"top_p"}),
        (parse_message, CHAT | {"max_tokens": 9, "temperature": 1}, {"max_tokens", "temperature"}),
    ],
)
def test_the_parsers_say_what_was_left_open(parse, body, given):
    assert parse(body).left_open == ALL - frozenset(given)


def test_what_grpc_clients_are_told_is_what_they_could_have_said():
    for defaults in (SamplingParams(), SamplingParams(max_tokens=50, temperature=0.2, top_p=0.9, top_k=3, min_p=0.1)):
        assert parse_sampling(default_sampling(defaults)) == defaults
