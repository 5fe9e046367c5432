"""Does it all work together? Two datacenters on this machine, one story, every step of it checked (``make scenarios``).

    a  long prompts are prefilled in west, short ones stay in east
    b  the link is narrowed to a tenth: the threshold moves within two seconds; wide again, it moves back
    c  a surge of long answers: a worker of east turns from prefill to decode, and afterwards back
    d  the link is cut: within the lease everything stays in east; mended, west is tested and used again

No request may fail, whatever happens, and greedy tokens must be those that one engine makes alone. Written besides: the
time series (JSON) and a picture of it (PNG). Exit code 0: every check held, or there can be no namespaces here.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.datacenters import EAST, HTTP_PORT, LEASE_S, VOCAB_SIZE, WEST, TwoDatacenters, engine_config
from benchmarks.fleet_recorder import INTERVAL_S, FleetRecorder, Sample, draw, write_json
from benchmarks.network_lab import NetworkLab, NetworkPath, why_unavailable
from benchmarks.orderly_exit import exit_on_sigterm
from benchmarks.page_camera import PageCamera, find_browser
from benchmarks.steady_load import Mix, Request, SteadyLoad
from cluster.service_process import ServiceNotHealthy
from core.clock import WallClock
from core.request import SamplingParams, SequenceId, SequenceSpec
from engine.engine import Engine

WIDE_GBPS = 0.5
NARROW_GBPS = WIDE_GBPS / 10
WIDE = WIDE_GBPS * 1e9 / 8  # bytes/s
_BUSY = 0.1  # share of the wide link from which K/V is known to be on it
SHORTEST, LONGEST = 48, 1024  # tokens of a prompt
CALM = Mix(rate_rps=1.5, prompt_tokens=(SHORTEST, LONGEST), output_tokens=6)
LONG_ANSWERS = Mix(rate_rps=0.5, prompt_tokens=(SHORTEST, 4 * SHORTEST), output_tokens=48)
LONG_PROMPTS = Mix(rate_rps=3.0, prompt_tokens=(4 * SHORTEST, LONGEST), output_tokens=4)
BURST = 32  # of them at once, more than are decoded at a time: a queue grows

STEPS = "abcd"
READY_WITHIN_S = 120.0
MOVES_WITHIN_S = 2.0
MOVES_BACK_WITHIN_S = 25.0
CONVERTS_WITHIN_S = 30.0
CONVERTS_BACK_WITHIN_S = 60.0
WEST_IS_BACK_WITHIN_S = 25.0
# What its first self-test measures on a path that TCP still takes for lossy is a thousandth of what it carries; the
# planner believes that until its next look.
WEST_PREFILLS_WITHIN_S = 25.0

# Everything that a planner of a fleet does in minutes, in seconds.
PLANNER: dict[str, Any] = {
    "mode": "dual",
    "demand_window_s": 6.0,
    "retest_s": 1.5,
    "dual": {
        "balance_s": 4.0,
        "abundant_after_s": 2.0,
        "high_queue_s": 1.0,
        "period_s": 1.0,
        "min_requests": 8,
        "min_role_gain": 0.05,
        "patience": 1,
        "cooldown_s": 4.0,
        "conversion_s": 1.0,
    },
}


@dataclass
class Checks:
    """What was checked so far; each is a line as it comes."""

    now: Callable[[], float]
    results: list[dict[str, object]] = field(default_factory=list)

    def __call__(self, ok: bool, fact: str, seen: str = "") -> None:
        self.results.append({"at": self.now(), "ok": ok, "fact": fact, "seen": seen})
        say(f"{'  ok ' if ok else 'FAILED'} {fact}{f' ({seen})' if seen else ''}")

    @property
    def num_failed(self) -> int:
        return sum(not result["ok"] for result in self.results)


class Story:
    """The steps, on a fleet that serves."""

    def __init__(
        self,
        lab: NetworkLab,
        load: SteadyLoad,
        recorder: FleetRecorder,
        checks: Checks,
        camera: PageCamera | None = None,
    ) -> None:
        """``camera``: photographs the gateway's page before and after the link degrades."""
        self._camera = camera
        self._lab = lab
        self._load = load
        self._recorder = recorder
        self._check = checks

    async def tell(self, letters: str = STEPS) -> None:
        """The steps of these letters, in order."""
        steps = {
            "a": self.long_prompts_go_to_west,
            "b": self.the_link_is_narrowed_and_widened,
            "c": self.long_answers_convert_a_worker,
            "d": self.the_link_is_cut_and_mended,
        }
        for step in (steps[letter] for letter in letters):
            num_failed = len(self._load.failed)
            await step()
            self._nothing_failed(num_failed)

    async def long_prompts_go_to_west(self) -> None:
        """a: measured once a threshold has been chosen and has stood for a while."""
        say("a  long prompts go to west, short ones stay")
        self._load.mix = CALM
        settled = await self._recorder.wait_for(lambda sample: sample.threshold_tokens is not None, 20.0)
        self._check(settled is not None, "the planner chooses a threshold", self._threshold())
        began_at = self._recorder.mark("a: steady")
        await asyncio.sleep(10.0)
        asked = await self._answered(began_at)
        highest, lowest = self._thresholds_since(began_at)
        far = [len(r.prompt_ids) for r in asked if r.prefill_worker.startswith(WEST)]
        near = [len(r.prompt_ids) for r in asked if not r.prefill_worker.startswith(WEST)]
        said = f"t from {lowest:.0f} to {highest:.0f} tokens"
        self._check(
            bool(far) and min(far) > lowest, "prompts shorter than t stay in east", f"{said}, west {_span(far)}"
        )
        self._check(bool(near) and max(near) <= highest, "longer ones go to west", f"{said}, east {_span(near)}")

    async def the_link_is_narrowed_and_widened(self) -> None:
        """b: by ``tc``, while K/V is on it."""
        say(f"b  the link from {WIDE_GBPS:g} to {NARROW_GBPS:g} Gbit/s, and back")
        before = self._recorder.last.threshold_tokens or math.inf
        await self._photograph("page-before")
        for _ in range(2):
            self._load.spawn(LONGEST, CALM.output_tokens)
        await self._recorder.wait_for(lambda sample: sample.link_received > _BUSY * WIDE, 10.0)
        self._lab.reshape(NARROW_GBPS)
        narrowed_at = self._recorder.mark("b: link / 10")
        moved = await self._recorder.wait_for(lambda sample: _threshold(sample) > 1.02 * before, 10.0)
        took_s = math.inf if moved is None else moved.at - narrowed_at
        within = took_s <= MOVES_WITHIN_S + INTERVAL_S
        self._check(
            within, f"t rises within {MOVES_WITHIN_S:g} s", f"after {took_s:.1f} s, {before:.0f} to {self._threshold()}"
        )
        await asyncio.sleep(6.0)
        await self._photograph("page-after")
        high = _threshold(self._recorder.last)
        self._lab.reshape(WIDE_GBPS)
        widened_at = self._recorder.mark("b: wide again")
        middle = before + 0.5 * (min(high, 2.0 * LONGEST) - before)
        back = await self._recorder.wait_for(lambda sample: _threshold(sample) <= middle, MOVES_BACK_WITHIN_S)
        took_s = math.inf if back is None else back.at - widened_at
        self._check(
            back is not None, "t moves back when it is wide", f"after {took_s:.1f} s, {high:.0f} to {self._threshold()}"
        )

    async def long_answers_convert_a_worker(self) -> None:
        """c: the roles of east are those that its workers themselves advertise."""
        say("c  a surge of long answers")
        before = self._roles()
        self._load.mix = LONG_ANSWERS
        began_at = self._recorder.mark("c: long answers")
        for number in range(BURST):
            self._load.spawn(self._load.next_length(number), LONG_ANSWERS.output_tokens)
        more = await self._recorder.wait_for(lambda sample: sample.num_decode > before[1], CONVERTS_WITHIN_S)
        took_s = math.inf if more is None else more.at - began_at
        self._check(
            more is not None,
            "a worker turns to decode",
            f"after {took_s:.1f} s, {_roles(before)} to {_roles(self._roles())}",
        )
        self._load.mix = LONG_PROMPTS
        ended_at = self._recorder.mark("c: short ones")
        back = await self._recorder.wait_for(lambda sample: sample.num_decode == before[1], CONVERTS_BACK_WITHIN_S)
        took_s = math.inf if back is None else back.at - ended_at
        self._check(back is not None, "and back when they are short", f"after {took_s:.1f} s, {_roles(self._roles())}")

    async def the_link_is_cut_and_mended(self) -> None:
        """d: packets stop; no interface of either side goes down."""
        say("d  the link is cut, and mended")
        self._load.mix = CALM
        await self._recorder.wait_for(lambda sample: sample.num_west_usable > 0, 10.0)
        self._lab.cut()
        cut_at = self._recorder.mark("d: cut")
        allowed_s = 1.1 * LEASE_S + 2 * INTERVAL_S
        gone = await self._recorder.wait_for(lambda sample: sample.num_west == 0, 3 * LEASE_S)
        took_s = math.inf if gone is None else gone.at - cut_at
        self._check(took_s <= allowed_s, "west is out within the lease", f"{took_s:.1f} s of {LEASE_S:g} s")
        alone_at = self._load.now
        await asyncio.sleep(3.0)
        stayed = await self._answered(alone_at)
        far = [r for r in stayed if r.prefill_worker.startswith(WEST)]
        self._check(bool(stayed) and not far, "then everything stays in east", f"{len(stayed)} requests")
        self._lab.mend()
        mended_at = self._recorder.mark("d: mended")
        usable = await self._recorder.wait_for(lambda sample: sample.num_west_usable > 0, WEST_IS_BACK_WITHIN_S)
        took_s = math.inf if usable is None else usable.at - mended_at
        self._check(usable is not None, "west registers and passes its self-tests", f"after {took_s:.1f} s")
        used = await self._until(lambda: self._went_west(mended_at), WEST_PREFILLS_WITHIN_S)
        self._check(used, "and prefills again", f"{self._load.now - mended_at:.1f} s after it was mended")
        retried = [r for r in self._load.since(0.0) if r.num_attempts > 1 and r.sent_at >= cut_at - 5.0]
        say(f"       {len(retried)} requests were moved from west to east under way")

    # ---- inside ----

    async def _photograph(self, name: str) -> None:
        if self._camera is not None:
            say(f"written: {await self._camera.shoot(name)}")

    def _nothing_failed(self, num_before: int) -> None:
        failed = self._load.failed[num_before:]
        self._check(not failed, "no request fails", failed[0].error if failed else f"{len(self._load.requests)} so far")

    async def _answered(self, instant: float) -> list[Request]:
        """Requests sent from then to now, once all of them have ended."""
        until = self._load.now
        asked = [r for r in self._load.requests if instant <= r.sent_at <= until]
        await self._until(lambda: all(r.ended_at is not None for r in asked), 30.0)
        return [r for r in asked if r.ended_at is not None and not r.error]

    async def _until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        give_up_at = self._load.now + timeout_s
        while not condition():
            if self._load.now > give_up_at:
                return False
            await asyncio.sleep(0.05)
        return True

    def _went_west(self, instant: float) -> bool:
        return any(r.prefill_worker.startswith(WEST) for r in self._load.since(instant))

    def _threshold(self) -> str:
        return f"{_threshold(self._recorder.last):.0f} tokens"

    def _thresholds_since(self, instant: float) -> tuple[float, float]:
        seen = [_threshold(sample) for sample in self._recorder.samples if sample.at >= instant - INTERVAL_S]
        return max(seen), min(seen)

    def _roles(self) -> tuple[int, int]:
        return self._recorder.last.num_prefill, self._recorder.last.num_decode


