"""Every form of trace by one small file, prefix hits by hand, and errors that name file, line and field."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from cluster.workload_traces import TraceRequest, read_trace, summarise, uncached_tokens
from core.errors import InvalidConfig


def written(tmp_path: Path, text: str, name: str = "trace") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_csv_with_times(tmp_path: Path) -> None:
    path = written(tmp_path, "t_s,input_length,output_length,client_id\n0.0,374,44,1\n4.5,396,109,2\n")

    assert list(read_trace(path)) == [TraceRequest(374, 44, 0.0), TraceRequest(396, 109, 4.5)]


def test_csv_of_lengths_only(tmp_path: Path) -> None:
    assert list(read_trace(written(tmp_path, "input_length,output_length\n10,0\n"))) == [TraceRequest(10, 0)]


def test_azures_own_csv_counts_from_its_first_instant(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n",
    )

    first, second = read_trace(path)

    assert first == TraceRequest(374, 44, 0.0)
    assert second.arrival_s == pytest.approx(4.314579)


def test_mooncake_lines_in_milliseconds_with_blocks_of_512(tmp_path: Path) -> None:
    path = written(tmp_path, '{"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 7]}\n')

    assert list(read_trace(path)) == [TraceRequest(600, 5, 1.5, prefix_blocks=("0", "7"), block_tokens=512)]


def test_coding_sessions_have_blocks_of_their_own(tmp_path: Path) -> None:
    lines = [
        f'{{"session_id": "{session}", "turn": {turn}, "t_s": 1, "think_s": 2, "input_length": 200, '
        f'"output_length": 3, "hash_runs": [[1, 2], [9, 1]]}}'
        for session, turn in (("a", 0), ("a", 1), ("b", 0))
    ]

    requests = list(read_trace(written(tmp_path, "\n".join(lines))))

    assert requests[0].prefix_blocks == ("a/1", "a/2", "a/9")
    assert (requests[1].turn, requests[1].think_s) == (1, 2.0)
    assert list(uncached_tokens(requests)) == [200, 200 - 3 * 64, 200]


def test_texts_are_counted_in_characters(tmp_path: Path) -> None:
    turns = written(tmp_path, '{"turns": ["12345678", "1234"], "reference_output": ["1234"]}\n', "turns")
    session = written(
        tmp_path,
        '{"session_id": "s", "turn": 0, "t_s": 0, "append": "12345678", "output": "1234"}\n'
        '{"session_id": "s", "turn": 1, "t_s": 2, "append": "1234", "output": "12345"}\n',
        "session",
    )

    assert [(r.input_tokens, r.output_tokens) for r in read_trace(turns)] == [(3, 1)]
    assert [(r.input_tokens, r.output_tokens) for r in read_trace(session)] == [(2, 1), (3, 2)]


def test_a_prefix_is_cached_up_to_the_first_new_block() -> None:
    requests = [
        TraceRequest(1000, 1, prefix_blocks=("a", "b"), block_tokens=512),
        TraceRequest(1500, 1, prefix_blocks=("a", "x", "b"), block_tokens=512),
        TraceRequest(1000, 1, prefix_blocks=("a", "b"), block_tokens=512),
    ]

    assert list(uncached_tokens(requests)) == [1000, 1500 - 512, 1]


def test_gzip_is_told_by_content_and_progress_by_bytes_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_bytes(gzip.compress(b"input_length,output_length\n" + b"10,1\n" * 3000))
    heard: list[int] = []

    assert sum(1 for _ in read_trace(path, heard.append)) == 3000
    assert len(heard) == 3
    assert 0 < heard[-1] <= path.stat().st_size


def test_a_summary_has_means_and_the_rate() -> None:
    requests = [TraceRequest(10, 2, 0.0), TraceRequest(20, 4, 1.0), TraceRequest(30, 6, 4.0)]

    summary = summarise(requests, ideal_prefix_cache=False, path="x")

    assert summary.input_tokens == (10, 20, 30)
    assert (summary.mean_input_tokens, summary.mean_output_tokens, summary.rate_rps) == (20, 4, 0.5)


def test_sessions_and_bare_lengths_have_no_rate() -> None:
    session = [TraceRequest(10, 2, 0.0, "s", 0), TraceRequest(20, 4, 9.0, "s", 1)]

    assert summarise(session, ideal_prefix_cache=False, path="x").rate_rps is None
    assert summarise([TraceRequest(1, 1)], ideal_prefix_cache=False, path="x").rate_rps is None
    with pytest.raises(InvalidConfig, match="x: holds no request"):
        summarise([], ideal_prefix_cache=False, path="x")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", ":1: input_length: must be a column"),
        ("input_length,output_length\n5,6\nx,6\n", ":3: input_length: must be a number of at least 0, got 'x'"),
        ("input_length,output_length\n0,6\n", ":2: input_length: must be an integer of at least 1"),
        ('{"input_length": 3, "output_length": 1.5}\n', ":1: output_length: must be an integer"),
        ('{"input_length": 3, "output_length": true}\n', ":1: output_length: must be a number"),
        ('{"input_length": 3, "output_length": 1}\n{oops\n', ":2: is not JSON"),
        ('{"input_length": 3, "output_length": 1}\n[]\n', ":2: must be a JSON object"),
        ('{"input_length": 3, "output_length": 1, "hash_ids": ["a"]}\n', ":1: hash_ids: must be a list of integers"),
        ('{"session_id": 4, "turn": 0}\n', ":1: session_id: must be text"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,3,4\n", ":2: TIMESTAMP: must be an ISO date"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)

    with pytest.raises(InvalidConfig) as caught:
        list(read_trace(path))

    assert str(caught.value).startswith(str(path))
    assert complaint in str(caught.value)


def test_a_file_that_is_cut_short_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(gzip.compress(b"input_length,output_length\n" + b"10,1\n" * 3000)[:-10])

    with pytest.raises(InvalidConfig, match="cannot be read"):
        list(read_trace(path))
    with pytest.raises(InvalidConfig, match="cannot be read"):
        list(read_trace(tmp_path / "absent"))


def test_burstgpt_leaves_out_what_failed(tmp_path: Path) -> None:
    text = (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45,ChatGPT,1087,0,1087,API log\n118.5,GPT-4,417,276,693,API log\n"
    )

    assert list(read_trace(written(tmp_path, text))) == [TraceRequest(472, 18, 5.0), TraceRequest(417, 276, 118.5)]


def test_prompts_with_lengths_of_answers(tmp_path: Path) -> None:
    text = '{"prompt": "12345678", "output_tokens": 7}\n{"text_input": "1234", "output_length": 3, "timestamp": 500}\n'

    assert list(read_trace(written(tmp_path, text))) == [TraceRequest(2, 7), TraceRequest(1, 3, 0.5)]


def test_sharegpt_counts_the_first_question_and_answer(tmp_path: Path) -> None:
    text = (
        '[{"id": "a", "conversations": [{"from": "human", "value": "12345678"}, {"from": "gpt", "value": "1234"}, '
        '{"from": "human", "value": "more"}]},\n {"id": "b", "conversations": []}]'
    )

    assert list(read_trace(written(tmp_path, text))) == [TraceRequest(2, 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"conversations": [{"value": "a"}, {"from": "gpt"}]}]', r"\[0\]\.conversations\[1\]: value"),
        ('[{"conversations": 3}]', r"\[0\]: conversations"),
        ("[1]", r"\[0\]: must be a JSON object"),
        ("[", "is not JSON"),
        ('{"prompt": 3}', ":1: prompt"),
    ],
)
def test_errors_in_texts_name_the_place(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        list(read_trace(written(tmp_path, text)))


def test_what_is_appended_follows_the_session_s_last_prompt(tmp_path: Path) -> None:
    text = (
        '{"session_id": "a", "turn": 0, "t_s": 0, "append": "12345678", "output": "1234"}\n'
        '{"session_id": "a", "turn": 1, "t_s": 1, "append": "1234", "output": "1234"}\n'
    )

    first, second = read_trace(written(tmp_path, text))

    assert (first.appended, first.input_tokens, second.appended, second.input_tokens) == (False, 2, True, 3)
