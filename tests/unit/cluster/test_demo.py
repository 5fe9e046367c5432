"""The demo shows what the answers say, and fails when the service does not do what it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from cluster import demo
from protos import serving_pb2 as pb

TIMING = {"prefill_worker": "prefill-0", "decode_worker": "decode-0", "bytes_shipped": 3 << 20, "decode_s": 1.25}


def _rendered(answered: list[demo.Answered]) -> list[list[str]]:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(demo.table(answered))
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_table_has_a_column_for_each_request_and_fits_a_terminal() -> None:
    rows = _rendered(
        [demo.Answered(door, 191, 60, 176, TIMING) for door in ("gRPC, streamed", "HTTP", "HTTP, streamed")]
    )

    assert rows[0] == ["prefilled on", "prefill-0", "prefill-0", "prefill-0"]
    assert ["of them cached", "176", "176", "176"] in rows
    assert ["KV shipped", "3.00 MiB", "3.00 MiB", "3.00 MiB"] in rows
    assert ["decode", "1.250 s", "1.250 s", "1.250 s"] in rows


def test_request_that_ended_with_its_first_token_was_decoded_nowhere() -> None:
    rows = _rendered([demo.Answered("HTTP", 5, 1, 0, {"prefill_worker": "prefill-0", "decode_worker": None})])

    assert rows[1] == ["decoded on", "-"]


def test_every_row_of_seconds_is_a_field_of_the_grpc_timing_too() -> None:
    names = {field.name for field in pb.TimingBreakdown.DESCRIPTOR.fields}

    assert {field for _, field in demo.SECONDS} <= names


def test_configuration_that_cannot_be_read_ends_the_demo_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([str(tmp_path / "absent.yaml")]) == 1
    assert "absent.yaml" in capsys.readouterr().out.replace("\n", "")
