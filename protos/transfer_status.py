"""How does a TransferError cross a call between workers? As a status, and back: the two are inverse."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn, cast

import grpc

from core.errors import GrantRefused, Incompatible, Overloaded, PeerLost, PrfaasError, TransferAborted


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: PrfaasError) -> NoReturn:
    """End the call with what ``error_of`` makes the same kind of error of."""
    match error:
        case Incompatible():
            said = (("field", error.field), ("ours", error.ours), ("theirs", error.theirs))
            context.set_trailing_metadata(tuple((f"incompatible-{part}", text) for part, text in said))
            code = grpc.StatusCode.FAILED_PRECONDITION
        case GrantRefused():
            code = grpc.StatusCode.NOT_FOUND
        case Overloaded():
            code = grpc.StatusCode.RESOURCE_EXHAUSTED
        case _:
            code = grpc.StatusCode.ABORTED
    await context.abort(code, str(error))


def error_of(peer: str, error: grpc.aio.AioRpcError) -> PrfaasError:
    """The error that a call to ``peer`` ended with; ``PeerLost`` for whatever ``abort`` does not send."""
    details = error.details() or ""
    match error.code():
        case grpc.StatusCode.FAILED_PRECONDITION:
            # grpc-stubs call the metadata's pairs opaque.
            said = dict(cast(Iterable[tuple[str, str]], error.trailing_metadata() or ()))
            return Incompatible(*(said.get(f"incompatible-{part}", "?") for part in ("field", "theirs", "ours")))
        case grpc.StatusCode.NOT_FOUND:
            return GrantRefused(details)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(details)
        case grpc.StatusCode.ABORTED:
            return TransferAborted(details)
        case code:
            return PeerLost(f"{peer}: {code.name} {details}")
