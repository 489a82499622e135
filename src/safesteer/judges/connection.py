"""The way to judges behind an HTTP interface: OpenAI's client, and what its errors mean for a run of many exchanges.

the request's fault          that exchange fails, the next is asked
the endpoint's, for now      retried by the client; the fifth in a row ends the run
the key's or the address's   ends the run at once
"""

from __future__ import annotations

import json
import os
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict

from safesteer.errors import SafeSteerError
from safesteer.judges.base import Exchange, Result

if TYPE_CHECKING:
    from openai import APIStatusError, OpenAI

LONGEST_COMPLAINT = 120  # characters of an endpoint's own error message
EQUAL = 5  # equal failures in a row that end a run


class UnansweredError(Exception):
    """One request got no usable answer; the text says why. `lasting`: it is not the request's fault, the next may fare alike."""

    def __init__(self, why: str, lasting: bool = False) -> None:
        super().__init__(why)
        self.lasting = lasting


class RefusedError(UnansweredError):
    """The endpoint calls the request itself bad; `complaint` is all it says."""

    def __init__(self, why: str, complaint: str) -> None:
        super().__init__(why)
        self.complaint = complaint


class ConnectionOptions(TypedDict, total=False):
    """The options of `Connection` that its users pass on."""

    timeout: float
    retries: int
    requests_per_minute: float | None


class Connection:
    """An endpoint by way of OpenAI's client, which retries with growing pauses. Safe to use from several threads.

    `timeout`: seconds without data. `retries`: further attempts after 408, 409, 429, 5xx, a timeout or a broken connection, and
    after an answer that is no JSON. `requests_per_minute`: None for no limit. The key is read from the environment for each run
    and neither kept nor shown. Needs `pip install 'safesteer[judges]'`.
    """

    def __init__(
        self,
        base_url: str,
        api_key_env: str,
        *,
        timeout: float = 300.0,  # a judge that thinks sends nothing until it is done
        retries: int = 4,
        requests_per_minute: float | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401
        except ImportError:
            raise SafeSteerError("judges over HTTP need OpenAI's client; pip install 'safesteer[judges]'") from None
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise SafeSteerError(
                "the judge's base URL must start with http:// or https://, such as http://localhost:8000/v1"
            )
        if "@" in address.netloc:
            raise SafeSteerError(
                f"leave user name and password out of the judge's base URL; put the key in {api_key_env}"
            )
        self.base_url = base_url.rstrip("/")
        self.api_key_env = api_key_env
        self.timeout = timeout
        self.retries = retries
        self.requests = 0
        self._interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next = 0.0
        self._reached = False
        self._answered = False
        self._last: str | None = None
        self._equal = 0
        self._lock = threading.Lock()

    @contextmanager
    def client(self) -> Iterator[OpenAI]:
        """OpenAI's client for one run. It follows no redirect, which would carry the key to another address."""
        import openai

        key = self._key()

        def before(request: Any) -> None:
            if not key:
                del request.headers["Authorization"]
            self._take_turn()

        http = openai.DefaultHttpxClient(
            timeout=self.timeout, follow_redirects=False, event_hooks={"request": [before]}
        )
        with openai.OpenAI(
            base_url=self.base_url,
            api_key=key or "none",
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=http,
        ) as client:
            yield client

    def send(self, request: Callable[[], Any], path: str, model: str) -> Any:
        """The decoded JSON that `request` (a raw call of the client) is answered with.

        Raises `UnansweredError` after the last attempt, and `SafeSteerError` for what concerns every request: the key, the
        address, a model that does not exist, an endpoint that was never reached.
        """
        import openai

        for _ in range(self.retries + 1):
            try:
                content = request().content
                self._reached = True
                return json.loads(content)
            except (ValueError, RecursionError):
                continue
            except openai.APIStatusError as error:
                self._reached = True
                raise self._explained(path, model, error) from None
            except openai.APITimeoutError:
                raise UnansweredError(
                    f"the judge endpoint gave no answer within {self.timeout:g} seconds", lasting=True
                ) from None
            except openai.APIConnectionError:
                if not self._reached:
                    raise SafeSteerError(
                        f"the judge endpoint {self.base_url} cannot be reached; check the base URL and that it is running"
                    ) from None
                raise UnansweredError("the connection to the judge endpoint broke", lasting=True) from None
        raise UnansweredError("the judge endpoint did not answer in JSON", lasting=True)

    def note(self, failure: str | None, lasting: bool = False) -> None:
        """Count how an exchange ended (None: it was judged).

        Raises `SafeSteerError` at the fifth failure in a row that says the same up to its colon, if it is `lasting` or nothing
        was judged yet. Other failures are the exchange's, and the next may do better.
        """
        kind = None if failure is None else failure.partition(":")[0]
        with self._lock:
            self._answered = self._answered or kind is None
            self._equal = self._equal + 1 if kind == self._last else 1
            self._last = kind
            stop = kind is not None and self._equal >= EQUAL and (lasting or not self._answered)
        if stop:
            raise SafeSteerError(
                f"{EQUAL} exchanges in a row failed alike ({failure}), so the judging ends here; mend it and run again: an "
                "evaluation keeps what it has judged before"
            )

    def _take_turn(self) -> None:
        with self._lock:
            self.requests += 1
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        time.sleep(turn - now)

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not key.isascii() or not key.isprintable():
            raise SafeSteerError(f"{self.api_key_env} holds characters that no key has; set it again")
        return key

    def _explained(self, path: str, model: str, error: APIStatusError) -> Exception:
        code = error.status_code
        if code in (401, 403):
            what = "a valid key with access to the model" if self._key() else "your key; it is not set"
            return SafeSteerError(
                f"the judge endpoint {self.base_url} refused access ({code}); set the environment variable "
                f"{self.api_key_env} to {what}"
            )
        if code == 404:
            return SafeSteerError(
                f"{self.base_url}{path} or the model {model!r} does not exist there (404); set the base URL, which "
                "often ends in /v1, and the model name"
            )
        if code < 400:
            return SafeSteerError(
                f"the judge endpoint {self.base_url} redirects elsewhere ({code}); set the base URL to its final address"
            )
        complaint = self._complaint(error.body)
        if "content_filter" in str(error.code) or "content management policy" in complaint:
            return UnansweredError("the judge refused to grade this exchange")
        why = f"the judge endpoint answered with HTTP status {code}"
        if complaint:
            why += f": {' '.join(complaint.split())[:LONGEST_COMPLAINT]!r}"
        if code in (400, 422):
            return RefusedError(why, f"{error.param or ''} {complaint}")
        return UnansweredError(why, lasting=code in (408, 409, 429) or code >= 500)

    def _complaint(self, body: object) -> str:
        """What an error's body says, never with the key."""
        if isinstance(body, Mapping):
            body = body.get("message") or body.get("detail") or ""
        text = body if isinstance(body, str) else json.dumps(body, default=str)
        key = self._key()
        return text.replace(key, "[key]") if key else text


def in_threads(
    exchanges: Sequence[Exchange], work: Callable[[Exchange], Result], workers: int, progress: Callable[[int], None]
) -> list[Result]:
    """`work` over the exchanges, in order; the first exception ends it without starting what still waits."""
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        futures = [pool.submit(work, exchange) for exchange in exchanges]
        for future in as_completed(futures):
            future.result()
            progress(1)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
