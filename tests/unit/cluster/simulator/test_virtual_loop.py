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
