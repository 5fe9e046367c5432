"""What one engine is told. Torch-free, so that the service's configuration can be checked without a device."""

from __future__ import annotations

from dataclasses import dataclass

from core.errors import InvalidConfig

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
SWITCHES = ("auto", "always", "never")
PREFILL_ORDERS = ("fcfs", "slack")
COLOCATED_MODES = ("chunked", "layered", "partitioned")
APART_MODES = frozenset({"layered", "partitioned"})  # of them: a step holds either prompts or decoding sequences
DEFAULT_CODE_FOLDER = "~/.cache/prfaas/compiled"
CPU_KV_CACHE_BYTES = 1 << 30  # where nobody says how many: host memory is not ours to fill


@dataclass(frozen=True)
class EngineConfig:
    """One model on one device.

    device: where the model runs; ``auto`` is the GPU if there is one.
    dtype: of weights and K/V; ``auto`` is bfloat16 on a CPU with instructions for it (2.7 times faster in prefill than
        float32 there), float32 on another (where bfloat16 halves K/V and no more), and the checkpoint's on GPU.
    page_size: tokens of one page of K/V; the same in both pools.
    kv_cache_bytes: bytes of the page pool, on each rank; ``num_pages`` sets it in pages instead and wins if given.
        null: on a GPU what ``gpu_memory_utilization`` leaves, 1 GiB on a CPU.
    num_pages: pages of the pool; null: what ``kv_cache_bytes`` holds.
    gpu_memory_utilization: share of the GPU's memory that may be in use, above 0 and at most 1. What weights, whoever
        else is on the device and the largest step (computed at the start to measure it) leave of it is the page pool.
        Workers that share a GPU need ``kv_cache_bytes``.
    max_model_len: longest prompt + output in tokens; null: the model's own limit, or what the pool can hold if less.
    max_batch_tokens: token budget of one step, shared by prefill chunks and decode tokens.
    max_batch_size: most sequences in one step.
    max_prefill_chunk: most tokens of one prompt in one step; null: the whole budget.
    prefill_order: which prompt is computed first: ``fcfs``, as they came, or ``slack``, whose first token is due first
        (``x-slo-ttft-ms``, ``admission.slo``). With ``slack`` a prompt that would be late otherwise holds up a step
        that computes longer ones between two layers; nothing is computed twice.
    colocated_mode: how prompts and decoding sequences share this engine. ``chunked``: each step holds both, prompts in
        chunks. ``layered``: whole prompts (up to ``max_batch_tokens``), and a decoding step after every group of their
        layers; for mixtures of experts, whose weights are then read once a prompt and not once a chunk.
        ``partitioned``: whole prompts on a part of the GPU's multiprocessors, and decoding steps at the same time on
        what is left. docs/colocated-modes.md says when to use which.
    tpot_slo_s: seconds that decoding sequences may wait for a token while prompts are computed: chunks, groups of
        layers or the partition are chosen for it at every step, by what steps were seen to take; null: chunks of any
        size, groups worth 512 tokens, decoding at three quarters longer than alone.
    prefix_cache: whether pages of earlier prompts are kept and used again while there is room.
    host_cache_bytes: bytes of host memory (pinned on a GPU) in which prefixes are kept that the page pool has no room
        for; 0: none. They are loaded again if that is predicted to be faster than computing them.
    disk_cache_bytes: bytes of files in which prefixes are kept that host memory has no room for, and which a restart
        finds; 0: none. Needs ``host_cache_bytes``.
    disk_cache_dir: folder of these files; each worker has one of its own within it, by its name.
    attention: the attention backend: native (CPU; compiled for the processor at the first start), flashinfer, varlen,
        sdpa or matmul; ``auto`` takes the fastest that can do what the model asks on the device. One that cannot is
        refused, with those that can.
    compile: whether the model's layers go through torch.compile: ``always``, ``never`` or ``auto``, which is on a GPU
        unless the weights are quantised. On CPU it takes a C++ compiler and a minute of one core at the first start. A
        model that cannot be compiled runs eagerly, and says so.
    compile_cache: folder in which compiled code is kept, so that a second start takes seconds.
    decode_graphs: whether decode steps are captured as CUDA graphs at the start; ``auto`` is on a GPU, ``always`` takes
        the same path on CPU too, without graphs.
    prompt_graph_tokens: where ``decode_graphs`` are captured, steps that hold prompts run in graphs too if they have at
        most so many tokens in all: what lies between two attentions is one. Launched layer by layer they would take as
        long as the host takes for that; longer steps hide it. 0: none.
    cascade_attention: whether decode steps read pages that several sequences share once for all of them, from decode
        graphs of their own: ``auto``, on a GPU where that saves more than it costs and the attention backend can;
        ``always``, whatever it saves; ``never``. Needs ``prefix_cache``, which gives sequences the same pages.
    plan_ahead: whether the next step is launched before the tokens of this one are known to the host; ``auto`` is on a
        GPU, where the host would wait otherwise, as long as launching takes less than half of a step.
    threads: CPU threads of one worker, or of each rank; null: torch's own choice.
    turns_file: file by which workers that share CPU cores compute one step at a time, which is faster than at once;
        the same for all of them; null: this worker has its device to itself.
    dummy_seed: seed of the random weights of a ``dummy:`` model.
    """

    device: str = "auto"
    dtype: str = "auto"
    page_size: int = 16
    kv_cache_bytes: int | None = None
    num_pages: int | None = None
    gpu_memory_utilization: float = 0.9
    max_model_len: int | None = None
    max_batch_tokens: int = 2048
    max_batch_size: int = 64
    max_prefill_chunk: int | None = None
    prefill_order: str = "fcfs"
    colocated_mode: str = "chunked"
    tpot_slo_s: float | None = None
    prefix_cache: bool = True
    host_cache_bytes: int = 0
    disk_cache_bytes: int = 0
    disk_cache_dir: str = "~/.cache/prfaas/pages"
    attention: str = "auto"
    compile: str = "auto"
    compile_cache: str = DEFAULT_CODE_FOLDER
    decode_graphs: str = "auto"
    prompt_graph_tokens: int = 2048
    cascade_attention: str = "auto"
    plan_ahead: str = "auto"
    threads: int | None = None
    turns_file: str | None = None
    dummy_seed: int = 0

    @property
    def step_tokens(self) -> int:
        """Tokens of one prompt that one step computes at most."""
        return min(self.max_batch_tokens, self.max_prefill_chunk or self.max_batch_tokens)

    def switched_on(self, switch: str, device: str) -> bool:
        """What ``compile``, ``decode_graphs`` or ``plan_ahead`` means on a device of torch's type ``device``."""
        value = getattr(self, switch)
        return value == "always" or (value == "auto" and device == "cuda")

    def __post_init__(self) -> None:
        _require(self.device in DEVICES, "engine.device", f"must be one of {', '.join(DEVICES)}", self.device)
        _require(self.dtype in DTYPES, "engine.dtype", f"must be one of {', '.join(DTYPES)}", self.dtype)
        for name in ("compile", "decode_graphs", "cascade_attention", "plan_ahead"):
            value = getattr(self, name)
            _require(value in SWITCHES, f"engine.{name}", f"must be one of {', '.join(SWITCHES)}", value)
        orders = f"must be one of {', '.join(PREFILL_ORDERS)}"
        _require(self.prefill_order in PREFILL_ORDERS, "engine.prefill_order", orders, self.prefill_order)
        modes = f"must be one of {', '.join(COLOCATED_MODES)}"
        _require(self.colocated_mode in COLOCATED_MODES, "engine.colocated_mode", modes, self.colocated_mode)
        _require(
            self.prefill_order == "fcfs" or self.colocated_mode == "chunked",
            "engine.prefill_order",
            f"must be fcfs where engine.colocated_mode is {self.colocated_mode}: between two layers it decodes",
            self.prefill_order,
        )
        _require(
            self.tpot_slo_s is None or self.tpot_slo_s > 0, "engine.tpot_slo_s", "must be above 0", self.tpot_slo_s
        )
        _require(self.page_size >= 1, "engine.page_size", "must be at least 1 token", self.page_size)
        _require(
            self.kv_cache_bytes is None or self.kv_cache_bytes > 0,
            "engine.kv_cache_bytes",
            "must be above 0",
            self.kv_cache_bytes,
        )
        _require(
            0 < self.gpu_memory_utilization <= 1,
            "engine.gpu_memory_utilization",
            "must be above 0 and at most 1",
            self.gpu_memory_utilization,
        )
        for name in ("host_cache_bytes", "disk_cache_bytes", "prompt_graph_tokens"):
            value = getattr(self, name)
            _require(value >= 0, f"engine.{name}", "must be at least 0 (0: none)", value)
        _require(
            self.prefix_cache or not self.host_cache_bytes,
            "engine.host_cache_bytes",
            "must be 0 without engine.prefix_cache",
            self.host_cache_bytes,
        )
        _require(
            self.colocated_mode != "partitioned" or not self.host_cache_bytes,
            "engine.host_cache_bytes",
            "must be 0 where engine.colocated_mode is partitioned: copies follow the kernels of one stream",
            self.host_cache_bytes,
        )
        _require(
            bool(self.host_cache_bytes) or not self.disk_cache_bytes,
            "engine.disk_cache_bytes",
            "must be 0 without engine.host_cache_bytes: what comes from the disk goes through there",
            self.disk_cache_bytes,
        )
        _require(bool(self.disk_cache_dir), "engine.disk_cache_dir", "must not be empty", self.disk_cache_dir)
        for name in ("num_pages", "max_model_len", "max_prefill_chunk", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"engine.{name}", "must be at least 1", value)
        _require(self.max_batch_tokens >= 1, "engine.max_batch_tokens", "must be at least 1", self.max_batch_tokens)
        _require(self.max_batch_size >= 1, "engine.max_batch_size", "must be at least 1", self.max_batch_size)
        _require(
            self.max_batch_size <= self.max_batch_tokens,
            "engine.max_batch_size",
            f"must be at most engine.max_batch_tokens ({self.max_batch_tokens})",
            self.max_batch_size,
        )


def _require(ok: bool, key: str, allowed: str, value: object) -> None:
    if not ok:
        raise InvalidConfig(key, f"{allowed}, got {value!r}")
