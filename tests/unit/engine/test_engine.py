"""The engine joins its parts: what goes in comes out once, what fails fails alone, and no page is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from core.clock import VirtualClock
from core.compute import StepSample
from core.errors import InvalidConfig, InvalidRequest, ProtocolViolation, UnsupportedModel
from core.prefix_hash import page_hashes
from core.request import FinishReason, SamplingParams, SequenceId, SequenceSpec, TokenChunk
from engine.config import EngineConfig
from engine.engine import Engine, StepOutput
from engine.model_runner import ModelRunner
from engine.scheduler import PrefixRoom
from engine.step_plan import StepPlan
from tests.tiny_models import MAX_LEN, VOCAB_SIZE, save_tiny_model

PROMPT = tuple(range(20, 31))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    engine = load(folder)
    yield engine
    engine.check_integrity()


def load(folder: Path, **settings: Any) -> Engine:
    config = EngineConfig(
        **{"device": "cpu", "threads": 1, "dtype": "float32", "page_size": 4, "num_pages": 32, **settings}
    )
    return Engine.load_model(config, str(folder), VirtualClock())


def spec(name: str, prompt: Sequence[int] = PROMPT, *, hold_kv: bool = False, **sampling: Any) -> SequenceSpec:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **sampling})
    return SequenceSpec(SequenceId(name), tuple(prompt), params, hold_kv=hold_kv)


def drain(engine: Engine) -> list[StepOutput]:
    outputs = []
    while engine.has_work:
        outputs.append(engine.step())
    return outputs


def chunks(outputs: Sequence[StepOutput]) -> list[TokenChunk]:
    return [chunk for output in outputs for chunk in output.chunks]


def test_a_sequence_comes_out_token_by_token_and_ends(engine: Engine) -> None:
    engine.add(spec("a"))

    out = chunks(drain(engine))

    assert [chunk.position for chunk in out] == [0, 1, 2, 3]
    assert all(len(chunk.token_ids) == 1 for chunk in out)
    assert [chunk.finish_reason for chunk in out] == [None, None, None, FinishReason.LENGTH]
    assert not engine.has_work


def test_an_engine_without_work_steps_to_nothing(engine: Engine) -> None:
    assert engine.step() == StepOutput()


def test_describes_itself(engine: Engine) -> None:
    assert engine.model.architecture == "LlamaForCausalLM"
    assert (engine.model.max_model_len, engine.model.vocab_size) == (4 * 32, VOCAB_SIZE)
    assert engine.layout is engine.pool.layout
    assert engine.fingerprint.layout == engine.layout.fingerprint()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (spec("a", [1, VOCAB_SIZE]), "prompt"),
        (spec("a", [-1]), "prompt"),
        (spec("a", [1] * MAX_LEN), "prompt"),
        (spec("a", logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
        (SequenceSpec(SequenceId("a"), (1,), SamplingParams(), output_token_ids=(VOCAB_SIZE,)), "output_token_ids"),
    ],
)
@pytest.mark.parametrize("call", [Engine.check, Engine.add, Engine.reserve])
def test_what_can_never_run_is_refused_and_changes_nothing(
    engine: Engine, call: Callable[[Engine, SequenceSpec], object], bad: SequenceSpec, field: str
) -> None:
    before = engine.load()

    with pytest.raises(InvalidRequest) as raised:
        call(engine, bad)

    assert raised.value.field == field
    assert engine.load() == before


def test_load_counts(engine: Engine) -> None:
    engine.add(spec("a"))
    engine.add(spec("b"))
    assert (engine.load().num_waiting, engine.load().num_waiting_tokens) == (2, 22)

    engine.step()
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.pages_total) == (2, 0, 32)
    assert load.pages_free < 32
    drain(engine)
    load = engine.load()
    assert (load.num_running, load.pages_free, load.generated_tokens, load.prompt_tokens) == (0, 32, 8, 22)


def test_a_step_says_what_it_held_and_how_long_it_took(folder: Path) -> None:
    clock = VirtualClock()
    config = EngineConfig(
        device="cpu", threads=1, dtype="float32", page_size=4, num_pages=32, max_batch_tokens=8, max_batch_size=8
    )
    engine = Engine.load_model(config, str(folder), clock)
    engine.listener = Slow(clock)
    engine.add(spec("a", max_tokens=3))
    drain(engine)

    samples = engine.take_step_samples()

    assert samples == (
        StepSample(8, 8 * 4.0, 0, 0, 2.0),
        StepSample(3, 3 * (8 + 1.5), 0, 0, 2.0),
        StepSample(0, 0.0, 1, 12, 2.0),
        StepSample(0, 0.0, 1, 13, 2.0),
    )
    assert [(s.is_prefill, s.is_decode) for s in samples] == [(True, False)] * 2 + [(False, True)] * 2
    assert engine.take_step_samples() == ()


def test_no_more_steps_wait_to_be_reported_than_a_report_holds(engine: Engine) -> None:
    engine.add(spec("a", max_tokens=100))
    drain(engine)

    assert len(engine.take_step_samples()) == 64


def test_a_step_that_failed_is_no_sample(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(ModelRunner, "run", fail)
    engine.add(spec("a"))
    engine.step()

    assert engine.take_step_samples() == ()


class Slow:
    """A listener that spends a second on each layer."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        pass

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        return lambda layer: self._clock.advance(1.0)


