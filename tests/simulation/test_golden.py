"""Small cases that a person can work out; the working is in each test. Units of small_world.py: 1 ms and 1,000 bytes a
token of a prompt, 100 ms a decode step, 1,000,000 bytes/s."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.routing_policy import RouteRequest
from cluster.simulator.network import RateChange
from cluster.simulator.scenario import WorkerDeath
from cluster.view import ClusterView, PagePull, Route
from core.request import RequestTiming, Role, WorkerId
from tests.simulation.small_world import KIND, away, here, kind, link, play, prompt


def about(seconds: float) -> object:
    return pytest.approx(seconds, abs=1e-6)


def timing(record: object) -> RequestTiming:
    found = getattr(record, "timing", None)
    assert isinstance(found, RequestTiming)
    return found


def test_a_hand_over_hides_behind_its_prefill_but_for_the_last_layer() -> None:
    """100 tokens are computed from 0.00 to 0.10. Layer i of 10 is stored at i * 0.01 and takes 0.01 to send, so the
    last one has arrived at 0.11. The decode steps end at 0.21 and 0.31."""
    (record,), _ = play(prompt(1))

    assert (record.ttft_s, record.total_s, record.output_tokens) == (about(0.10), about(0.31), 3)
    assert record.tpot_s == about((0.31 - 0.10) / 2)
    assert timing(record).bytes_shipped == 100_000
    assert (timing(record).transfer_s, timing(record).exposed_transfer_s) == (about(0.11), about(0.01))


def test_a_slow_link_is_what_a_hand_over_waits_for() -> None:
    """Half the rate: 100,000 bytes take 0.2 s from when the first layer is stored, at 0.01: until 0.21. Then two decode
    steps. The client's first token does not wait."""
    (record,), _ = play(prompt(1), clusters=(here(of=replace(KIND, send_bytes_per_s=5e5)),))

    assert (record.ttft_s, record.total_s) == (about(0.10), about(0.41))
    assert timing(record).exposed_transfer_s == about(0.11)


def test_messages_take_the_latency_of_their_path() -> None:
    """10 ms a message. The decode worker is told (0.01) and answers (0.02), the prefill worker is told (0.03) and
    computes until 0.13; its token is here at 0.14. The grant is asked for at 0.03 and comes at 0.05, when two layers
    are stored; from then on the link is full, and 100,000 bytes have left at 0.15 and arrived at 0.16. Decode steps end
    at 0.26 and 0.36, and the last token is here at 0.37. The sender knows of the arrival at 0.17."""
    (record,), _ = play(prompt(1), clusters=(here(latency_s=0.01),))

    assert (record.ttft_s, record.total_s) == (about(0.14), about(0.37))
    assert (timing(record).transfer_s, timing(record).exposed_transfer_s) == (about(0.12), about(0.04))


def test_prompts_wait_for_each_other() -> None:
    """A step takes one prompt of 100 tokens: the second is computed from 0.1 to 0.2. The first one's decode steps end
    at 0.21 and 0.31; the second one's K/V has arrived at 0.21, when a step has just begun that it is not in, and so it
    decodes from 0.31 to 0.41 and 0.51."""
    (first, second), _ = play(prompt(1), prompt(2), clusters=(here(of=kind(max_batch_tokens=100)),))

    assert (first.ttft_s, first.total_s) == (about(0.10), about(0.31))
    assert (second.ttft_s, second.total_s) == (about(0.20), about(0.51))


def test_prompts_in_one_step_end_together() -> None:
    """The first comes alone and its step lasts until 0.1; the two others share the next one, until 0.3."""
    (first, second, third), _ = play(prompt(1), prompt(2), prompt(3))

    assert [r.ttft_s for r in (first, second, third)] == [about(0.10), about(0.30), about(0.30)]


def test_chunks_of_a_prompt_are_shipped_as_they_are_computed() -> None:
    """100 tokens in chunks of 40, 40 and 20, computed until 0.04, 0.08 and 0.10. A layer of the first two is 4,000
    bytes, 4 ms, and stored every 4 ms: the last one of the second chunk is sent from 0.08 to 0.084. By then the third
    chunk has stored two layers of 2,000 bytes, 2 ms: the link is busy with its ten until 0.104. Steps end at 0.204 and
    0.304."""
    (record,), _ = play(prompt(1), clusters=(here(of=kind(max_batch_tokens=40, max_batch_size=40)),))

    assert (record.ttft_s, record.total_s) == (about(0.10), about(0.304))
    assert timing(record).exposed_transfer_s == about(0.004)


