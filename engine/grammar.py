"""Which tokens may come next, if the output has to obey a grammar? Grammars compiled against a model's tokens.

llguidance does it: an Earley parser over a lexer of regular expressions that are derived as they are needed, so what a
grammar costs is bounded by fuel that it counts itself (``_LIMITS``), mostly. Mostly: a few schemas keep its compiler
busy for minutes (``multipleOf: 9999991``), so nobody compiles on a thread that others wait for, and a gateway first
compiles in a process that it can end (cluster/grammar_check.py, which runs ``python -m engine.grammar``).

    Vocabulary          the model's tokens, made once (0.5 s for 49k of them, holding the interpreter's lock)
    CompiledGrammar     a grammar against them, made once for each grammar, on a thread of ``GrammarCompiler``
    Matcher             what one sequence has matched so far: made in microseconds, follows the output token by token

Torch-free. llguidance is the extra ``structured`` and is loaded here alone, when it is first needed.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Semaphore, Thread
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from core.errors import InvalidRequest
from core.grammar import Grammar, GrammarKind

Mask = NDArray[np.int32]  # one bit for each token, the lowest first

EXTRA = "needs the extra structured: pip install 'prfaas[structured]'"
_MAX_ERROR_CHARS = 300
_NUM_KEPT = 256  # compiled grammars that are kept although no sequence uses them
_NUM_THREADS = 2  # that compile at once
# What a grammar may cost, in llguidance's units. A step's fuel is what 64 sequences may take from one another each
# step: about 4 ms on one core by its own account. Lexer states are about 2 kB each.
_LIMITS = {
    "max_grammar_size": 100_000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "verbose_errors": False,
}


class Vocabulary:
    """A model's tokens, as grammars see them."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        """``tokenizer_json``: a fast tokenizer's own file. Raises ``InvalidRequest`` (field ``grammar``) with the
        reason why grammars cannot be served with these tokens."""
        if not eos_token_ids:
            raise _unavailable("the model has no end-of-sequence token, so an answer could not end")
        self._lib = _library()
        try:
            self._tokens = self._lib.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
        except ValueError as error:
            raise _unavailable(f"llguidance does not know such a tokenizer: {error}") from error
        self.mask_words = -(-vocab_size // 32)  # 32-bit words of a mask

    @classmethod
    def load(cls, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Vocabulary:
        """That of the model in ``folder``; raises as the constructor."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise _unavailable("the model's folder has no tokenizer.json")
        return cls(file.read_text(encoding="utf-8"), vocab_size, eos_token_ids)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Takes up to a second, or for ever; other threads run meanwhile. ``InvalidRequest`` (field ``grammar``) says
        what is wrong with it."""
        matchers = self._lib.LLMatcher
        write = {
            GrammarKind.JSON_SCHEMA: matchers.grammar_from_json_schema,
            GrammarKind.REGEX: matchers.grammar_from_regex,
            GrammarKind.LARK: matchers.grammar_from_lark,
        }[grammar.kind]
        try:
            matcher = matchers(
                self._tokens, write(grammar.text), log_level=0, limits=self._lib.LLParserLimits(**_LIMITS)
            )
        except ValueError as error:
            raise InvalidRequest("grammar", _shortened(str(error))) from error
        if matcher.is_error():
            raise InvalidRequest("grammar", _shortened(matcher.get_error()))
        compiled = CompiledGrammar(matcher, self.mask_words)
        first = compiled.start()
        first.fill(np.zeros(self.mask_words, np.int32))  # the first mask costs most: what it needs is kept
        if first.error:
            raise InvalidRequest("grammar", _shortened(first.error))
        return compiled


class CompiledGrammar:
    """A grammar that sequences can follow. Any thread may start them."""

    def __init__(self, matcher: Any, mask_words: int) -> None:  # llguidance's LLMatcher, before any token
        self._matcher = matcher
        self._mask_words = mask_words
        self.too_slow = False  # a mask took longer than anybody waits: who asks for it again is told so at once

    def start(self) -> Matcher:
        """For a sequence without output."""
        return Matcher(self._matcher.deep_copy(), self._mask_words)


class Matcher:
    """What one sequence has matched so far; one thread at a time. After an error it stays as it is."""

    def __init__(self, matcher: Any, mask_words: int) -> None:
        self._matcher = matcher
        self._mask_words = mask_words
        self.num_tokens = 0  # matched
        self.error = ""  # why it cannot go on; empty: it can

    def advance(self, token_ids: Sequence[int]) -> None:
        """The output goes on with these."""
        for token_id in token_ids:
            if self.error:
                return
            self.num_tokens += 1
            if not self._matcher.consume_token(token_id):
                self._note_error()

    def fill(self, mask: Mask) -> None:
        """Write which tokens may come next into ``mask``: nothing but an end, if nothing else may. Bounded by fuel, and
        other threads run meanwhile."""
        assert mask.shape == (self._mask_words,), f"{mask.shape} for {self._mask_words} words"
        assert mask.flags.c_contiguous, "llguidance writes to its address"
        if not self.error:
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if self._matcher.is_error():
                self._note_error()

    def _note_error(self) -> None:
        self.error = _shortened(self._matcher.get_error()) or str(self._matcher.stop_reason())


class GrammarCompiler:
    """Compiles each grammar once, on threads of its own. From any thread."""

    def __init__(self, vocabulary: Vocabulary, num_kept: int = _NUM_KEPT) -> None:
        self._vocabulary = vocabulary
        self._num_kept = num_kept
        self._turns = Semaphore(_NUM_THREADS)
        self._lock = Lock()
        self._under_way: dict[Grammar, Future[CompiledGrammar]] = {}
        self._alive: WeakValueDictionary[Grammar, CompiledGrammar] = WeakValueDictionary()  # somebody holds it
        self._kept: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()  # latest last

    @property
    def mask_words(self) -> int:
        """32-bit words of a mask."""
        return self._vocabulary.mask_words

    def compile(self, grammar: Grammar) -> Future[CompiledGrammar]:
        """Done already if it was compiled lately or somebody still holds it; raises as ``Vocabulary.compile``. Not to
        be cancelled: others may wait for it too."""
        with self._lock:
            known = self._alive.get(grammar)
            if known is not None:
                self._keep(grammar, known)
                done: Future[CompiledGrammar] = Future()
                done.set_result(known)
                return done
            future = self._under_way.get(grammar)
            if future is None:
                future = self._under_way[grammar] = Future()
                # A thread that ends with the process: a pool's would be waited for, and a compiler may hang.
                Thread(target=self._run, args=(grammar, future), name="grammar", daemon=True).start()
            return future

    def _run(self, grammar: Grammar, future: Future[CompiledGrammar]) -> None:
        with self._turns:
            try:
                compiled = self._vocabulary.compile(grammar)
            except BaseException as error:  # a panic of llguidance's is no Exception, and who waits has to hear of it
                problem = error if isinstance(error, InvalidRequest) else _failed(error)
                with self._lock:
                    self._under_way.pop(grammar, None)
                future.set_exception(problem)
                return
        with self._lock:
            self._under_way.pop(grammar, None)
            self._alive[grammar] = compiled
            self._keep(grammar, compiled)
        future.set_result(compiled)

    def _keep(self, grammar: Grammar, compiled: CompiledGrammar) -> None:
        self._kept[grammar] = compiled
        self._kept.move_to_end(grammar)
        if len(self._kept) > self._num_kept:
            self._kept.popitem(last=False)


@dataclass(frozen=True)
class Grammars:
    """What an engine can do with grammars: ``compiler`` None: nothing, for ``reason``."""

    compiler: GrammarCompiler | None
    reason: str = ""

    @classmethod
    def of_model(cls, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Grammars:
        """Those of the model in ``folder``."""
        try:
            return cls(GrammarCompiler(Vocabulary.load(folder, vocab_size, eos_token_ids)))
        except InvalidRequest as error:
            return cls(None, error.message)

    def require(self) -> GrammarCompiler:
        """The compiler, or ``InvalidRequest`` (field ``grammar``)."""
        if self.compiler is None:
            raise InvalidRequest("grammar", self.reason)
        return self.compiler


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise _unavailable(f"it {EXTRA}") from error
    return llguidance


def _unavailable(reason: str) -> InvalidRequest:
    return InvalidRequest("grammar", f"structured output is not available here: {reason}")


def _failed(error: BaseException) -> InvalidRequest:
    return InvalidRequest("grammar", f"the compiler failed: {type(error).__name__}: {error}")


def _shortened(text: str) -> str:
    """A compiler's message: its first lines, without what it tells its own developers."""
    text = " ".join(text.partition("<non-verbose/>")[0].split())
    return text if len(text) <= _MAX_ERROR_CHARS else f"{text[:_MAX_ERROR_CHARS]}..."