def test_abort_ends_a_sequence_in_any_state(engine: Engine) -> None:
    engine.add(spec("waiting"))
    assert engine.abort(SequenceId("waiting"))
    engine.add(spec("running"))
    engine.step()
    assert engine.abort(SequenceId("running"))
    engine.add(spec("held", hold_kv=True))
    drain(engine)
    assert engine.abort(SequenceId("held"))

    assert not engine.abort(SequenceId("held"))
    assert not engine.has_work


def test_a_held_sequence_keeps_its_pages_until_release(engine: Engine) -> None:
    engine.add(spec("a", hold_kv=True))

    out = chunks(drain(engine))

    assert len(out) == 1
    assert engine.load().pages_free == 32 - 3
    assert engine.release(SequenceId("a"))
    assert engine.load().pages_free == 32
    assert not engine.release(SequenceId("a"))


def test_a_reservation_is_admitted_or_cancelled(engine: Engine) -> None:
    reservation = engine.reserve(spec("a"))
    assert reservation is not None
    engine.cancel(reservation)
    with pytest.raises(ProtocolViolation):
        engine.admit(reservation, [5])

    again = engine.reserve(spec("a"))
    assert again is not None
    engine.admit(again, [5])
    assert [chunk.position for chunk in chunks(drain(engine))] == [1, 2, 3]


class Notes:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, object]] = []

    def sequence_started(self, spec: SequenceSpec, num_cached_tokens: int, page_ids: Sequence[int]) -> None:
        self.heard.append(("started", (spec.sequence_id, num_cached_tokens, len(page_ids))))

    def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
        self.heard.append(("planned", tuple((item.sequence_id, item.start) for item in plan.items)))
        return lambda layer: self.heard.append(("stored", layer))


def test_pages_are_reserved_while_a_step_computes(folder: Path) -> None:
    """From another thread, as a decode worker's grants are: whoever asks does not wait for the step."""
    engine = load(folder, num_pages=8)
    reserved: list[Any] = []

    class Asker:
        def sequence_started(self, *arguments: Any) -> None:
            pass

        def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
            return self.layer_stored

        def layer_stored(self, layer: int) -> None:
            name = f"r{len(reserved)}"
            thread = Thread(target=lambda: reserved.append(engine.reserve(spec(name))), daemon=True)
            thread.start()
            thread.join(10.0)
            assert not thread.is_alive()

    engine.listener = Asker()
    engine.add(spec("a"))
    expected = chunks(drain(load_and_add(folder)))
    assert [chunk.token_ids for chunk in chunks(drain(engine))] == [chunk.token_ids for chunk in expected]
    taken = [reservation for reservation in reserved if reservation is not None]
    assert 1 <= len(taken) < len(reserved), "the pool holds some of them"
    assert len({page for reservation in taken for page in reservation.page_ids}) == 3 * len(taken)
    for reservation in taken:
        engine.cancel(reservation)
    engine.check_integrity()


