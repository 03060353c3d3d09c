"""The web side of `dar-jax serve`: the page, and an API in the form of OpenAI's image API, over one `Engine`.

Nothing blocks the event loop: devices are the engine's, images are coded in threads. Of a slow reader's samples only the newest
previews are kept. A request that goes away takes its samples with it. No path and no URL is taken from anybody.
"""

import asyncio
import base64
import collections
import contextlib
import dataclasses
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dar_jax import __version__
from dar_jax.config import checked
from dar_jax.errors import InputError
from dar_jax.inference.reconstruct import encode
from dar_jax.inference.samples import class_number
from dar_jax.serve.bodies import (
    MOST_IMAGES,
    MOST_TOKENS,
    Edit,
    Generation,
    OnlyImage,
    encode_image,
    read_base64,
    read_form,
    read_json,
    read_masked,
    read_pixels,
)
from dar_jax.serve.engine import Closed, Engine, Failure, Full, Preview, Request, Sample

log = logging.getLogger("dar_jax.serve")

SETTINGS = ("guidance", "temperature", "top_k", "top_p")
MOST_BYTES = 8 << 20  # of a body
MOST_BYTES_TOGETHER = 128 << 20  # of all bodies being read
BODY_SECONDS = 30  # for sending a body
REQUEST_SECONDS = 600  # for a whole request
SILENT_SECONDS = 15  # of a stream, before a comment says that it is alive
BACKLOG = 2 << 20  # bytes of images that wait for the reader of a stream
SMALL = 1 << 14  # bytes of an image that is encoded at once, which takes less than handing it to a thread
PARTICLES = 16  # of an edit with a mask, unless it says otherwise
CODERS = 4  # images being read at a time

HTTP_MESSAGES = {404: "there is no such page", 405: "this page does not take this method"}
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request is answered by this HTTP status and message."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, headers


def make_app(engine: Engine, hosts: Collection[str] = ("localhost", "127.0.0.1", "[::1]"), token: str | None = None) -> Any:
    """The ASGI application.

    Args:
      hosts: names in the Host header by which it answers, against DNS rebinding; "*": also any address in numbers.
      token: what requests have to carry as `Authorization: Bearer ...`; None: nothing.
    """
    service = Service(engine)
    routes = [
        Route("/", page),
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/classes", service.classes),
        Route("/v1/images/generations", service.generations, methods=["POST"]),
        Route("/v1/images/edits", service.edits, methods=["POST"]),
        Route("/v1/images/tokens", service.tokens, methods=["POST"]),
    ]
    handlers = {kind: answer_error for kind in (Refused, InputError, Full, Closed, HTTPException, Exception)}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), frozenset(hosts), token)


async def answer_error(request: HttpRequest, error: Exception) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    status, headers, message = 400, {}, str(error)
    if isinstance(error, Refused):
        status, headers = error.status, error.headers
    elif isinstance(error, Full):
        status, headers = 429, {"retry-after": "1"}
    elif isinstance(error, Closed):
        status = 503
    elif isinstance(error, HTTPException):
        status, message = error.status_code, HTTP_MESSAGES.get(error.status_code, error.detail)
    elif not isinstance(error, InputError):
        status, message = 500, "the server failed; its log says why"  # Starlette logs it
    return JSONResponse(error_body(status, message), status, headers)


def error_body(status: int, message: str) -> dict[str, Any]:
    codes = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 429: "rate_limit_exceeded", 503: "unavailable"}
    kind = {429: "rate_limit_error"}.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": " ".join(message.split()), "type": kind, "param": None, "code": codes.get(status)}}


class Guard:
    """Refuses other hosts' names, other sites' requests and wrong tokens before anything else, and adds headers."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], token: str | None):
        self.app, self.hosts, self.token = app, hosts, token and token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("content-security-policy", "default-src 'none'; frame-ancestors 'none'")
            await send(message)

        headers, api = Headers(scope=scope), scope["path"].startswith("/v1/")
        refused = None
        if not self._own_host(headers):
            refused = 403, "this name is not among the names of the server; it answers to " + ", ".join(sorted(self.hosts))
        elif api and not self._own_site(headers):
            refused = 403, "requests of other sites are refused"
        elif api and not self._has_token(headers):
            refused = 401, "this server needs its token: Authorization: Bearer TOKEN"
        if refused:
            response = JSONResponse(error_body(*refused), refused[0], {"connection": "close"})
            return await response(scope, receive, with_headers)
        await self.app(scope, receive, with_headers)

    def _own_host(self, headers: Headers) -> bool:
        name = re.sub(r":\d*$", "", ",".join(headers.getlist("host"))).lower()
        if name in self.hosts:
            return True
        with contextlib.suppress(ValueError):
            return "*" in self.hosts and bool(ipaddress.ip_address(name.strip("[]")))
        return False

    def _own_site(self, headers: Headers) -> bool:
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return False
        origin = headers.get("origin")
        return origin is None or origin.partition("://")[2].lower() == headers["host"].lower()

    def _has_token(self, headers: Headers) -> bool:
        given = headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1", "replace")
        return self.token is None or hmac.compare_digest(given, self.token)


def _digest(tag: str) -> str:
    """The name of the page's own script or style in a content security policy."""
    text = re.search(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)[1]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