def test_a_cached_prefix_is_neither_computed_nor_shipped_again() -> None:
    """The same 100 tokens again. The prefill worker caches 10 pages of them, and computes the last one, whose logits it
    needs: 10 tokens, 10 ms. The decode worker caches all 10 pages: nothing is shipped, and steps end at 0.11, 0.21."""
    (_, again), _ = play(prompt(1, content=7), prompt(2, starts_at=10.0, content=7), policy="cache_aware")

    assert (again.ttft_s, again.total_s) == (about(0.01), about(0.21))
    assert (timing(again).cached_tokens, timing(again).decode_cached_tokens) == (90, 100)
    assert timing(again).bytes_shipped == 0


def test_hand_overs_share_a_link_between_clusters_fairly() -> None:
    """Two remote workers compute a prompt each from 0.00 to 0.10; from 0.01 on each wants the whole link of 1,000,000
    bytes/s and gets half. All 200,000 bytes have arrived at 0.21, both halves together. Who is admitted first decodes
    at once until 0.31 and 0.41, the other joins at 0.31."""
    (first, second), _ = play(prompt(1), prompt(2), clusters=(here(0, 1), away(2)), links=(link(1e6),))

    assert (first.ttft_s, second.ttft_s) == (about(0.10), about(0.10))
    assert timing(first).exposed_transfer_s == timing(second).exposed_transfer_s == about(0.11)
    assert sorted((first.total_s, second.total_s)) == [about(0.41), about(0.51)]


def test_a_link_that_narrows_slows_what_is_under_way() -> None:
    """500,000 bytes/s from 0.01: 50,000 bytes until 0.11, when the link falls to a fifth; the other 50,000 take 0.5 s.
    Steps end at 0.71 and 0.81."""
    narrowing = replace(link(5e5), changes=(RateChange(0.11, 0.2),))

    (record,), _ = play(prompt(1), clusters=(here(0, 1), away()), links=(narrowing,))

    assert record.total_s == about(0.81)


def test_a_prompt_waits_in_the_gateway_for_room_to_decode() -> None:
    """The decode worker has 11 pages, enough for one sequence of 103 tokens. Admission holds the second prompt until
    the first sequence has ended, at 0.31; then it is computed until 0.41, its K/V has arrived at 0.42, and steps end at
    0.52 and 0.62."""
    small = replace(KIND, engine=replace(KIND.engine, num_pages=11))

    (first, second), _ = play(prompt(1), prompt(2), clusters=(here(0, 1, of=small), away()), links=(link(1e6),))

    assert (first.ttft_s, first.total_s) == (about(0.10), about(0.31))
    assert (second.ttft_s, second.total_s) == (about(0.41), about(0.62))
    assert timing(second).exposed_transfer_s == about(0.01)


def test_without_a_prefill_worker_the_decode_worker_prefills() -> None:
    """100 tokens until 0.1, and two steps of its own."""
    (record,), _ = play(prompt(1), clusters=(here(0, 1),))

    assert (record.ttft_s, record.total_s) == (about(0.10), about(0.30))
    assert timing(record).prefill_worker is None


def test_a_prompt_beside_decoding_sequences_makes_their_step_longer() -> None:
    """One decode worker for all. The first prompt is computed until 0.1 and would decode in steps of 0.1. The second
    prompt comes at 0.15, during the step from 0.1 to 0.2; the next step computes it beside the first one's token:
    100 + 100 ms, until 0.4. Then both decode: the first ends at 0.4, the second at 0.5 and 0.6."""
    (first, second), _ = play(prompt(1), prompt(2, starts_at=0.15), clusters=(here(0, 1),))

    assert (first.ttft_s, first.total_s) == (about(0.10), about(0.40))
    assert (second.ttft_s, second.total_s) == (about(0.25), about(0.45))


def test_a_sequence_goes_on_elsewhere_when_its_decode_worker_dies() -> None:
    """Tokens at 0.10 (prefill worker), 0.21, 0.31; the decode worker dies at 0.35 with three tokens told. The prefill
    worker caches the prompt's 10 pages and computes the 3 tokens: the fourth comes at 0.353. The new decode worker
    needs 11 pages: 100,000 bytes are there at once and sent by 0.45, the last page of 10,000 by 0.46. The fifth token
    is made at 0.56."""
    (record,), result = play(
        prompt(1, output_tokens=5),
        clusters=(here(1, 2),),
        deaths=(WorkerDeath(0.35, WorkerId("here/decode-0")),),
    )

    assert (record.ok, record.output_tokens) == (True, 5)
    assert (record.ttft_s, record.total_s) == (about(0.10), about(0.56))
    assert timing(record).bytes_shipped == 100_000 + 110_000
    assert (result.num_retries, result.num_resumes) == (0, 1)


def test_a_prompt_is_computed_elsewhere_when_its_worker_dies() -> None:
    """Half of it is lost at 0.05; the other worker computes it until 0.15."""
    (record,), result = play(prompt(1), clusters=(here(2, 1),), deaths=(WorkerDeath(0.05, WorkerId("here/prefill-0")),))

    assert (record.ok, record.ttft_s, record.total_s) == (True, about(0.15), about(0.36))
    assert (result.num_retries, result.num_resumes) == (1, 0)


