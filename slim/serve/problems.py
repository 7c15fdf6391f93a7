"""Requests that cannot be answered, as OpenAI's interface tells them."""

from __future__ import annotations

from slim.core.errors import SlimError


class Refused(SlimError):
    """A request that is not answered.

    Args:
        message: what is wrong, what is allowed, what to do instead.
        status: of HTTP.
        code: short name of the reason, for programs; may be None.
        param: the field of the request that is wrong; may be None.
        wait: seconds after which trying again makes sense; None: it makes none.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        wait: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.wait = wait

    def body(self) -> dict:
        """Return what is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                # it may quote half a character of the request, which cannot be sent
                "message": str(self).encode("utf-8", "backslashreplace").decode(),
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def unsupported(name: str) -> Refused:
    """Return the refusal of a field that slim does not know."""
    return Refused(f"{name}: slim does not support it. Leave it out.", 400, "unsupported", name)


def stopping() -> Refused:
    """Return the refusal of a server that is about to end."""
    return Refused("The server is stopping. Ask another one, or later.", 503, "stopping", wait=5)
