from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.cluster.reference import ReferenceModel, make_prompts
from tests.tiny_models import VOCAB_SIZE, save_tiny_model


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ReferenceModel]:
    """Each family's model, built when first asked for."""
    built: dict[str, ReferenceModel] = {}

    def get(family: str) -> ReferenceModel:
        if family not in built:
            folder = save_tiny_model(family, tmp_path_factory.mktemp(family))
            built[family] = ReferenceModel(folder, make_prompts(VOCAB_SIZE))
        return built[family]

    return get


@pytest.fixture
def tiny_model(family: str, tiny_models: Callable[[str], ReferenceModel]) -> ReferenceModel:
    """The model of the test's ``family`` parameter."""
    return tiny_models(family)
