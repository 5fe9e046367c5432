"""Readers get their turns: a few in each turn of the event loop, in their order."""

from __future__ import annotations

import asyncio
from itertools import pairwise

from cluster.inbox import WAKES_A_TURN, Wakes


async def test_readers_run_a_few_in_a_turn_in_their_order_and_all_of_them() -> None:
    loop, wakes = asyncio.get_running_loop(), Wakes()
    waiters = [loop.create_future() for _ in range(3 * WAKES_A_TURN)]
    gone = waiters[WAKES_A_TURN + 1]
    num_woken: list[int] = []

    for waiter in waiters:
        wakes.wake(waiter)
    gone.cancel()
    while not all(waiter.done() for waiter in waiters):
        num_woken.append(sum(waiter.done() and waiter is not gone for waiter in waiters))
        assert [w.done() for w in waiters if w is not gone] == sorted(
            (w.done() for w in waiters if w is not gone), reverse=True
        )
        await asyncio.sleep(0)

    assert num_woken[0] == WAKES_A_TURN
    assert all(later - earlier <= WAKES_A_TURN for earlier, later in pairwise(num_woken))
    alone = loop.create_future()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    wakes.wake(alone)
    assert alone.done()  # one alone waits for no turn