def main(arguments: Sequence[str]) -> int:
    """Compile what is asked on standard input; for cluster/grammar_check.py, which ends this process if need be.

    Arguments: the model's folder, its vocabulary's size, seconds of one grammar, bytes of memory, tokens that end a
    sequence. A line in: ``[kind, text]``. A line out: what is wrong with it, null if nothing; the first says whether
    grammars can be served at all.
    """
    folder, vocab_size, seconds, num_bytes, *eos_token_ids = arguments
    vocabulary: Vocabulary | None = None
    problem: str | None = None
    try:
        vocabulary = Vocabulary.load(Path(folder), int(vocab_size), [int(token_id) for token_id in eos_token_ids])
    except InvalidRequest as error:
        problem = error.message
    _answer(problem)
    resource.setrlimit(resource.RLIMIT_AS, (int(num_bytes), resource.RLIM_INFINITY))
    for line in sys.stdin:
        kind, text = json.loads(line)
        # The system ends the process when the alarm rings, whatever it is doing and whether or not its parent lives.
        signal.setitimer(signal.ITIMER_REAL, float(seconds))
        if vocabulary is not None:
            problem = None
            try:
                vocabulary.compile(Grammar(GrammarKind(kind), text))
            except InvalidRequest as error:
                problem = error.message
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        _answer(problem)
    return 0


def _answer(problem: str | None) -> None:
    print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
