from __future__ import annotations

import asyncio

import pytest

from cluster.simulator.virtual_loop import Deadlock, run, running_loop


def test_sleepers_wake_at_their_instants_without_waiting() -> None:
    async def main() -> list[tuple[float, str]]:
        seen: list[tuple[float, str]] = []

        async def sleep(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((running_loop().now(), name))

        await asyncio.gather(sleep("year", 365 * 86400.0), sleep("second", 1.0), sleep("none", 0.0))
        return seen

    assert run(main()) == [(0.0, "none"), (1.0, "second"), (365 * 86400.0, "year")]


def test_timeouts_of_production_code_are_in_virtual_time() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(7.5):
                await running_loop().create_future()
        return running_loop().now()

    assert run(main()) == 7.5


def test_waiting_for_nobody_is_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.sleep(3.0)
        await running_loop().create_future()

    with pytest.raises(Deadlock, match=r"at 3\.0"):
        run(main())


def test_there_is_no_other_thread() -> None:
    async def main() -> None:
        await asyncio.to_thread(lambda: None)

    with pytest.raises(RuntimeError, match="one thread"):
        run(main())


def test_time_is_the_instant_of_the_timer_to_the_last_bit() -> None:
    async def main() -> list[float]:
        loop, seen = running_loop(), list[float]()
        await asyncio.sleep(0.1)
        loop.call_at(0.7, lambda: seen.append(loop.now()))
        loop.call_later(0.2, lambda: seen.append(loop.now()))
        await asyncio.sleep(1.0)
        return seen

    assert run(main()) == [0.1 + 0.2, 0.7]


def test_timers_of_one_instant_go_in_the_order_in_which_they_were_set() -> None:
    async def main() -> list[int]:
        loop, seen = running_loop(), list[int]()
        for number in range(20):
            loop.call_at(1.0 if number % 2 else 0.5 + 0.5, seen.append, number)
        await asyncio.sleep(2.0)
        return seen

    assert run(main()) == list(range(20))


def test_cancelled_timers_never_run_and_do_not_pile_up() -> None:
    async def main() -> tuple[list[int], int]:
        loop, seen = running_loop(), list[int]()
        kept = [loop.call_at(5.0 + number, seen.append, number) for number in range(3)]
        for _ in range(10_000):
            loop.call_at(60.0, seen.append, -1).cancel()
        kept[1].cancel()
        num_timers = loop.num_timers
        await asyncio.sleep(100.0)
        return seen, num_timers

    seen, num_timers = run(main())

    assert seen == [0, 2]
    assert num_timers < 2000


def test_what_a_callback_raises_ends_the_run() -> None:
    async def main() -> None:
        running_loop().call_later(1.0, int, "seven")
        await asyncio.sleep(2.0)

    with pytest.raises(ValueError, match="seven"):
        run(main())
