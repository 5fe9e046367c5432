"""The numbers of Mooncake (FAST'25) that can be computed: cost of prefill, when reuse pays, sizes of caches."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.paper_check import Check
from cluster.catalogue import load_catalogue

# FAST'25 table 1, LLaMA3-70B: l, d, gqa, bytes of a value; a and b of flops(n) = l (a n^2 d + b n d^2)
LAYERS, WIDTH, GROUP, VALUE_BYTES = 80, 8192, 8, 2
A, B = 4, 22
A800_FLOPS, H800_FLOPS = 8 * 312e12, 8 * 989e12


def prefill_flops(tokens: float, cached_tokens: float = 0.0) -> float:
    """FAST'25 equation 1, of ``tokens`` less what a cached prefix saves."""

    def flops(n: float) -> float:
        return LAYERS * (A * n**2 * WIDTH + B * n * WIDTH**2)

    return flops(tokens) - flops(cached_tokens)


def break_even_bytes_per_s(prefix_tokens: float, flops_per_s: float) -> float:
    """FAST'25 equation 2: the bandwidth from which loading a prefix is faster than computing it."""
    per_token = GROUP * (A * prefix_tokens * WIDTH + B * WIDTH**2)
    return flops_per_s * 2 * WIDTH * VALUE_BYTES / per_token


def checks() -> Iterator[Check]:
    """All of them."""
    source = "Mooncake FAST'25 section 2.2"
    for name, printed, flops_per_s in (("A800", "6", A800_FLOPS), ("H800", "19", H800_FLOPS)):
        rate = break_even_bytes_per_s(8192, flops_per_s) / 1e9
        yield Check(f"break-even bandwidth at a prefix of 8,192, 8 x {name}", source, printed, rate, "GB/s")
    shape = load_catalogue().model("llama-3.1-70b")
    per_token = LAYERS * 2 * WIDTH / GROUP * VALUE_BYTES
    yield Check("KV of a token by table 1", "Mooncake FAST'25 table 1", "320", per_token / 1024, "KiB")
    yield Check(
        "KV of a token by the catalogue", "Mooncake FAST'25 table 1", "320", shape.kv_bytes_per_token / 1024, "KiB"
    )
    yield Check("KV of 128K tokens", "Mooncake FAST'25 section 5.3", "40", float(shape.kv_bytes(131072)) / 2**30, "GiB")
    tokens = 1e12 / shape.kv_bytes_per_token / 1e6
    yield Check("tokens in 1 TB of DRAM", "Mooncake FAST'25 section 5.2", "3", tokens, "M")
    saved = 100 * (1 - prefill_flops(131072, 0.95 * 131072) / prefill_flops(131072))
    yield Check("prefill time cut by a 95 % prefix of 128K", "Mooncake FAST'25 section 5", "92", saved, "%",
                note="by operations alone (equation 1)")  # fmt: skip
    yield Check("input over output tokens of the arXiv trace", "Mooncake arXiv section 4", "720", 7590 / 182,
                note="a ratio of the two printed means is 42; 720 is a mean of ratios, or wrong")  # fmt: skip
