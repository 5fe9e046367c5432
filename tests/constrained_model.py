"""A tiny model with a tokenizer and an end, and what transformers generates with llguidance's masks between its logits
and its choice: the expectation for outputs that obey a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LogitsProcessor, LogitsProcessorList

from core.grammar import Grammar, GrammarKind
from tests.unit.cluster import tiny_tokenizers

VOCAB_SIZE = 384  # the tokenizer knows 350 of them
EOS = 0
MAX_LEN = 512

PERSON = Grammar(
    GrammarKind.JSON_SCHEMA,
    '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", '
    '"minimum": 0, "maximum": 999}, "kind": {"enum": ["a", "bc"]}}, "required": ["name", "age", "kind"], '
    '"additionalProperties": false, "x-guidance": {"whitespace_pattern": " ?"}}',
)
WORDS = Grammar(GrammarKind.REGEX, "([a-m]{2,5} ){2,4}end")
SUMS = Grammar(GrammarKind.LARK, 'start: n ("+" n){1,4} ";"\nn: /[0-9]{1,3}/ | "(" n "*" n ")"')
GRAMMARS = (PERSON, WORDS, SUMS)


def save_constrained_model(folder: Path, chat_template: str | None = tiny_tokenizers.CHAT_TEMPLATE) -> Path:
    """Random float32 weights, large enough for greedy tokens to vary."""
    tiny_tokenizers.save(folder, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
        tie_word_embeddings=False,
    )
    factory: Any = AutoModelForCausalLM
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        model = factory.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(folder)
    return folder


class _Masked(LogitsProcessor):  # type: ignore[misc]  # untyped
    """llguidance used as its own documentation has it: no code of ours."""

    def __init__(self, folder: Path, grammar: Grammar, prompt_length: int) -> None:
        tokens = llguidance.LLTokenizer((folder / "tokenizer.json").read_text(), n_vocab=VOCAB_SIZE, eos_token=[EOS])
        write = {
            GrammarKind.JSON_SCHEMA: llguidance.LLMatcher.grammar_from_json_schema,
            GrammarKind.REGEX: llguidance.LLMatcher.grammar_from_regex,
            GrammarKind.LARK: llguidance.LLMatcher.grammar_from_lark,
        }[grammar.kind]
        self._matcher = llguidance.LLMatcher(tokens, write(grammar.text))
        self._num_seen = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        row = input_ids[0].tolist()
        assert self._matcher.consume_tokens(row[self._num_seen :]), self._matcher.get_error()
        self._num_seen = len(row)
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        return scores.masked_fill(torch.from_numpy(bits[:VOCAB_SIZE] == 0), -torch.inf)


class ConstrainedReference:
    """``transformers.generate`` on the model in ``folder``, greedy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )

    def expected(self, prompt: Sequence[int], grammar: Grammar | None, num_tokens: int) -> list[int]:
        """Its tokens, the end included."""
        row = torch.tensor([list(prompt)])
        processors = LogitsProcessorList()
        if grammar is not None:
            processors.append(_Masked(self.folder, grammar, len(prompt)))
        output = self._model.generate(
            row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=num_tokens,
            do_sample=False,
            logits_processor=processors,
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens
