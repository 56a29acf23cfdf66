"""What a client is told when it cannot have what it asked for: OpenAI's form, our words alone."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """An answer that is an error.

    Its message is written in this package. Nothing that a library says, no path and no address goes
    into one: decoders have told strangers where they keep things in memory.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Make one.

        Args:
            status: of HTTP.
            message: what is wrong and what to do.
            param: the field of the request that it is about.
            code: a name for programs.
            retry_after: seconds after which to ask again.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of this status."""
        return _KINDS.get(self.status, "server_error" if self.status >= 500 else _OTHER)

    def to_json(self) -> dict[str, Any]:
        """The body of the response."""
        described = {"message": self.message, "type": self.kind}
        return {"error": {**described, "param": self.param, "code": self.code}}


_OTHER = "invalid_request_error"
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def stopping() -> Refusal:
    """Of a server that finishes what it has."""
    return Refusal(
        503, "the server is stopping; ask another one, or later", code="stopping", retry_after=5
    )


def loading() -> Refusal:
    """Of a server whose engines are not there yet."""
    return Refusal(
        503, "the engines are still loading; ask again soon", code="loading", retry_after=5
    )


def broken() -> Refusal:
    """Of a request that the engines could not answer, for no fault of the client's."""
    return Refusal(500, "the engines could not answer this request", code="engine_error")