PAGE = Path(__file__).with_name("page.html").read_text()
PAGE_POLICY = (
    f"default-src 'self'; script-src {_digest('script')}; style-src {_digest('style')}; img-src 'self' data: blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def page(request: HttpRequest) -> HTMLResponse:
    """The page, whose own script and style are the only ones that may run."""
    return HTMLResponse(PAGE, headers={"content-security-policy": PAGE_POLICY})


class Mailbox:
    """What a request is told, across threads: all previews, or, beyond BACKLOG, the newest of each sample only."""

    def __init__(self, shown: Callable[[Preview], bool]):
        self.shown, self.loop, self.news = shown, asyncio.get_running_loop(), asyncio.Event()
        self.waiting: collections.deque[Preview] = collections.deque()
        self.failure: Failure | None = None

    def hear(self, event: Preview | Failure) -> None:
        """The engine's listener."""
        if isinstance(event, Failure) or event.final or self.shown(event):
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Preview | Failure) -> None:
        if isinstance(event, Failure):
            self.failure = event
        else:
            self.waiting.append(event)
            if len(self.waiting) * event.image.nbytes > BACKLOG:
                self.waiting = collections.deque({each.index: each for each in self.waiting}.values())
        self.news.set()

    async def events(self, count: int) -> AsyncIterator[Preview | None]:
        """The previews until `count` are final; None now and then, while there are none. Raises Refused."""
        while count:
            if not self.waiting and self.failure is None:
                self.news.clear()
                try:
                    await asyncio.wait_for(self.news.wait(), SILENT_SECONDS)
                except TimeoutError:
                    yield None
                continue
            if self.waiting:
                event = self.waiting.popleft()
                count -= event.final
                yield event
            else:
                raise Refused(500, self.failure.message)