def _threshold(sample: Sample) -> float:
    return math.inf if sample.threshold_tokens is None else sample.threshold_tokens


def _roles(roles: tuple[int, int]) -> str:
    return f"{roles[0]} prefill + {roles[1]} decode"


def _span(tokens: Sequence[int]) -> str:
    return f"{len(tokens)} of {min(tokens)} to {max(tokens)} tokens" if tokens else "none"


def compare_with_one_engine(model: str, load: SteadyLoad, checks: Checks) -> None:
    """A few of every kind of request, computed again by an engine that knows nothing of any other."""
    answered = load.since(0.0)
    kinds = {
        "prefilled in west": [r for r in answered if r.prefill_worker.startswith(WEST) and r.num_attempts == 1],
        "prefilled in east": [r for r in answered if not r.prefill_worker.startswith(WEST) and r.num_attempts == 1],
        "moved under way": [r for r in answered if r.num_attempts > 1],
        "long answers": [r for r in answered if r.output_tokens == LONG_ANSWERS.output_tokens],
    }
    chosen = {kind: found[-2:] for kind, found in kinds.items() if found}
    engine = Engine.load_model(engine_config(), model, WallClock())
    for kind, found in chosen.items():
        differing = [r.number for r in found if alone(engine, r) != r.output_ids]
        checks(not differing, f"tokens of requests {kind} are one engine's own", f"{len(found)} compared")


