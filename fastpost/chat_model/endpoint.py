"""A model behind an OpenAI-compatible endpoint: several requests at once, each with its retries.

    POST {url}  {"model", "messages", "seed", "temperature", "top_p", "max_tokens"}

Busy or broken servers (429, 5xx, error pages, replies that are no JSON, silence) are asked again
after a pause that doubles, or the one that `Retry-After` names. A conversation the server will not
take (400, 413, 422) has no reply. What would fail for every conversation (401, 403, 404, a
redirect) ends the run at once, with the requests under way waited for and their replies handed on.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from http.client import HTTPException
from typing import Any

from fastpost.chat_model.interface import (
    Conversation,
    Reply,
    Sampling,
    in_order,
    require_conversation,
)
from fastpost.chat_model.usage import Price, Usage, estimate_tokens

__all__ = ["EndpointChatModel", "EndpointRefused", "EndpointUnavailable"]

_REPLY_BYTES = 16 << 20
_LONGEST_PAUSE = 60.0
_UNTAKEN = {400, 413, 422}
_BUSY = {408, 409, 425, 429}


class EndpointUnavailable(RuntimeError):
    """One request brought no reply.

    Attributes:
        is_final: asking again would not help.
        pause: seconds the endpoint asks to wait, None where it does not say.
    """

    def __init__(self, message: str, *, is_final: bool = False, pause: float | None = None) -> None:
        super().__init__(message)
        self.is_final = is_final
        self.pause = pause


class EndpointRefused(RuntimeError):
    """The endpoint will take no request at all: wrong key, address or model name."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key elsewhere, and a POST as a GET."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class EndpointChatModel:
    """A `ChatModel` behind an endpoint.

    Args:
        url: address of the chat completions, ending in `/chat/completions`.
        model: name the endpoint knows the model by. It names the model in caches too.
        sampling: how replies are sampled.
        api_key: sent as a bearer token; part of no message, cache or identity.
        concurrency: requests at once.
        timeout_seconds: longest time for one request, from connecting to the last byte.
        attempts: requests for one conversation before it is given up.
        pause_seconds: wait before the second request; doubles after each.
        price: for the cost in estimates.

    Attributes:
        usage: what was sent and received so far.
        last_error: why the last conversation without a reply has none.

    Raises:
        ValueError: a URL of another kind, or a count below 1.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        sampling: Sampling | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        timeout_seconds: float = 120.0,
        attempts: int = 4,
        pause_seconds: float = 1.0,
        price: Price | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url is {url!r}; give http(s)://.../v1/chat/completions")
        if concurrency < 1 or attempts < 1:
            raise ValueError(
                f"concurrency is {concurrency}, attempts is {attempts}; give at least 1 of each"
            )
        if not timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {timeout_seconds}; give a positive number")
        self.url, self.model = url, model
        self.sampling = sampling or Sampling()
        self.concurrency, self.attempts = concurrency, attempts
        self.timeout_seconds, self.pause_seconds = timeout_seconds, pause_seconds
        self.price = price
        self.usage = Usage()
        self.last_error: str | None = None
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    @property
    def identity(self) -> dict[str, Any]:
        """Model and sampling; the address is left out, so that a model may move."""
        return {"model": self.model, **self.sampling.as_dict()}

    def __call__(self, conversations: Sequence[Conversation], *, seed: int) -> list[str | None]:
        """One reply for each conversation, None where none came after all attempts.

        Raises:
            EndpointRefused: the endpoint takes no request at all.
        """
        return in_order(self.stream(conversations, seed=seed), len(conversations))

    def stream(
        self, conversations: Sequence[Conversation], *, seed: int
    ) -> Iterator[tuple[int, Reply | None]]:
        """Replies as they arrive.

        Raises:
            EndpointRefused: the endpoint takes no request at all; after the replies under way.
        """
        for conversation in conversations:
            require_conversation(conversation)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="endpoint")
        places: dict[Future[Reply | None], int] = {}
        remaining = iter(enumerate(conversations))
        refused: EndpointRefused | None = None
        try:
            while True:
                # No more futures than requests at once: nothing is queued when all must end.
                while refused is None and len(places) < self.concurrency:
                    following = next(remaining, None)
                    if following is None:
                        break
                    place, conversation = following
                    places[pool.submit(self._ask, conversation, seed)] = place
                if not places:
                    break
                done, _ = wait(places, return_when=FIRST_COMPLETED)
                for future in done:
                    place = places.pop(future)
                    try:
                        reply = future.result()
                    except EndpointRefused as error:
                        refused = error
                        continue
                    yield place, reply
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if refused is not None:
            raise refused

    def _ask(self, conversation: Conversation, seed: int) -> Reply | None:
        pause = self.pause_seconds
        for attempt in range(1, self.attempts + 1):
            try:
                return self._request(conversation, seed)
            except EndpointUnavailable as error:
                self.last_error = str(error)
                if error.is_final or attempt == self.attempts:
                    return None
                time.sleep(min(pause if error.pause is None else error.pause, _LONGEST_PAUSE))
                pause *= 2
        return None

    def _request(self, conversation: Conversation, seed: int) -> Reply:
        sent = {
            "model": self.model,
            "messages": conversation,
            "seed": seed,
            **self.sampling.as_dict(),
        }
        request = urllib.request.Request(self.url, json.dumps(sent).encode(), self._headers)
        started = time.monotonic()
        try:
            answer = self._answer(request, started + self.timeout_seconds)
            reply = _reply(answer, self.url)
        except (EndpointUnavailable, EndpointRefused):
            self.usage.add(seconds=time.monotonic() - started, failed=True)
            raise
        counts = _token_counts(answer)
        self.usage.add(
            seconds=time.monotonic() - started,
            prompt_tokens=counts[0] if counts else estimate_tokens([conversation]),
            reply_tokens=counts[1] if counts else estimate_tokens([[{"content": reply.text}]]),
            estimated=counts is None,
        )
        return reply

    def _answer(self, request: urllib.request.Request, deadline: float) -> dict[str, Any]:
        """The JSON object that the endpoint answers with."""
        try:
            with _OPENER.open(request, timeout=self.timeout_seconds) as response:
                body = bytearray()
                while part := response.read1(1 << 16):
                    body += part
                    if len(body) > _REPLY_BYTES:
                        raise EndpointUnavailable(f"{self.url}: more than 16 MiB in one answer")
                    if time.monotonic() > deadline:
                        raise EndpointUnavailable(
                            f"{self.url}: no end after {self.timeout_seconds:g} s"
                        )
            answer = json.loads(body)
        except urllib.error.HTTPError as error:
            with error:
                raise self._status_error(error) from None
        # HTTPException: a connection that ends within a line or a chunk.
        except (OSError, ValueError, RecursionError, HTTPException) as error:
            raise EndpointUnavailable(f"{self.url}: {type(error).__name__}: {error}") from error
        if not isinstance(answer, dict):
            raise EndpointUnavailable(f"{self.url}: the answer is no JSON object")
        return answer

    def _status_error(self, error: urllib.error.HTTPError) -> Exception:
        try:
            shown = error.read(300).decode("utf-8", "replace").strip()
        except (OSError, HTTPException):
            shown = ""
        text = f"{self.url} answered {error.code} {error.reason}: {shown}"
        if error.code in _UNTAKEN:
            return EndpointUnavailable(text, is_final=True)
        if error.code in _BUSY or error.code >= 500:
            return EndpointUnavailable(text, pause=_seconds(error.headers.get("Retry-After")))
        return EndpointRefused(f"{text}; check the address, the key and the model's name")


def _reply(answer: dict[str, Any], url: str) -> Reply:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"]
    except (LookupError, TypeError) as error:
        shown = json.dumps(answer)[:200]
        raise EndpointUnavailable(f"{url}: the answer holds no reply: {shown}") from error
    if not isinstance(text, str):
        raise EndpointUnavailable(f"{url}: the reply is {type(text).__name__}, expected text")
    return Reply(text, is_whole=choice.get("finish_reason") != "length")


def _token_counts(answer: dict[str, Any]) -> tuple[int, int] | None:
    """(prompt, reply) tokens as reported; None where they are not, or are no numbers."""
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if any(type(count) is not int or count < 0 for count in counts):
        return None
    return counts  # type: ignore[return-value]


def _seconds(header: str | None) -> float | None:
    """`Retry-After` in seconds; a date, which some servers send, counts as not said."""
    return float(header) if header is not None and header.strip().isdigit() else None
