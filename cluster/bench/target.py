"""What does the load generator know of an endpoint? A seam: one class for each protocol, made in endpoints.py.

A request is made in two steps, so that nothing slow stands between its instant and its sending: ``prepare`` writes the
message, on any thread, ahead of time; ``send`` sends it and tells a ``Stopwatch`` what comes, as it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cluster.bench.client_record import CHUNKS
from core.clock import Clock
from core.errors import PrfaasError

CHAT, COMPLETIONS, GRPC = "chat", "completions", "grpc"
APIS = (CHAT, COMPLETIONS, GRPC)

AUTO, ON, OFF = "auto", "on", "off"
IGNORE_EOS = (AUTO, ON, OFF)

USER, ASSISTANT = "user", "assistant"


class EndpointFailed(PrfaasError):
    """The endpoint cannot be used at all: nobody answers, it refuses the key, or it serves no such model."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What an endpoint said of itself before the run. None: it did not say."""

    model: str
    max_model_len: int | None = None
    vocab_size: int | None = None
    ignore_eos: bool = False  # whether it knows the field; without it answers may be shorter than asked for
    # Tokens that the server counts in a prompt of n words: overhead_tokens + n * tokens_per_word. Measured.
    tokens_per_word: float = 1.0
    overhead_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


Prompt = str | tuple[int, ...] | tuple[Message, ...]  # text, token ids, or a chat


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as the protocol's client gets it."""

    prompt: Prompt
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What a finished request amounted to; ``error`` says why another did not."""

    text: str = ""
    token_ids: tuple[int, ...] = ()  # where the protocol has them
    output_tokens: int = 0
    counted_by: str = CHUNKS
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None
    error_message: str | None = None
    timing: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Stopwatch:
    """When one request was sent and its output came. Instants on ``clock``."""

    clock: Clock
    sent_at: float = 0.0
    chunk_at: list[float] = field(default_factory=list)
    ended_at: float = 0.0

    def send(self) -> None:
        """The request goes out now."""
        self.sent_at = self.ended_at = self.clock.now()

    def chunk(self) -> None:
        """A message with output has come."""
        self.ended_at = self.clock.now()
        self.chunk_at.append(self.ended_at)

    def end(self) -> None:
        """A message of the answer without output has come (its end, say), or it has failed."""
        self.ended_at = self.clock.now()


class Target(Protocol):
    """One endpoint. Used by one event loop; ``prepare`` alone may be called from other threads."""

    async def open(self) -> Facts:
        """Connect and ask what is served. Raises ``EndpointFailed``."""
        ...

    def prepare(self, ask: Ask) -> Any:
        """The message to send, complete."""
        ...

    async def send(self, prepared: Any, watch: Stopwatch) -> Reply:
        """Send it, tell ``watch`` what comes, return when it is over. Never raises for what a server or a network did:
        that is the reply's ``error``."""
        ...

    async def close(self) -> None:
        """Give the connections back."""
        ...


def joined_text(prompt: Sequence[Message]) -> str:
    """A chat as one text, for an endpoint that knows no roles."""
    return "".join(message.content for message in prompt)
