"""What stands before the application: sizes, time for a body, API keys.

Keys are compared as SHA-256 digests by `hmac.compare_digest`, all of them every time, so that neither a key's length nor its
place in the list shows in the time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from safesteer.errors import SafeSteerError
from safesteer.files import RepeatedKeyError, parse_json

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
OPEN = ("/health", "/metrics")
LONGEST = 400  # characters of an error


class Keys:
    """The API keys; none: every client is let in."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def of(cls, path: Path | None) -> Keys:
        """From a file with a key a line; blank lines and lines that begin with # do not count. Raises `SafeSteerError`."""
        if path is None:
            return cls()
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SafeSteerError(f"{path} cannot be read as a file of keys ({error})") from None
        keys = [line for line in lines if line and not line.startswith("#")]
        if not all(line.isascii() for line in keys):
            raise SafeSteerError(f"{path}: an API key holds a letter that HTTP headers do not; use plain ASCII")
        if not keys:
            raise SafeSteerError(f"{path} holds no key; write one a line, or leave out --api-key-file")
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admit(self, header: str | None) -> bool:
        """Whether an `Authorization` header holds one of the keys."""
        if not self._digests:
            return True
        scheme, _, key = (header or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        matches = [hmac.compare_digest(given, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def refusal(message: str, kind: str = "invalid_request_error", code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI clients read it; what a client sent is not sent back to it at length."""
    message = message if len(message) <= LONGEST else f"{message[:LONGEST]}..."
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Guard:
    """ASGI middleware: keys first, then a body of at most `most_bytes`, all of it within `seconds`, no key twice.

    `refused(path, status)` is called for what it answers itself.
    """

    def __init__(
        self,
        app: Any,
        keys: Keys,
        most_bytes: int,
        seconds: float,
        refused: Callable[[str, int], None] = lambda path, status: None,
    ) -> None:
        self.app, self.keys, self.most_bytes, self.seconds, self.refused = app, keys, most_bytes, seconds, refused

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN and not self.keys.admit(headers.get(b"authorization", b"").decode("latin-1")):
            wrong = refusal("the API key is missing or wrong", "authentication_error", "invalid_api_key")
            await self._answer(scope, send, 401, wrong)
            return
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.most_bytes:
            await self._too_large(scope, send)
            return
        if scope["method"] == "POST" and not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            await self._answer(scope, send, 415, refusal("send JSON, with the header Content-Type: application/json"))
            return
        body = b""
        more = scope["method"] in ("POST", "PUT", "PATCH", "DELETE")
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.most_bytes:
                        await self._too_large(scope, send)
                        return
        except TimeoutError:
            await self._answer(scope, send, 408, refusal(f"the request did not arrive within {self.seconds:g} seconds"))
            return
        try:
            parse_json(body)
        except RepeatedKeyError as error:
            await self._answer(scope, send, 400, refusal(str(error)))
            return
        except (ValueError, RecursionError):
            pass  # the application says what is wrong
        given = False

        async def replay() -> dict[str, Any]:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _too_large(self, scope: dict[str, Any], send: Send) -> None:
        await self._answer(scope, send, 413, refusal(f"the request is larger than {self.most_bytes:,} bytes"))

    async def _answer(self, scope: dict[str, Any], send: Send, status: int, content: dict[str, Any]) -> None:
        self.refused(scope["path"], status)
        body = json.dumps(content).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
