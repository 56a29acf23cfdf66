"""The page to ask on: one file, and a policy that lets a browser do on it only what is in it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response


@dataclasses.dataclass(frozen=True)
class Page:
    """Its content, and its Content-Security-Policy."""

    content: bytes
    policy: str

    @classmethod
    def load(cls) -> Page:
        """Read it, and allow its own scripts and styles by their hashes."""
        text = resources.files("blip2.serving").joinpath("page.html").read_text("utf-8")
        allowed = {}
        for kind in ("script", "style"):
            parts = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
            hashes = (hashlib.sha256(part.encode()).digest() for part in parts)
            encoded = (base64.b64encode(one).decode() for one in hashes)
            allowed[kind] = " ".join(f"'sha256-{one}'" for one in encoded)
        policy = (
            f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']};"
            " img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none';"
            " frame-ancestors 'none'"
        )
        return cls(text.encode(), policy)

    async def respond(self, _request: Request) -> Response:
        """A route's endpoint."""
        headers = {
            "content-security-policy": self.policy,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        }
        return Response(self.content, media_type="text/html; charset=utf-8", headers=headers)
