"""What every test of the doors needs: a tokenizer, and a gateway around a scripted router."""

from pathlib import Path

import pytest

from cluster.config import GrpcConfig, HttpConfig, ServiceConfig
from cluster.tokenizer import Tokenizer
from tests.unit.cluster import tiny_tokenizers
from tests.unit.cluster.scripted_router import Gateway, gateway

ANSWER = "Hello 🙂 world, stop there."


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(tiny_tokenizers.save(tmp_path_factory.mktemp("model")))


@pytest.fixture
def service(tiny_tokenizer: Tokenizer, tmp_path: Path) -> Gateway:
    config = ServiceConfig(
        model=str(tmp_path), served_model_name="tiny", http=HttpConfig(port=0), grpc=GrpcConfig(port=0)
    )
    return gateway(tiny_tokenizer, ANSWER, config)
