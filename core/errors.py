"""The one error tree. Catch wide (``PrfaasError``) or narrow.

    PrfaasError
    ├── InvalidRequest          theirs: a field of the request is wrong            INVALID_ARGUMENT / 400
    │   └── UnknownModel        theirs: the model they name is not served here     NOT_FOUND / 404
    ├── WrongKey                theirs: no API key, or one that is not ours        UNAUTHENTICATED / 401
    ├── InvalidConfig           theirs: a key of the configuration is wrong        (start-up, exit code 2)
    ├── UnsupportedModel        theirs: a model that this engine cannot serve      (start-up, with the reason)
    │   └── UnsupportedQuantisation  theirs: its weights are in a format that cannot be multiplied here
    ├── Overloaded              nobody's: a bound was reached, try again later     RESOURCE_EXHAUSTED / 429
    ├── NoRoute                 nobody's: no worker can take the request           UNAVAILABLE / 503
    ├── DeadlineExceeded        theirs: the client's deadline passed               DEADLINE_EXCEEDED / 504
    ├── Cancelled               theirs: the client went away or aborted            CANCELLED / 499
    ├── SequenceFailed          a worker could not finish a sequence; ``retryable`` says whether another may
    ├── RankLost                one of the processes that compute one model together is gone: its worker ends
    └── TransferError           KV did not arrive
        ├── Incompatible        the two ends do not hold the same cache (handshake); never retried on this pair
        ├── Unauthenticated     one end of a KV link does not take the other's certificate
        ├── PeerLost            the connection or the process at the other end is gone
        ├── GrantRefused        the receiver does not know the session, or had no pages in time
        ├── TransferAborted     one end gave the session up
        ├── Corrupted           KV arrived damaged, or was lost on its way, too often
        └── ProtocolViolation   ours or theirs: an impossible message or an illegal state change

The gRPC and HTTP edges map this tree to status codes, once each (cluster/grpc_gateway.py, cluster/http_gateway.py).
"""

from __future__ import annotations


class PrfaasError(Exception):
    """Base of every error that this project raises on purpose."""


class InvalidRequest(PrfaasError):
    """A field of the client's request is wrong.

    ``field`` is the name the client used (``max_tokens``, ``messages[0].role``); the message says what is allowed.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class UnknownModel(InvalidRequest):
    """The request names a model that is not served here."""

    def __init__(self, name: str, served: str) -> None:
        super().__init__("model", f"{name!r} is not served here, only {served!r} is")


class WrongKey(PrfaasError):
    """The client showed no API key, or one that is not in ``api_keys_file``."""


class InvalidConfig(PrfaasError):
    """A key of the configuration is wrong. ``key`` is its dotted path (``engine.page_size``)."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.key = key
        self.message = message

    def __reduce__(self) -> tuple[type[InvalidConfig], tuple[str, str]]:
        """It travels between the processes of a worker."""
        return type(self), (self.key, self.message)


class UnsupportedModel(PrfaasError):
    """The model cannot be served by this engine; the message says why."""


class UnsupportedQuantisation(UnsupportedModel):
    """The model's weights are quantised in a way that cannot be computed here.

    ``quant_method`` is the checkpoint's word for it, ``needs`` what it takes, ``allowed`` the methods that would do.
    """

    def __init__(self, quant_method: str, needs: str, allowed: tuple[str, ...]) -> None:
        super().__init__(
            f"quantization_config.quant_method: {quant_method} needs {needs}; "
            f"allowed here: {', '.join(allowed) or 'none'}, and weights that are not quantised"
        )
        self.quant_method = quant_method
        self.needs = needs
        self.allowed = allowed


class Overloaded(PrfaasError):
    """A bound was reached.

    ``reason`` names the bound in a word (``max_queued``, ``slo_ttft``, ...); ``predicted`` is what would have been and
    ``allowed`` what may be, in the bound's own unit. ``retry_after_s`` is a hint for the client: when the bound should
    hold again.
    """

    def __init__(
        self,
        message: str,
        retry_after_s: float = 1.0,
        *,
        reason: str = "overloaded",
        predicted: float | None = None,
        allowed: float | None = None,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason = reason
        self.predicted = predicted
        self.allowed = allowed


class NoRoute(PrfaasError):
    """No worker can take the request now; the message says which pool is empty and why."""


class DeadlineExceeded(PrfaasError):
    """The client's deadline passed before the request was finished."""


class Cancelled(PrfaasError):
    """The client went away or aborted the request."""


class SequenceFailed(PrfaasError):
    """A worker gave a sequence up. ``retryable`` is True when another worker may succeed."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


class RankLost(PrfaasError):
    """A process of a worker of several devices is gone, or did something else than the others: the worker ends."""


class TransferError(PrfaasError):
    """KV did not arrive at the other end."""


class Incompatible(TransferError):
    """The two ends do not hold the same cache.

    ``field`` names what differs: model, revision, dtype or layout.
    """

    def __init__(self, field: str, ours: str, theirs: str) -> None:
        super().__init__(f"{field} differs: this end has {ours}, the other end has {theirs}")
        self.field = field
        self.ours = ours
        self.theirs = theirs

    def __reduce__(self) -> tuple[type[Incompatible], tuple[str, str, str]]:
        """It travels between the processes of a worker."""
        return type(self), (self.field, self.ours, self.theirs)


class Unauthenticated(TransferError):
    """One end does not take the other's certificate; the message holds what TLS says of it."""


class PeerLost(TransferError):
    """The connection to the other end is gone."""


class GrantRefused(TransferError):
    """The receiving end does not know the session, or had no pages for it in time."""


class TransferAborted(TransferError):
    """One end gave the session up; the message says which and why."""


class Corrupted(TransferError):
    """KV was sent again as often as is allowed, and still did not arrive whole and as it was sent."""


class ProtocolViolation(TransferError):
    """An impossible message, or a state change that the session's table does not allow."""
