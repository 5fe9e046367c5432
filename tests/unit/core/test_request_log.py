"""One request is found by the client's name in the lines of every process."""

import pytest

from core.request import RequestId, SequenceId, sequence_id
from core.request_log import about, request_of


@pytest.mark.parametrize("client", ["http-1", "a/b/c", "with.dots/and/slashes/"])
def test_the_clients_name_is_in_what_gateways_call_a_sequence(client):
    named = sequence_id(RequestId(f"gateway-1/7/{client}"), 2, 3)

    assert request_of(named) == client
    assert about(named) == {"request_id": client, "sequence_id": named}


def test_a_name_that_no_gateway_gave_is_left_as_it_is():
    assert request_of(SequenceId("s")) == "s"
