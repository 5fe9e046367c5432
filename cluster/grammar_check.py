"""Can this grammar be obeyed? Asked before anything of its request is started, and answered within bounded time.

A grammar is compiled here first, in a process of its own, ``python -m engine.grammar``: what does not compile is the
client's error, with the compiler's words. Compilers can be kept busy for ever by a few lines, so the process gets
``compile_timeout_s`` and so many bytes, and the system ends it when it takes more; the next grammar starts a new one.
What was found is remembered. Workers compile only what has passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from cluster.config import StructuredOutputConfig
from cluster.view import ModelInfo
from core.errors import InvalidRequest, Overloaded
from core.grammar import Grammar

logger = logging.getLogger(__name__)

_NUM_REMEMBERED = 4096
_MAX_WAITING = 64  # grammars that nothing is known of; one too many is refused as overload
_START_TIMEOUT_S = 60.0  # the tokens of a large vocabulary take seconds
_MARGIN_S = 0.5  # the process ends itself; this much later it is ended


class Finding(StrEnum):
    """What came of asking, as the ``reason`` label."""

    KNOWN = "known"  # it was checked before, whatever was found then
    COMPILED = "compiled"
    REFUSED = "refused"  # it is wrong, or asks for what cannot be done
    TOO_COSTLY = "too_costly"  # it took more time or memory than is allowed
    UNAVAILABLE = "unavailable"  # no grammar can be served here


class GrammarChecker:
    """Asks one process, one grammar at a time. ``on_finding`` hears of each that was asked about."""

    def __init__(
        self,
        folder: str | Path,
        config: StructuredOutputConfig,
        on_finding: Callable[[Finding], None] = lambda _: None,
    ) -> None:
        """``folder``: the model's, with its tokenizer."""
        self._folder = str(folder)
        self._config = config
        self._on_finding = on_finding
        self._turn = asyncio.Lock()
        self._num_waiting = 0
        self._found: OrderedDict[Grammar, str] = OrderedDict()  # what is wrong with it; empty: nothing
        self._child: asyncio.subprocess.Process | None = None
        self._unavailable: str | None = None  # why nothing can be served, once that is known

    async def check(self, grammar: Grammar, model: ModelInfo) -> None:
        """Raise ``InvalidRequest`` (field ``grammar``) unless ``model`` can be made to obey it, or ``Overloaded``."""
        num_bytes, most = len(grammar.text.encode(errors="surrogatepass")), self._config.max_bytes
        if num_bytes > most:
            raise InvalidRequest("grammar", f"has {num_bytes} bytes; at most {most} are taken")
        known = self._found.get(grammar)
        if known is None:
            known = await self._ask_in_turn(grammar, model)
        else:
            self._found.move_to_end(grammar)
            self._on_finding(Finding.KNOWN)
        if known:
            raise InvalidRequest("grammar", known)

    async def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _ask_in_turn(self, grammar: Grammar, model: ModelInfo) -> str:
        if self._num_waiting >= _MAX_WAITING:
            raise Overloaded(f"{_MAX_WAITING} grammars wait for being compiled", reason="max_grammars")
        self._num_waiting += 1
        try:
            async with self._turn:
                known = self._found.get(grammar)
                if known is None:
                    # Whoever asks may go away: the answer is then for the next who asks, and belongs to nobody else.
                    known = await asyncio.shield(asyncio.ensure_future(self._ask(grammar, model)))
                return known
        finally:
            self._num_waiting -= 1

    async def _ask(self, grammar: Grammar, model: ModelInfo) -> str:
        child = await self._started(model)
        if self._unavailable is not None:
            self._on_finding(Finding.UNAVAILABLE)
            return self._unavailable
        problem = await self._answer(child, grammar)
        if problem is None:
            self._child = None
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            seconds, num_bytes = self._config.compile_timeout_s, self._config.max_memory_bytes
            problem = f"takes more than {seconds:g} s or {num_bytes} bytes to compile; simplify it"
            logger.warning("a grammar of %d characters was given up: it %s", len(grammar.text), problem)
            finding = Finding.TOO_COSTLY
        else:
            finding = Finding.REFUSED if problem else Finding.COMPILED
        self._on_finding(finding)
        self._found[grammar] = problem
        if len(self._found) > _NUM_REMEMBERED:
            self._found.popitem(last=False)
        return problem

    async def _answer(self, child: asyncio.subprocess.Process, grammar: Grammar) -> str | None:
        """What is wrong with it, empty if nothing; None: the process had to be ended."""
        assert child.stdin is not None, "a pipe"
        try:
            async with asyncio.timeout(self._config.compile_timeout_s + _MARGIN_S):
                child.stdin.write(json.dumps([grammar.kind, grammar.text]).encode() + b"\n")
                await child.stdin.drain()
                return await self._read(child)
        except (TimeoutError, ConnectionError):
            return None

    async def _started(self, model: ModelInfo) -> asyncio.subprocess.Process:
        if self._child is not None and self._child.returncode is None:
            return self._child
        self._unavailable = None
        child = self._child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "engine.grammar",
            self._folder,
            str(model.vocab_size),
            str(self._config.compile_timeout_s),
            str(self._config.max_memory_bytes),
            *map(str, model.eos_token_ids),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                said = await self._read(child)
        except TimeoutError:
            said = None
        if said is None:
            said = "structured output is not available here: the process that tries grammars did not start"
            logger.error("%s", said)
        self._unavailable = said or None
        return child

    async def _read(self, child: asyncio.subprocess.Process) -> str | None:
        """One answer, empty for null; None: the process has ended."""
        assert child.stdout is not None, "a pipe"
        line = await child.stdout.readline()
        return (json.loads(line) or "") if line.endswith(b"\n") else None
