"""What may an answer look like? A grammar as a request carries it, from the gateway to the engines.

    json_schema   a JSON Schema, as JSON text
    regex         a regular expression that the whole answer matches
    lark          a context-free grammar in Lark's notation, in llguidance's dialect

Only the text travels: each engine compiles it against the tokens of its own model (engine/grammar.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from core.errors import InvalidRequest

# Of a grammar's text: above it a message between processes would grow without need. The gateway's own bound is lower.
MAX_GRAMMAR_BYTES = 1 << 20


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What every token of an answer has to obey."""

    kind: GrammarKind
    text: str

    def __post_init__(self) -> None:
        num_bytes = len(self.text.encode(errors="surrogatepass"))
        if not 0 < num_bytes <= MAX_GRAMMAR_BYTES:
            raise InvalidRequest("grammar", f"must have 1 to {MAX_GRAMMAR_BYTES} bytes, got {num_bytes}")