class Events(StreamingResponse):
    """A stream of server-sent events; however it ends, so does its request."""

    def __init__(self, content: AsyncIterator[str], request: Request):
        super().__init__(content, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            log.warning("a stream was not read to its end within %d seconds", REQUEST_SECONDS)
        finally:
            self.request.cancel()


class Service:
    """The routes."""

    def __init__(self, engine: Engine):
        self.engine, self.trained = engine, engine.trained
        self.name = self.trained.info.config.name
        self.began, self.reading, self.coders = int(time.time()), 0, asyncio.Semaphore(CODERS)
        self.side = self.trained.config.output_side
        self.size = f"{self.side}x{self.side}"

    async def health(self, request: HttpRequest) -> JSONResponse:
        running, waiting = self.engine.load()
        body = {"status": self.engine.status, "running": running, "waiting": waiting}
        if self.engine.failure:
            body["message"] = self.engine.failure
        return JSONResponse(body, 200 if self.engine.status == "ok" else 503)

    async def models(self, request: HttpRequest) -> JSONResponse:
        config, info = self.trained.config, self.trained.info
        sampling = info.config.sampling
        model = {"id": self.name, "object": "model", "created": self.began, "owned_by": "dar_jax"}
        model |= {"step": info.step, "version": __version__, "checkpoint": str(info.workdir), "size": self.size}
        model |= {"groups": self.engine.num_groups, "tokens": config.num_tokens, "codes": config.codebook_size}
        model |= {"steps": self.engine.num_steps, "most_images": MOST_IMAGES}
        model |= {"sampling": {name: getattr(sampling, name) for name in SETTINGS}}
        return JSONResponse({"object": "list", "data": [model]})

    async def classes(self, request: HttpRequest) -> JSONResponse:
        names = [{"number": number, "name": name} for number, name in enumerate(self.trained.class_names)]
        return JSONResponse({"object": "list", "data": names})

    async def generations(self, request: HttpRequest) -> Response:
        return await self._draw(request, Generation, "prefix_image")

    async def edits(self, request: HttpRequest) -> Response:
        return await self._draw(request, Edit, "image", "mask")

    async def tokens(self, request: HttpRequest) -> Response:
        async with self._read(request, OnlyImage, "image") as (_, (image,)):
            if image is None:
                raise InputError("an image is needed, as base64")
            pixels = await self._pixels(image, self.trained.config.image_size)
        tokens = await self._encode(pixels)
        shown = await asyncio.to_thread(encode_image, pixels, "png")
        return JSONResponse({"object": "image.tokens", "tokens": tokens, "b64_json": shown, "output_format": "png"})

    async def _draw(self, request: HttpRequest, kind: type[Generation], *names: str) -> Response:
        async with self._read(request, kind, *names) as (wanted, images):
            samples = await self._samples(wanted, *images)
        last = samples[0].num_groups
        box = Mailbox(lambda preview: preview.group in shown_groups(last, wanted.partial_images) and wanted.stream)
        drawing = self.engine.submit(samples, box.hear)
        if wanted.stream:
            prefix = "image_edit" if kind is Edit else "image_generation"
            return Events(self._stream(wanted, samples, box, prefix), drawing)
        try:
            finals = await until_gone(request, self._finals(box, len(samples)))
        finally:
            drawing.cancel()
        data = [await self._described(wanted, samples, finals[index]) for index in range(len(samples))]
        body = {"created": int(time.time()), "data": data, "size": self.size, "output_format": wanted.output_format}
        body |= {"background": "opaque", "usage": usage(sum(len(each["tokens"]) for each in data))}
        return JSONResponse(body)

    async def _finals(self, box: Mailbox, count: int) -> dict[int, Preview]:
        return {event.index: event async for event in box.events(count) if event is not None}

    async def _stream(self, wanted: Generation, samples: list[Sample], box: Mailbox, prefix: str) -> AsyncIterator[str]:
        counts = collections.Counter()
        try:
            async for event in box.events(len(samples)):
                if event is None:
                    yield ": waiting\n\n"
                    continue
                body = {"type": f"{prefix}.completed" if event.final else f"{prefix}.partial_image"}
                body |= await self._described(wanted, samples, event)
                body |= {"created_at": int(time.time()), "size": self.size, "background": "opaque", "quality": "auto"}
                if event.final:
                    body["usage"] = usage(len(event.tokens))
                else:
                    body["partial_image_index"] = counts[event.index]
                    counts[event.index] += 1
                yield f"event: {body['type']}\ndata: {json.dumps(body)}\n\n"
        except Refused as error:
            yield f"event: error\ndata: {json.dumps({'type': 'error', **error_body(error.status, str(error))})}\n\n"

    async def _described(self, wanted: Generation, samples: list[Sample], event: Preview) -> dict[str, Any]:
        """An image with all that it takes to draw it again."""
        sample = samples[event.index]
        name = self.trained.class_names[sample.label]
        settings = {field: getattr(wanted, field) for field in SETTINGS if getattr(wanted, field) is not None}
        about = {"label": sample.label, "class": name, "seed": sample.seed, "noise_seed": sample.noise_seed}
        about |= {"settings": settings, "model": self.name, "step": self.trained.info.step, "dar_jax": __version__}
        arguments = event.image, wanted.output_format, json.dumps(about)
        if event.image.nbytes <= SMALL:
            picture = encode_image(*arguments)
        else:
            picture = await asyncio.to_thread(encode_image, *arguments)
        body = {"index": event.index, "group": event.group, "groups": sample.num_groups, "tokens": event.tokens.tolist()}
        return {"b64_json": picture, "output_format": wanted.output_format, **body, **about}

    async def _samples(self, wanted: Generation, image: bytes | None, mask: bytes | None = None) -> list[Sample]:
        if wanted.model not in (None, self.name):
            raise Refused(404, f"there is no model {wanted.model!r}, this server has {self.name!r}")
        if wanted.size not in ("auto", self.size):
            raise InputError(f"size is {wanted.size!r}, this model's images are {self.size}")
        label = class_number(wanted.prompt, self.trained.class_names)
        run, prefix, start, start_step = self.trained.info.config.sampling, wanted.prefix_tokens, None, 0
        masked = {}
        if isinstance(wanted, Edit):
            if image is None:
                raise InputError("an edit needs an image")
            if mask is None and wanted.particles is not None:
                raise InputError("particles are for an edit with a mask")
        if mask is not None:
            start_step = wanted.start_step or 0
            async with self.coders:
                start, known = await asyncio.to_thread(read_masked, image, mask, self.trained.config)
            masked = {"known": known, "particles": wanted.particles or PARTICLES}
        elif isinstance(wanted, Edit):
            start_step = max(1, self.engine.num_steps // 2) if wanted.start_step is None else wanted.start_step
            start = await self._pixels(image, self.trained.config.resolution)
        elif image is not None:
            if prefix is not None or wanted.prefix_length is None:
                raise InputError("a prefix image needs a prefix length, and goes without prefix tokens")
            tokens = await self._encode(await self._pixels(image, self.trained.config.image_size))
            if wanted.prefix_length > len(tokens):
                raise InputError(f"the prefix length is {wanted.prefix_length}, an image has {len(tokens)} tokens")
            prefix = tokens[: wanted.prefix_length]
        if wanted.prefix_length is not None and (image is None or start is not None):
            raise InputError("a prefix length needs a prefix image")
        given = {name: getattr(wanted, name) for name in SETTINGS}
        given |= {"num_groups": wanted.groups, "start_step": start_step}
        given = {name: value for name, value in given.items() if value is not None}
        sampling = dataclasses.replace(run, **given)
        first = secrets.randbelow(2**32 - MOST_IMAGES) if wanted.seed is None else wanted.seed
        draw = lambda seed: self.engine.sample(label, seed, sampling, wanted.noise_seed, prefix, start, **masked)  # noqa: E731
        return [draw(first + number) for number in range(wanted.n)]

    async def _encode(self, pixels: np.ndarray) -> list[int]:
        future = self.engine.call(lambda: encode(self.trained, pixels[None], 1))
        return (await asyncio.wrap_future(future))[0].tolist()

    async def _pixels(self, image: bytes, side: int) -> np.ndarray:
        async with self.coders:
            return await asyncio.to_thread(read_pixels, image, side, self.trained.config)

    @contextlib.asynccontextmanager
    async def _read(self, request: HttpRequest, kind: type, *names: str) -> AsyncIterator[tuple[Any, list[bytes | None]]]:
        """The fields of a body and its images of these names, which count as being read. Raises Refused and InputError."""
        async with self._body(request) as body:
            if request.headers.get("content-type", "").startswith("multipart/form-data"):
                fields = await read_form(request.headers, body)
            else:
                fields = await asyncio.to_thread(read_json, body)
            yield await self._fields(fields, kind, *names)

    async def _fields(self, fields: dict[str, Any], kind: type, *names: str) -> tuple[Any, list[bytes | None]]:
        images = [fields.pop(name, None) for name in names]
        for place, (name, image) in enumerate(zip(names, images)):
            if isinstance(image, str):
                images[place] = await asyncio.to_thread(read_base64, image)
            elif image is not None and not isinstance(image, bytes):
                raise InputError(f"{name} should be an image, as base64")
        if isinstance(fields.get("prompt"), int):
            fields["prompt"] = str(fields["prompt"])
        if isinstance(fields.get("guidance"), (int, float)):
            fields["guidance"] = [fields["guidance"]] * 2
        if any(isinstance(value, list) and len(value) > MOST_TOKENS for value in fields.values()):  # checked one by one
            raise InputError(f"a list has at most {MOST_TOKENS} values")
        return checked(kind, fields), images

    @contextlib.asynccontextmanager
    async def _body(self, request: HttpRequest) -> AsyncIterator[bytes]:
        closing = {"connection": "close"}  # whoever goes on sending
        too_long = Refused(413, f"the body has more than {MOST_BYTES:,} bytes", **closing)
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", "0")) > MOST_BYTES:
                raise too_long
        parts, count = [], 0
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for part in request.stream():
                        count += len(part)
                        self.reading += len(part)
                        if count > MOST_BYTES:
                            raise too_long
                        if self.reading > MOST_BYTES_TOGETHER:
                            raise Refused(429, "too many large requests at once", **closing, **{"retry-after": "1"})
                        parts.append(part)
            except ClientDisconnect:
                raise Refused(499, "nobody waits") from None
            except TimeoutError:
                raise Refused(408, f"the body did not come within {BODY_SECONDS} seconds", **closing) from None
            yield b"".join(parts)
        finally:
            self.reading -= count


async def until_gone(request: HttpRequest, work: Any) -> Any:
    """The result of a coroutine, which is cancelled when the client goes, or after REQUEST_SECONDS."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=REQUEST_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0] in done:
            return tasks[0].result()
        raise Refused(499 if done else 504, f"not done within {REQUEST_SECONDS} seconds, or nobody waits")
    finally:
        for task in tasks:
            task.cancel()


def shown_groups(last: int, count: int | None) -> set[int]:
    """After which groups a preview is shown: `count` of them spread evenly, or all; without the last, which is the image."""
    if count is None or count >= last - 1:
        return set(range(1, last))
    return {round(number * last / (count + 1)) for number in range(1, count + 1)}


def usage(tokens: int) -> dict[str, Any]:
    details = {"input_tokens_details": {"text_tokens": 1, "image_tokens": 0}}
    return {"input_tokens": 1, "output_tokens": tokens, "total_tokens": 1 + tokens, **details}
