"""Starting, reloading and ending a server.

The policy file is read again when it changes or on SIGHUP: a good one takes the place of the old one at once for requests that
come after, a bad one is told and changes nothing. SIGTERM: `/health` says 503, no request is taken any more, those under way end.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from safesteer.errors import SafeSteerError
from safesteer.server.app import Serving, make_app
from safesteer.server.authority import Authority

LOOK = 1.0  # seconds between looks at the policy file
DRAIN = 60  # seconds that answers under way are given when the server closes


def check_host(host: str, has_keys: bool) -> None:
    """Raise `SafeSteerError` for an address that others can reach, where every client would be let in."""
    try:
        alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = host == "localhost"
    if not alone and not has_keys:
        raise SafeSteerError(
            f"--host {host} can be reached by others; give --api-key-file FILE as well, or leave out --host"
        )


def reload(serving: Serving, path: Path, say: Callable[[str], None]) -> bool:
    """Put the policy file's present content in place. False, and a sentence by `say`, where it cannot be used."""
    try:
        found = Authority.of(serving.engine.bank, path)
        for one in found.policies:
            serving.engine.check(one)
    except Exception as error:  # whatever a file can hold, the watch goes on
        serving.metrics.reloads.labels("refused").inc()
        say(f"The policy file was not reloaded: {error}.")
        return False
    serving.authority = found
    serving.metrics.reloads.labels("ok").inc()
    say(f"Reloaded {path}.")
    return True


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _on_hangup(act: Callable[[], None]) -> None:
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # no such signal, or not the main thread
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, act)


async def watch(serving: Serving, path: Path, say: Callable[[str], None], every: float = LOOK) -> None:
    """Reload when the file changes or SIGHUP arrives, for ever."""
    asked = asyncio.Event()
    _on_hangup(asked.set)
    seen = _stamp(path)
    while True:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked.wait(), every)
        now = _stamp(path)
        if asked.is_set() or (now is not None and now != seen):
            asked.clear()
            seen = now
            reload(serving, path, say)


class _Server(uvicorn.Server):
    """Tells the application at once that it is to close, so that `/health` says so while answers end."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self._serving = serving

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._serving.draining = True
        super().handle_exit(sig, frame)


def serve(
    serving: Serving,
    host: str = "127.0.0.1",
    port: int = 8000,
    policy: Path | None = None,
    *,
    say: Callable[[str], None] = lambda line: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises `SafeSteerError` where the address cannot be bound."""
    check_host(host, bool(serving.keys))

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(watch(serving, policy, say)) if policy is not None else None
        if policy is None:
            _on_hangup(lambda: say("There is nothing to reload: the server was started without --policy."))
        ready()
        try:
            yield
        finally:
            if watching is not None:
                watching.cancel()

    config = uvicorn.Config(
        make_app(serving, lifespan), host=host, port=port, log_level="warning", access_log=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=DRAIN, limit_concurrency=2048, server_header=False, lifespan="on",
    )  # fmt: skip
    with contextlib.suppress(ValueError):  # not the main thread
        # uvicorn raises it again once all is ended, and that is no failure
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _Server(config, serving).run()
    except SystemExit:
        raise SafeSteerError(
            f"{host}:{port} cannot be bound; is something else listening there? Give another --port"
        ) from None
    finally:
        serving.engine.close()