def test_a_worker_that_restarts_joins_with_an_empty_cache() -> None:
    """The only prefill worker dies at 1.0 and is back at 2.0. What comes at 1.5 is prefilled by the decode worker,
    which caches the prompt, all but its last page: 10 ms. What comes at 5.0 is computed anew: 100 ms."""
    (_, between, after), _ = play(
        prompt(1, content=7),
        prompt(2, starts_at=1.5, content=7),
        prompt(3, starts_at=5.0, content=7),
        deaths=(WorkerDeath(1.0, WorkerId("here/prefill-0"), restart_s=1.0),),
        policy="cache_aware",
    )

    assert (timing(between).prefill_worker, between.ttft_s) == (None, about(0.01))
    assert (timing(after).prefill_worker, after.ttft_s) == ("here/prefill-0", about(0.10))


def test_a_cut_link_costs_the_lease_and_then_nothing() -> None:
    """The remote worker, whose name comes first, is cut off in the middle of the prompt. It was heard of at most 0.25 s
    before that, at 0.05; its lease of 1 s runs out between 0.8 and 1.05, which is looked at every 0.1 s; then the local
    worker computes the prompt in 0.1 s: the token comes between 0.9 and 1.25. Later prompts stay here."""
    cut = replace(link(1e6), changes=(RateChange(0.05, 0.0),))

    (record, later), result = play(
        prompt(1), prompt(2, starts_at=5.0), clusters=(here(), away()), links=(cut,), lease_s=1.0
    )

    assert record.ok
    assert record.ttft_s is not None
    assert 0.9 <= record.ttft_s <= 1.25
    assert (timing(later).prefill_worker, later.ttft_s) == ("here/prefill-0", about(0.10))
    assert result.num_retries == 1


def test_a_mended_link_is_used_again() -> None:
    """Cut from 1 to 5: the remote worker's lease runs out meanwhile, it registers again when it can."""
    cut = replace(link(1e6), changes=(RateChange(1.0, 0.0), RateChange(5.0, 1.0)))

    (during, after), _ = play(
        prompt(1, starts_at=3.0), prompt(2, starts_at=10.0), clusters=(here(), away()), links=(cut,), lease_s=1.0
    )

    assert timing(during).prefill_worker == "here/prefill-0"
    assert timing(after).prefill_worker == "away/prefill-0"


def test_workers_on_one_device_compute_in_turns() -> None:
    """The first prompt until 0.1; its K/V is there at 0.11. The second prompt comes at 0.05 and stands in line before
    the decode worker: until 0.2. Then the decode worker's step until 0.3, with the first sequence; the second one's K/V
    is there at 0.21, too late for it. Both decode until 0.4, and the second until 0.5."""
    (first, second), _ = play(prompt(1), prompt(2, starts_at=0.05), clusters=(replace(here(), shares_device=True),))

    assert (first.ttft_s, first.total_s) == (about(0.10), about(0.40))
    assert (second.ttft_s, second.total_s) == (about(0.15), about(0.45))


def test_pulled_pages_are_not_computed() -> None:
    """The second prompt is the first one's, and goes to the prefill worker that does not have it. Of its 100 tokens 90
    may come from a cache: 9 pages, 90,000 bytes, 0.09 s from the other one. 10 tokens are computed until 0.10. The
    decode worker caches everything."""
    (_, pulled), _ = play(
        prompt(1, content=7), prompt(2, starts_at=5.0, content=7), clusters=(here(2, 1),), policy=TurnAbout()
    )

    assert (timing(pulled).prefill_worker, timing(pulled).cached_tokens) == ("here/prefill-1", 90)
    assert (timing(pulled).pull_outcome, timing(pulled).pulled_tokens) == ("pulled", 90)
    assert (timing(pulled).pull_s, pulled.ttft_s) == (about(0.09), about(0.10))


def test_a_pull_that_takes_too_long_costs_its_limit() -> None:
    """0.05 s are given to the pull; then all 100 tokens are computed, until 0.15."""
    (_, late), _ = play(
        prompt(1, content=7), prompt(2, starts_at=5.0, content=7), clusters=(here(2, 1),), policy=TurnAbout(0.05)
    )

    assert (timing(late).pull_outcome, late.ttft_s) == ("timeout", about(0.15))


class TurnAbout:
    """The n-th request goes to prefill worker n, and pulls from the one before it."""

    uses_prefixes = False

    def __init__(self, timeout_s: float | None = None) -> None:
        self._timeout_s = timeout_s

    def route(self, request: RouteRequest, view: ClusterView) -> Route:
        prefill, decode = view.ready(Role.PREFILL), view.ready(Role.DECODE)[0]
        pull = PagePull(prefill[request.ordinal - 1], request.num_tokens, self._timeout_s) if request.ordinal else None
        return Route(prefill[request.ordinal], decode, "turn about", pull)
