"""What is on a rank that is not the first? The same model runner on its own slice of weights and K/V heads, and no
scheduler: it computes what rank 0 sends (rank_steps.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from core.fingerprint import CacheFingerprint
from engine.cache_layout import CacheLayout
from engine.compiled_layers import keep_compiled_code
from engine.config import EngineConfig
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.model_source import resolve
from engine.page_pool import PagePool
from engine.rank_group import RankGroup
from engine.rank_steps import RankStep, receive_previous
from engine.runner_setup import make_pool, make_runner


class RankFollower:
    """Computes steps of rank 0. Made by ``load_model``; one thread."""

    def __init__(self, runner: ModelRunner, group: RankGroup, fingerprint: CacheFingerprint) -> None:
        self._runner = runner
        self._group = group
        self.fingerprint = fingerprint  # the same on every rank

    @classmethod
    def load_model(
        cls, config: EngineConfig, model: str, group: RankGroup, *, cache_dir: str | Path = "~/.cache/prfaas/models"
    ) -> RankFollower:
        """Load this rank's part while rank 0 does the same (``Engine.load_model``); raises what that raises."""
        keep_compiled_code(config.compile_cache)
        loaded = load_model(resolve(model, cache_dir), config, group)
        runner, _ = make_runner(config, loaded, make_pool(config, loaded))
        return cls(runner, group, loaded.fingerprint)

    @property
    def pool(self) -> PagePool:
        """The K/V memory of this rank's heads."""
        return self._runner.pool

    @property
    def layout(self) -> CacheLayout:
        """What a page holds here."""
        return self.pool.layout

    @torch.inference_mode()
    def compute(self, step: RankStep, on_layer_stored: Callable[[int], None] | None = None) -> None:
        """As ``ModelRunner.run`` does on rank 0. Whatever is raised ends the worker: the ranks have parted."""
        previous = receive_previous(self._group, step, self.pool.device)
        self._runner.run_packed(step.packed, on_layer_stored, previous)
