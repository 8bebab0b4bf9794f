"""Every error that a peer, a person or a disk can cause.

MoemeshError
├── ConfigurationError        a setting is wrong                                 (start-up)
│   └── UnsupportedModelError the checkpoint needs something this build lacks    (start-up)
├── CheckpointError           a file of the checkpoint is missing or damaged     (start-up, load)
├── ProtocolError             bytes from a peer do not form a message            (dropped, counted)
├── RequestError              what a client sent
│   ├── InvalidRequestError       a field is wrong                               400
│   ├── ContextLengthError        prompt + max_tokens exceed the context         400
│   ├── UnknownModelError         another model than the one served              404
│   ├── UnknownRequestError       no such request, or another tenant's           404
│   ├── ForbiddenError            an origin or a Host name that is not allowed   403
│   ├── IdempotencyError          a key that stands for another body             422
│   ├── RequestTooLargeError      too many bytes                                 413
│   ├── UnsupportedEncodingError  a body that is compressed                      415
│   └── OverloadedError           queue full: try again after a while            429
└── MeshError                 the mesh cannot go on with something
    ├── NotReadyError             no pipeline or not all experts yet             503
    ├── NodeLostError             a node died and nothing could take over        503
    │   └── RankLostError             a stage has lost one of its ranks          503 (ends the incarnation)
    ├── DeadlineError             a wait ran out of time                         504
    ├── SocketError               no socket can be opened: too many files        503
    ├── CapacityError             shards or cache do not fit what nodes offer    503
    ├── ExecutionError            a node failed while computing                  500
    ├── DeviceError               a node's GPU failed or has no memory left      500 (ends the process)
    ├── SetAsideError             a request that crashes the router every time   500
    ├── JournalError              the journal cannot be written to               503
    └── FencedError               a newer router has the state folder            503 (ends the process)

Each leaf has a wire code (what `Failed` carries) and an HTTP status with OpenAI's error type.
"""

from __future__ import annotations

from typing import ClassVar


class MoemeshError(Exception):
    """Root. `code` travels on the wire, `http_status` and `openai_type` to clients."""

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"

    @property
    def message(self) -> str:
        """Returns the sentence for people: names the field or thing and what would be right."""
        return str(self)


class ConfigurationError(MoemeshError):
    """A setting is wrong; names the setting and what would be right."""

    code = "configuration_error"


class UnsupportedModelError(ConfigurationError):
    """The checkpoint asks for something that this build does not compute; names it."""

    code = "unsupported_model"


class CheckpointError(MoemeshError):
    """A file or tensor of the checkpoint is missing or not what the config says."""

    code = "checkpoint_error"


class ProtocolError(MoemeshError):
    """Frames from a peer that do not form a valid message."""

    code = "protocol_error"


class RequestError(MoemeshError):
    """What a client sent cannot be served. `parameter` names the field of the request, if it is one field's fault."""

    code = "invalid_request"
    http_status = 400
    openai_type = "invalid_request_error"

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class InvalidRequestError(RequestError):
    """A field has a wrong type or value."""


class ContextLengthError(RequestError):
    """Prompt and completion do not fit the context."""

    code = "context_length_exceeded"


class UnknownModelError(RequestError):
    """The mesh serves one model, and not this one."""

    code = "model_not_found"
    http_status = 404


class UnknownRequestError(RequestError):
    """There was none, it is forgotten, or it belongs to another tenant; the client is not told which."""

    code = "request_not_found"
    http_status = 404


class ForbiddenError(RequestError):
    """The page's origin or the Host name is not allowed."""

    code = "forbidden"
    http_status = 403


class IdempotencyError(RequestError):
    """The idempotency key was used with another body before."""

    code = "idempotency_key_reused"
    http_status = 422


class RequestTooLargeError(RequestError):
    """The body has more bytes than MAX_BODY_BYTES."""

    code = "request_too_large"
    http_status = 413


class UnsupportedEncodingError(RequestError):
    """The body is compressed or otherwise encoded."""

    code = "unsupported_encoding"
    http_status = 415


class OverloadedError(RequestError):
    """Queue full. `retry_after_s` goes into the Retry-After header."""

    code = "overloaded"
    http_status = 429
    openai_type = "rate_limit_error"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MeshError(MoemeshError):
    """The mesh cannot go on with something that was right."""

    code = "mesh_error"
    http_status = 503


class NotReadyError(MeshError):
    """Not every slot or shard is served yet."""

    code = "not_ready"


class SocketError(MeshError):
    """This process may not open one more socket; says what limits it. What there is goes on."""

    code = "no_socket"


class NodeLostError(MeshError):
    """A node is gone and nothing could take over in time."""

    code = "node_lost"


class RankLostError(NodeLostError):
    """A process of a stage's tensor-parallel group is gone or hangs: the stage comes back with those that are left."""

    code = "rank_lost"


class DeadlineError(MeshError):
    """A bounded wait ran out."""

    code = "deadline_exceeded"
    http_status = 504


class CapacityError(MeshError):
    """What must be held does not fit what the nodes offer."""

    code = "capacity_exceeded"


class ExecutionError(MeshError):
    """A node failed while computing; its reason is in the message."""

    code = "execution_error"
    http_status = 500


class DeviceError(MeshError):
    """A node's accelerator has failed, hangs, or has no memory left for a step: this process cannot continue."""

    code = "device_failed"
    http_status = 500


class SetAsideError(MeshError):
    """The router crashed again and again over this request: it is kept on disk, and will not be resumed."""

    code = "request_set_aside"
    http_status = 500


class JournalError(MeshError):
    """The journal cannot be written to (a full disk, an I/O error): requests that cannot be kept are not begun."""

    code = "journal_unavailable"


class FencedError(MeshError):
    """The state folder carries a newer term: this router was replaced while it was stopped."""

    code = "router_fenced"


LIFE_ENDING_ERRORS = (RankLostError, DeviceError)
"""Not a step's fault: they end the incarnation or the process, and are not answered with `Failed`."""

_LEAVES: tuple[type[MoemeshError], ...] = (
    ConfigurationError,
    UnsupportedModelError,
    CheckpointError,
    ProtocolError,
    NotReadyError,
    SocketError,
    NodeLostError,
    DeadlineError,
    CapacityError,
    ExecutionError,
)
ERRORS_BY_CODE: dict[str, type[MoemeshError]] = {error.code: error for error in _LEAVES}
"""Codes that a `Failed` message may carry, and the error each stands for at the receiver."""


def error_from_wire(code: str, message: str) -> MoemeshError:
    """Returns the error that a peer's `Failed` stands for; an unknown code (a newer peer) becomes ExecutionError."""
    return ERRORS_BY_CODE.get(code, ExecutionError)(message)
