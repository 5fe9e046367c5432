from __future__ import annotations

import os

import pytest

from kv_transfer.ucx_log import Choice, environment, fell_to_tcp, parse_choices, path_of

# What UCX 1.20 in nixl 1.5.1 printed on one host: first over TCP alone, then with shared memory; the third is of the
# format, with names from UCX's documentation.
LOG = """\
[1795428337.37] [vm:10828:0]   +--------+-------------+-----------------------------------+
[1795428337.37] [vm:10828:0]   | kv-1 self cfg#0                                          |
[1795428337.37] [vm:10828:0]   | remote memory write by ucp_put* from host memory to host |
[1795428337.37] [vm:10828:0]   +--------+-------------+-----------------------------------+
[1795428337.37] [vm:10828:0]   | Range  | Description |              Config               |
[1795428337.37] [vm:10828:0]   +--------+-------------+-----------------------------------+
[1795428337.37] [vm:10828:0]   | 0..inf | zero-copy   | 52% on tcp/lo and 48% on tcp/eth0 |
[1795428337.37] [vm:10828:0]   +--------+-------------+-----------------------------------+
[1795428277.72] [vm:10586:0]   | kv-1 self cfg#0                                 |
[1795428277.72] [vm:10586:0]   | active message by ucp_am_send* from host memory |
[1795428277.72] [vm:10586:0]   |          0 | short              | tcp/lo        |
[1795428277.72] [vm:10586:0]   |   1..16515 | zero-copy          | tcp/lo        |
[1795428277.86] [vm:10586:0]   | kv-1 intra-node cfg#1                                    |
[1795428277.86] [vm:10586:0]   | remote memory write by ucp_put* from host memory to host |
[1795428277.86] [vm:10586:0]   | 0..inf | zero-copy   | cma/memory                        |
[1795428277.86] [vm:10586:0]   | kv-2 inter-node cfg#1                                    |
[1795428277.86] [vm:10586:0]   | remote memory write by ucp_put* from cuda/GPU0 to cuda   |
[1795428277.86] [vm:10586:0]   |      0 | short       | rc_mlx5/mlx5_0:1                  |
[1795428277.86] [vm:10586:0]   | 1..2047 | copy-in    | rc_mlx5/mlx5_0:1/path0            |
[1795428277.86] [vm:10586:0]   | 2048..inf | zero-copy | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1 |
"""


def test_tables_of_remote_writes_are_read_and_others_skipped() -> None:
    rdma = frozenset({"rc_mlx5"})
    assert parse_choices(LOG) == [
        Choice("kv-1", ((0, None, frozenset({"tcp"})),)),
        Choice("kv-1", ((0, None, frozenset({"cma"})),)),
        Choice("kv-2", ((0, 0, rdma), (1, 2047, rdma), (2048, None, rdma))),
    ]
    assert parse_choices("") == parse_choices("nothing of ours\n") == []


def test_a_choice_knows_what_carries_a_size() -> None:
    choice = Choice("a", ((0, 10, frozenset({"tcp"})), (11, None, frozenset({"cma"}))))
    assert [choice.transports(size) for size in (0, 10, 11, 1 << 40)] == [{"tcp"}, {"tcp"}, {"cma"}, {"cma"}]
    assert Choice("a", ()).transports(1) == frozenset()


@pytest.mark.parametrize(
    ("transports", "path"),
    [
        ((), "ucx"),
        (("cma",), "ucx:shm"),
        (("posix", "cma"), "ucx:shm"),
        (("tcp",), "ucx:tcp"),
        (("cuda_ipc",), "ucx:cuda_ipc"),
        (("rc_mlx5", "tcp"), "ucx:rc_mlx5+tcp"),
    ],
)
def test_paths_have_names(transports: tuple[str, ...], path: str) -> None:
    assert path_of(frozenset(transports)) == path


@pytest.mark.parametrize(
    ("path", "asked", "fell"),
    [
        ("ucx:tcp", {}, True),
        ("ucx:tcp", {"UCX_TLS": "cuda,rc,tcp"}, True),
        ("ucx:rc_mlx5+tcp", {}, True),
        ("ucx:tcp", {"UCX_TLS": "tcp"}, False),
        ("ucx:tcp", {"UCX_TLS": "self, tcp"}, False),
        ("ucx:tcp", {"UCX_TLS": "tcp,cuda_copy"}, False),
        ("ucx:shm", {}, False),
        ("ucx", {}, False),
    ],
)
def test_tcp_is_a_fall_unless_it_was_asked_for(path: str, asked: dict[str, str], fell: bool) -> None:
    assert fell_to_tcp(path, asked) is fell


def test_an_environment_adds_what_the_user_did_not_set_and_takes_it_away_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_A", "the user's")
    monkeypatch.delenv("UCX_B", raising=False)
    with environment({"UCX_A": "ours", "UCX_B": "ours"}):
        assert (os.environ["UCX_A"], os.environ["UCX_B"]) == ("the user's", "ours")
    assert (os.environ["UCX_A"], "UCX_B" in os.environ) == ("the user's", False)