def alone(engine: Engine, request: Request) -> tuple[int, ...]:
    """What one engine makes of the request."""
    sampling = SamplingParams(max_tokens=request.output_tokens, temperature=0.0, ignore_eos=True)
    engine.add(SequenceSpec(SequenceId(f"alone-{request.number}"), request.prompt_ids, sampling))
    tokens: tuple[int, ...] = ()
    while engine.has_work:
        for chunk in engine.step().chunks:
            tokens += chunk.token_ids
    return tokens


async def run(
    lab: NetworkLab, load: SteadyLoad, recorder: FleetRecorder, checks: Checks, options: argparse.Namespace
) -> None:
    """The story, once the fleet serves."""
    browser = find_browser() if options.page is not None else None
    if options.page is not None and browser is None:
        say("no photographs of the page: there is no Chromium here")
    async with AsyncExitStack() as opened:
        await opened.enter_async_context(recorder)
        joined = await recorder.wait_for(lambda sample: sample.num_west_usable > 0, READY_WITHIN_S)
        checks(joined is not None, "west joins east's gateway, and its link passes its self-test")
        if joined is None:
            return
        await opened.enter_async_context(load)
        camera = None
        if browser is not None:
            camera = PageCamera(f"http://127.0.0.1:{HTTP_PORT}/", options.page, browser)
            await opened.enter_async_context(camera)
        await Story(lab, load, recorder, checks, camera).tell(options.steps)
        await load.stop()
        checks(await load.wait_for_all(30.0), "every request ends", f"{len(load.requests)} requests")


