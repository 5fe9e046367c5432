"""Links of a real service: tested before they are used, watched while they are, and checked by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import TlsConfig
from cluster.front_door import not_ready_reason
from cluster.view import ClusterView
from core.request import WorkerId
from engine.config import EngineConfig
from kv_transfer import codec_policy
from kv_transfer.codec import Codec
from kv_transfer.codec_policy import CodecChoice
from kv_transfer.config import KvTransferConfig, LinkConfig
from tests.cluster.live_cluster import live_cluster
from tests.cluster.reference import ReferenceModel
from tests.tiny_models import save_tiny_model
from tests.unit.cluster import tiny_tokenizers

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
NUM_PAGES = 256
ENGINE = EngineConfig(dtype="float32", page_size=16, num_pages=NUM_PAGES, max_batch_tokens=64, threads=1)
TCP = KvTransferConfig(host="127.0.0.1")

pytestmark = pytest.mark.timeout(240)
one_family = pytest.mark.parametrize("family", ["llama"])


def all_tested(view: ClusterView) -> bool:
    return bool(view.links) and all(link.probe is not None for link in view.links.values())


@one_family
@pytest.mark.parametrize("mode", ["off", "on"])
async def test_every_pair_passes_its_self_test_and_then_carries_requests(
    family: str, tiny_model: ReferenceModel, mode: str
) -> None:
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        num_prefill=2,
        num_decode=2,
        kv_transfer=TCP,
        self_test=True,
        policy="round_robin",
        tls=TlsConfig(mode=mode),
    ) as cluster:
        assert await cluster.membership.wait_until(all_tested, PATIENCE_S)
        links = cluster.membership.view().links
        assert len(links) == 4
        assert all(link.usable and link.probe is not None and link.probe.exact for link in links.values()), links
        assert not_ready_reason(cluster.membership) is None
        for prompt in tiny_model.prompts[:4]:
            answer = await cluster.generate(prompt)
            assert answer.tokens == tiny_model.expected(prompt, 16)
        await cluster.check_integrity()
        assert await cluster.membership.wait_until(
            lambda view: any(link.estimate is not None for link in view.links.values()), PATIENCE_S
        )


@one_family
async def test_what_the_policy_chooses_is_what_the_writes_get_and_what_the_gateway_hears(
    family: str, tiny_model: ReferenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it chooses what is tested with the policy; here it finds at once that raw does not fit."""
    lossless = CodecChoice(Codec.LOSSLESS, "raw does not fit, says the test")
    monkeypatch.setattr(codec_policy, "choose_codec", lambda *_: lossless)
    wide = KvTransferConfig(host="127.0.0.1", links=(LinkConfig(codecs=("raw", "lossless")),))

    def encodes(view: ClusterView) -> bool:
        return any(link.estimate is not None and link.estimate.codec == "lossless" for link in view.links.values())

    engine = replace(ENGINE, prefix_cache=False)
    async with live_cluster(str(tiny_model.folder), engine=engine, kv_transfer=wide) as cluster:
        (prompt, *others) = tiny_model.prompts
        assert (await cluster.generate(prompt)).tokens == tiny_model.expected(prompt, 16)
        assert await cluster.membership.wait_until(encodes, PATIENCE_S)
        for other in others:
            assert (await cluster.generate(other)).tokens == tiny_model.expected(other, 16)
        (link,) = cluster.membership.view().links.values()
        assert link.estimate is not None
        assert link.estimate.codec_changes == 1
        encoded = cluster.hosts[WorkerId("prefill-0")].link_stats()[0].encoded
        assert [use.codec for use in encoded] == [Codec.LOSSLESS]
        assert encoded[0].raw_bytes > 0
        await cluster.check_integrity()


@one_family
async def test_a_pair_that_cannot_exchange_bytes_is_reported_and_not_used(
    family: str, tiny_model: ReferenceModel
) -> None:
    """decode-1 listens on another transport than the others speak: nothing can reach its pages."""
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        num_decode=2,
        kv_transfer=TCP,
        self_test=True,
        policy="round_robin",
        differing={"decode-1": KvTransferConfig(transport="local")},
    ) as cluster:
        assert await cluster.membership.wait_until(all_tested, PATIENCE_S)
        (good, bad) = (cluster.membership.view().links["prefill-0", name] for name in ("decode-0", "decode-1"))
        assert good.usable
        assert not bad.usable
        assert bad.reason.startswith("ProtocolViolation: "), bad
        for _ in range(4):
            answer = await cluster.generate(tiny_model.prompts[0])
            assert (answer.timing.prefill_worker, answer.timing.decode_worker) == ("prefill-0", "decode-0")
        await cluster.check_integrity()


@one_family
async def test_a_service_none_of_whose_pairs_works_is_not_ready(family: str, tiny_model: ReferenceModel) -> None:
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        kv_transfer=TCP,
        self_test=True,
        differing={"decode-0": KvTransferConfig(transport="local")},
    ) as cluster:
        assert "not tested yet" in (not_ready_reason(cluster.membership) or "not tested yet")
        assert await cluster.membership.wait_until(all_tested, PATIENCE_S)

        reason = not_ready_reason(cluster.membership)

        assert reason is not None
        assert "prefill-0 to decode-0: ProtocolViolation" in reason
        assert cluster.membership.probes_by_outcome["ProtocolViolation"] >= 1
        await cluster.check_integrity()


@one_family
async def test_no_byte_travels_between_caches_of_different_dtypes(family: str, tiny_model: ReferenceModel) -> None:
    async with live_cluster(
        str(tiny_model.folder),
        engine=ENGINE,
        decode_engine=replace(ENGINE, dtype="bfloat16"),
        kv_transfer=TCP,
        self_test=True,
    ) as cluster:
        assert await cluster.membership.wait_until(all_tested, PATIENCE_S)
        (link,) = cluster.membership.view().links.values()
        assert not link.usable
        assert link.probe is not None
        assert (link.probe.error, link.probe.exact, link.probe.num_bytes) == ("Incompatible", False, 0)
        assert "dtype differs" in link.probe.reason
        await cluster.check_integrity()


@pytest.mark.ray
def test_prfaas_check_tests_what_a_configuration_describes(tmp_path: Path) -> None:
    """The whole command; how links fail is asked above, and how the command says so in tests/unit/cluster."""
    folder = tiny_tokenizers.save(save_tiny_model("llama", tmp_path))
    (tmp_path / "service.yaml").write_text(
        json.dumps(
            {
                "model": str(folder),
                "engine": {"dtype": "float32", "num_pages": 64, "page_size": 16, "threads": 1},
                "prefill": {"num_cpus": 0},
                "decode": {"num_cpus": 0},
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "check", str(tmp_path / "service.yaml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=200,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "1 of 1 links work" in done.stdout
    (line,) = (line.split() for line in done.stdout.splitlines() if line.startswith("prefill-0"))
    assert (line[1], line[4], line[-1]) == ("decode-0", "yes", "works")