def test_prefixes_come_and_go_while_a_step_computes(folder: Path) -> None:
    """From other threads, as pulls do: no step waits for them, nor they for a step."""
    engine = load(folder, num_pages=32)
    engine.add(spec("warm", hold_kv=True))
    drain(engine)
    engine.release(SequenceId("warm"))
    here, other = page_hashes(PROMPT, engine.layout.page_size), page_hashes(PROMPT[::-1], engine.layout.page_size)
    seen: list[tuple[int, tuple[int, ...], PrefixRoom | None]] = []

    def pull() -> None:
        lent, room = engine.lend_prefix(here), engine.expect_prefix(other, 0)
        if room is not None:
            engine.adopt(room)
        seen.append((engine.num_known_pages(other), lent, room))

    class Asker:
        def sequence_started(self, *arguments: Any) -> None:
            pass

        def step_planned(self, plan: StepPlan) -> Callable[[int], None]:
            return self.layer_stored

        def layer_stored(self, layer: int) -> None:
            thread = Thread(target=pull, daemon=True)
            thread.start()
            thread.join(10.0)
            assert not thread.is_alive()

    engine.listener = Asker()
    engine.add(spec("a"))
    expected = [chunk.token_ids for chunk in chunks(drain(load_and_add(folder)))]
    assert [chunk.token_ids for chunk in chunks(drain(engine))] == expected
    assert len(here) == len(other) >= 1
    for num_known, lent, room in seen:
        assert num_known == len(other)
        assert len(lent) == len(here)
        assert room is not None
        engine.take_back(lent)
    engine.check_integrity()


def load_and_add(folder: Path) -> Engine:
    engine = load(folder)
    engine.add(spec("a"))
    return engine


def test_the_listener_hears_starts_then_the_plan_then_every_layer(folder: Path) -> None:
    engine = load(folder, max_prefill_chunk=8)
    engine.add(spec("first", max_tokens=1))
    drain(engine)
    notes = engine.listener = Notes()
    engine.add(spec("a", (*PROMPT[:8], *range(60, 70)), max_tokens=2))

    drain(engine)

    stored = [("stored", 0), ("stored", 1)]
    assert notes.heard == [
        ("started", ("a", 8, 5)),
        ("planned", (("a", 8),)),
        *stored,
        ("planned", (("a", 16),)),
        *stored,
        ("planned", (("a", 18),)),
        *stored,
    ]


def test_a_step_that_raises_fails_its_sequences_alone_and_the_engine_goes_on(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: ModelRunner, *_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    engine.add(spec("a"))
    engine.add(spec("b"))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", fail)
        output = engine.step()

    assert [failure.sequence_id for failure in output.failures] == ["a", "b"]
    assert all(failure.retryable and "out of memory" in failure.message for failure in output.failures)
    assert output.chunks == ()
    assert "a step of 2 sequences failed" in caplog.text
    engine.check_integrity()
    engine.add(spec("c"))
    assert len(chunks(drain(engine))) == 4


def test_sequences_that_were_not_in_the_failing_step_live(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(folder, max_batch_size=1)
    engine.add(spec("a"))
    engine.add(spec("b"))
    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", lambda *_, **__: 1 / 0)
        assert [failure.sequence_id for failure in engine.step().failures] == ["a"]

    assert {chunk.sequence_id for chunk in chunks(drain(engine))} == {"b"}


def test_seeded_sampling_does_not_depend_on_company(folder: Path) -> None:
    alone, crowd = load(folder, prefix_cache=False), load(folder, prefix_cache=False, max_prefill_chunk=3)
    wanted = spec("a", temperature=1.0, seed=11, max_tokens=8)
    alone.add(wanted)
    for i in range(4):
        crowd.add(spec(f"other-{i}", (i + 1, 2, 3), temperature=1.5, seed=i, max_tokens=9))
    crowd.add(wanted)

    expected = [chunk.token_ids for chunk in chunks(drain(alone))]

    assert [c.token_ids for c in chunks(drain(crowd)) if c.sequence_id == "a"] == expected


def test_check_integrity_notices_a_lost_page(folder: Path) -> None:
    engine = load(folder)
    reservation = engine.reserve(spec("a"))
    assert reservation is not None
    engine._allocator.retain(reservation.page_ids)
    engine.cancel(reservation)

    with pytest.raises(AssertionError, match="pages are in use"):
        engine.check_integrity()


def test_what_cannot_be_served_is_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"no config.json"):
        load(tmp_path)
    with pytest.raises(InvalidConfig, match=r"engine.attention"):
        load(folder, attention="no such")
    if not torch.cuda.is_available():
        with pytest.raises(InvalidConfig, match=r"engine.device"):
            load(folder, device="cuda")