def main(arguments: Sequence[str] | None = None) -> int:
    """Tell the story; 0 if every check held, or nothing can be told here."""
    options = _parser().parse_args(arguments)
    exit_on_sigterm()  # processes and namespaces are taken down
    path = NetworkPath(rate_gbps=WIDE_GBPS, switched=True)
    reason = why_unavailable(path)
    if reason is not None:
        say(f"skipped: no two datacenters can be had here: {reason}")
        return 0
    with NetworkLab(path) as lab, tempfile.TemporaryDirectory(prefix="prfaas-") as folder:
        lab.left.enter()
        return _story(lab, Path(folder), options)


def _story(lab: NetworkLab, folder: Path, options: argparse.Namespace) -> int:
    fleet = TwoDatacenters(lab, folder, WIDE_GBPS, {"planner": PLANNER})
    load = SteadyLoad(fleet.door, CALM, VOCAB_SIZE)
    recorder = FleetRecorder(
        fleet.door,
        lab.left.device,
        now=lambda: load.now,
        num_under_way=lambda: load.num_under_way,
        shaped=lambda: lab.rate_now,
    )
    checks = Checks(lambda: load.now)
    try:
        with fleet:
            say("starting two datacenters, each with a Ray cluster of its own")
            fleet.wait_until_ready(READY_WITHIN_S)
            say(f"east serves, {load.now:.0f} s after the start")
            asyncio.run(run(lab, load, recorder, checks, options))
            if checks.num_failed:
                for name in (EAST, WEST):
                    print(f"\n---- the last lines of {name} ----\n{fleet.log(name)}", file=sys.stderr)
        compare_with_one_engine(fleet.model, load, checks)
    except ServiceNotHealthy as error:
        checks(False, "both datacenters start", str(error))
    finally:
        about = {"commit": report.commit(), "machine": report.machine(), "checks": checks.results}
        write_json(options.json, recorder, load.requests, about)
        if recorder.samples:
            draw(options.plot, recorder, load.requests, LONGEST)
    say(f"{len(checks.results) - checks.num_failed} of {len(checks.results)} checks held, {load.now:.0f} s")
    say(f"written: {options.json}, {options.plot}")
    return 1 if checks.num_failed else 0


def say(line: str) -> None:
    """To whoever watches."""
    print(f"scenarios: {line}", flush=True)


def _steps(letters: str) -> str:
    if not letters or not set(letters) <= set(STEPS):
        raise argparse.ArgumentTypeError(f"must be some of {STEPS}")
    return letters


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scenarios", description=(__doc__ or "").partition("\n")[0]
    )
    build = Path("build")
    parser.add_argument("--json", type=Path, default=build / "scenarios.json", metavar="FILE", help="the time series")
    parser.add_argument("--plot", type=Path, default=build / "scenarios.png", metavar="FILE", help="its picture")
    parser.add_argument("--steps", default=STEPS, type=_steps, metavar="LETTERS", help=f"which, of {STEPS}")
    parser.add_argument("--page", type=Path, metavar="DIR", help="photograph the gateway's page in step b, in Chromium")
    return parser


if __name__ == "__main__":
    sys.exit(main())
