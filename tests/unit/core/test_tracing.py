"""W3C's trace context, which requests are traced, and spans of steps."""

import pytest

from core.tracing import TRACING_OFF, SpanLog, TraceContext, Tracing, record_steps

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_traceparent_is_read_and_written_as_it_was():
    context = TraceContext.parse(f"00-{TRACE}-{SPAN}-01")

    assert context == TraceContext(TRACE, SPAN, True)
    assert str(context) == f"00-{TRACE}-{SPAN}-01"
    assert TraceContext.parse(f" 00-{TRACE}-{SPAN}-00 ") == TraceContext(TRACE, SPAN, False)


def test_a_later_version_may_say_more():
    assert TraceContext.parse(f"01-{TRACE}-{SPAN}-03-what-it-may-be") == TraceContext(TRACE, SPAN, True)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
    ],
)
def test_what_is_no_traceparent_is_as_none(given):
    assert TraceContext.parse(given) is None


def test_a_child_is_another_span_of_the_same_trace():
    parent = TraceContext.new()
    child = parent.child()

    assert (child.trace_id, child.sampled) == (parent.trace_id, True)
    assert child.span_id != parent.span_id
    assert TraceContext.parse(str(child)) == child


def test_the_clients_word_counts_and_the_ratio_if_it_says_nothing():
    sampled, unsampled = TraceContext(TRACE, SPAN), TraceContext(TRACE, SPAN, False)
    never, always = Tracing(SpanLog(), 0.0), Tracing(SpanLog(), 1.0)

    assert (root := never.root(sampled)) is not None
    assert (root.trace_id, root.span_id != SPAN) == (TRACE, True)
    assert always.root(unsampled) is None
    assert never.root(None) is None
    assert always.root(None) is not None
    assert TRACING_OFF.root(sampled) is None


def test_the_ratio_is_a_share_of_requests():
    half = Tracing(SpanLog(), 0.5)

    assert 350 < sum(half.root(None) is not None for _ in range(1000)) < 650


def test_steps_follow_each_other_and_what_took_no_time_is_left_out():
    log, parent = SpanLog(), TraceContext.new()

    record_steps(log, parent, 10.0, {"a": 1.0, "b": 0.0, "c": 2.0})

    assert [(s.name, s.began_at, s.ended_at, s.parent) for s in log.spans] == [
        ("a", 10.0, 11.0, parent),
        ("c", 11.0, 13.0, parent),
    ]
