"""`dar-jax serve`: its API through HTTP on loopback, its limits, and what it refuses."""

import asyncio
import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from many_hosts import CACHE, FASTER, FLAGS
from PIL import Image
from serving import Served, wait_for

from dar_jax.cli.serve import Serve
from dar_jax.errors import InputError
from dar_jax.inference.edit import edit
from dar_jax.inference.samples import sample
from dar_jax.serve import app as app_module
from dar_jax.serve.app import Mailbox, make_app, shown_groups
from dar_jax.serve.engine import Engine, Preview

GENERATIONS, EDITS, TOKENS = (f"/v1/images/{name}" for name in ("generations", "edits", "tokens"))


@pytest.fixture(scope="module")
def trained(engine):
    return engine.trained


@pytest.fixture(scope="module")
def client(url):
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def pixels(b64):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def events(lines):
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ")]


def stream(client, path=GENERATIONS, **body):
    with client.stream("POST", path, json={"prompt": "3", "seed": 5, "stream": True, **body}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.read()
        return events(answer.iter_lines())


def refused(answer, status, word):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert word in error["message"] and "\n" not in error["message"] and {"type", "param", "code"} < set(error)
    return True


def test_an_edit_with_a_mask_is_that_of_the_command(client, trained):
    """Its tokens and image, streamed group by group with the known half in every preview, beside other samples."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    shades = np.tile(np.repeat([0, 255], 4), (8, 1)).astype(np.uint8)
    images, known = np.repeat(picture[None, ..., None], 2, axis=0), np.repeat(shades[None] == 0, 2, axis=0)
    config = trained.info.config.sampling
    (drawn,) = edit(trained, images, known, [3, 3], [5, 6], config, (4,))
    body = {"image": png(picture), "mask": png(shades), "particles": 4, "n": 2}
    with ThreadPoolExecutor(1) as other:
        beside = other.submit(client.post, GENERATIONS, json={"prompt": "7", "seed": 1})
        told = stream(client, EDITS, **body)
        assert beside.result().status_code == 200
    assert len(told) == 8
    for event in told:
        np.testing.assert_array_equal(pixels(event["b64_json"])[:, :4], picture[:, :4])
    for event in (event for event in told if event["type"] == "image_edit.completed"):
        assert event["tokens"] == drawn.tokens[event["index"]].tolist()
        assert np.abs(pixels(event["b64_json"]).astype(int) - drawn.images[event["index"], ..., 0]).max() <= 1


def test_an_image_is_that_of_the_command(client, trained):
    answer = client.post(GENERATIONS, json={"prompt": "3", "seed": 5, "n": 2, "size": "8x8"}).json()
    config = trained.info.config.sampling
    (drawn,) = sample(trained, [3, 3], [5, 6], config, 2)
    for index, image in enumerate(answer["data"]):
        assert image["seed"] == 5 + index and image["tokens"] == drawn.tokens[index].tolist()
        assert np.abs(pixels(image["b64_json"]).astype(int) - drawn.images[index, ..., 0]).max() <= 1
    assert answer["usage"]["output_tokens"] == 32 and answer["size"] == "8x8"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_file_says_how_it_was_made(client, kind):
    data = client.post(GENERATIONS, json={"prompt": 3, "output_format": kind, "temperature": 0.9}).json()["data"][0]
    image = Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))
    about = json.loads(image.getexif()[270])
    assert image.format == kind.upper() and about["seed"] == data["seed"] and about["settings"] == {"temperature": 0.9}


def test_a_stream_sharpens(client):
    got = stream(client, n=2)
    for index in range(2):
        own = [event for event in got if event["index"] == index]
        assert [event["group"] for event in own] == [1, 2, 3, 4]
        assert [event["type"].split(".")[1] for event in own] == ["partial_image"] * 3 + ["completed"]
        assert [event["partial_image_index"] for event in own[:3]] == [0, 1, 2]
        for event in own:
            assert event["tokens"] == own[-1]["tokens"][: 4 * event["group"]]
    assert [event["group"] for event in stream(client, partial_images=1)] == [2, 4]
    assert [event["group"] for event in stream(client, partial_images=0)] == [4]
    stopped = stream(client, groups=2)
    assert [event["group"] for event in stopped] == [1, 2] and stopped[-1]["b64_json"] == got[2]["b64_json"]


def test_which_previews_are_shown():
    assert shown_groups(8, None) == shown_groups(8, 7) == shown_groups(8, 8) == set(range(1, 8))
    assert shown_groups(8, 1) == {4} and shown_groups(8, 3) == {2, 4, 6} and shown_groups(1, None) == set()
    assert all(len(shown_groups(8, count)) == count for count in range(8))


def test_a_branch_keeps_tokens_and_previews(client):
    parent = stream(client)
    tokens = parent[-1]["tokens"]
    child = stream(client, prompt="7", seed=99, noise_seed=5, prefix_tokens=tokens[:8])
    assert child[-1]["tokens"][:8] == tokens[:8] and child[-1]["tokens"] != tokens
    for group in range(2):
        assert np.abs(pixels(child[group]["b64_json"]).astype(int) - pixels(parent[group]["b64_json"])).max() <= 1
    other = stream(client, seed=99, prefix_tokens=tokens)
    assert other[-1]["tokens"] == tokens and other[-1]["b64_json"] != parent[-1]["b64_json"]


def test_pictures(client, trained):
    """Its tokens; it as a prefix; it as a start; and a large one of another shape."""
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    found = client.post(TOKENS, json={"image": "data:image/png;base64," + png(picture)}).json()
    assert len(found["tokens"]) == 16 and pixels(found["b64_json"]).shape == (8, 8)
    drawn = stream(client, prefix_image=png(picture), prefix_length=6)
    assert drawn[-1]["tokens"][:6] == found["tokens"][:6]
    distances = []
    for step in (1, 3):
        (event,) = [
            e for e in stream(client, EDITS, image=png(picture), start_step=step) if e["type"] == "image_edit.completed"
        ]
        distances.append(np.abs(pixels(event["b64_json"]).astype(int) - pixels(found["b64_json"])).mean())
    assert distances[1] < distances[0]


def test_openai_client(url):
    """The official client, with nothing changed but the address."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    image = client.images.generate(model="tiny", prompt="3", extra_body={"seed": 5})
    assert pixels(image.data[0].b64_json).shape == (8, 8)
    got = list(client.images.generate(prompt="3", stream=True, partial_images=3, extra_body={"seed": 5}))
    assert [event.type for event in got] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert got[-1].b64_json == image.data[0].b64_json
    edit = client.images.edit(image=("a.png", base64.b64decode(got[0].b64_json)), prompt="3", extra_body={"start_step": 2})
    assert pixels(edit.data[0].b64_json).shape == (8, 8)
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="there is no class 'cow'"):
        client.images.generate(prompt="cow")
    with pytest.raises(openai.NotFoundError, match="there is no model 'dall-e-3'"):
        client.images.generate(prompt="3", model="dall-e-3")


def test_what_there_is(client):
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert client.get("/v1/classes").json()["data"][3] == {"number": 3, "name": "3"}
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "http://" not in page.text and "https://" not in page.text  # nothing from elsewhere


WRONG = {
    "no class": ({"prompt": "cow"}, "no class 'cow'"),
    "no prompt": ({}, "lacks prompt"),
    "unknown field": ({"prompt": "3", "steps": 4}, "'steps'"),
    "too many": ({"prompt": "3", "n": 17}, "n is 17"),
    "none": ({"prompt": "3", "n": 0}, "n is 0"),
    "a number as text": ({"prompt": "3", "n": "2"}, "n should be"),
    "size": ({"prompt": "3", "size": "1024x1024"}, "images are 8x8"),
    "url": ({"prompt": "3", "response_format": "url"}, "b64_json"),
    "gif": ({"prompt": "3", "output_format": "gif"}, "png, jpeg, webp"),
    "seed": ({"prompt": "3", "seed": 2**32}, "seed is"),
    "the second seed": ({"prompt": "3", "seed": 2**32 - 1, "n": 2}, "seed is"),
    "guidance": ({"prompt": "3", "guidance": [1]}, "guidance"),
    "infinite": ({"prompt": "3", "temperature": 1e999}, "temperature"),
    "top_p": ({"prompt": "3", "top_p": 2}, "top_p"),
    "groups": ({"prompt": "3", "groups": 5}, "num_groups is 5"),
    "token": ({"prompt": "3", "prefix_tokens": [64]}, "token 64"),
    "negative token": ({"prompt": "3", "prefix_tokens": [-1]}, "-1"),
    "tokens": ({"prompt": "3", "prefix_tokens": [1] * 17}, "17 tokens"),
    "length alone": ({"prompt": "3", "prefix_length": 4}, "needs a prefix image"),
    "image alone": ({"prompt": "3", "prefix_image": png(np.zeros((8, 8), np.uint8))}, "needs a prefix length"),
    "length": ({"prompt": "3", "prefix_image": png(np.zeros((8, 8), np.uint8)), "prefix_length": 17}, "length is 17"),
    "no base64": ({"prompt": "3", "prefix_image": "!", "prefix_length": 1}, "no base64"),
    "a path": ({"prompt": "3", "prefix_image": "/etc/passwd", "prefix_length": 1}, "base64"),
    "an address": ({"prompt": "3", "prefix_image": "http://127.0.0.1/x.png", "prefix_length": 1}, "no base64"),
    "no image": ({"prompt": "3", "prefix_image": "AAAA", "prefix_length": 1}, "no PNG, JPEG or WebP"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests(client, name):
    body, word = WRONG[name]
    text = json.dumps(body).replace("Infinity", "1e999")
    assert refused(client.post(GENERATIONS, content=text, headers={"content-type": "application/json"}), 400, word)


def test_wrong_edits(client):
    assert refused(client.post(EDITS, json={"prompt": "3"}), 400, "needs an image")
    image = png(np.zeros((8, 8), np.uint8))
    assert refused(client.post(EDITS, json={"prompt": "3", "image": image, "start_step": 4}), 400, "start_step is 4")
    for mask, word in (
        (png(np.zeros((8, 8), np.uint8)), "no white part"),
        (png(np.zeros((8, 9), np.uint8)), "is 9 x 8 pixels"),
    ):
        assert refused(client.post(EDITS, json={"prompt": "3", "image": image, "mask": mask}), 400, word)
    assert refused(client.post(EDITS, json={"prompt": "3", "image": image, "particles": 4}), 400, "with a mask")
    assert refused(client.post(TOKENS, json={}), 400, "an image is needed")
    assert refused(client.get(GENERATIONS), 405, "method") and refused(client.get("/v1/engines"), 404, "no such page")
    assert refused(client.get("/../../etc/passwd"), 404, "no such page")


def test_garbage_bodies(client, engine):
    rng = np.random.default_rng(0)
    bodies = [
        b"",
        b"null",
        b"[]",
        b'"3"',
        b"{",
        b'{"prompt": "3"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 10_000 + b"}",
    ]
    bodies += [rng.bytes(size) for size in (1, 100, 10_000)]
    for body in bodies:
        for kind in ("application/json", "multipart/form-data; boundary=x", "multipart/form-data", "text/plain"):
            answer = client.post(GENERATIONS, content=body, headers={"content-type": kind})
            assert answer.status_code == 400 and answer.json()["error"]["message"], (body[:20], kind, answer.text)
    assert engine.load() == (0, 0)


def test_bodies_that_take_long_to_read(client):
    """Each would hold up everybody's streams for minutes."""
    answer = client.post(GENERATIONS, json={"prompt": "3", "prefix_tokens": [0] * 20_000})
    assert refused(answer, 400, "a list has at most 16384 values")
    form = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nxxx-aaa\r\n--b--\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b; charset=punycode"}
    assert refused(client.post(GENERATIONS, content=form, headers=kind), 400, "without a charset")
    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(file, "JPEG", progressive=True)
    scan = file.getvalue()[file.getvalue().rindex(b"\xff\xda") : -2]
    scans = base64.b64encode(file.getvalue()[:-2] + 300 * scan + b"\xff\xd9").decode()
    assert refused(client.post(TOKENS, json={"image": scans}), 400, "more than 200 scans")


def test_decompression_bombs(client):
    """Small files of very many pixels are refused by their headers."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    for side in (5000, 30_000, 2**31 - 1):
        header = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
        data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")
        began = time.monotonic()
        bomb = base64.b64encode(b"\x89PNG\r\n\x1a\n" + data).decode()
        answer = client.post(TOKENS, json={"image": bomb})
        assert answer.status_code == 400 and "image" in answer.json()["error"]["message"]
        assert time.monotonic() - began < 5


def test_large_bodies(client, monkeypatch):
    assert refused(client.post(GENERATIONS, content=b" " * (8 * 2**20 + 1)), 413, "bytes")

    def endless():
        while True:
            yield b" " * 2**16

    with _either():
        assert refused(client.post(GENERATIONS, content=endless()), 413, "bytes")
    monkeypatch.setattr(app_module, "MOST_BYTES_TOGETHER", 1000)
    for _ in range(2):
        assert refused(client.post(GENERATIONS, content=b" " * 900), 400, "no JSON")  # and none of it counts afterwards
    assert refused(client.post(GENERATIONS, content=b" " * 2000), 429, "large")
    monkeypatch.undo()
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)

    def slow():
        yield b"{"
        time.sleep(1)
        yield b"}"

    with _either():
        assert refused(client.post(GENERATIONS, content=slow()), 408, "seconds")


class _either:
    """The answer is read, or the connection breaks because the server does not take the rest."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        return kind is not None and issubclass(kind, httpx.HTTPError)


OWN = "own host"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "10.0.0.1"}, 403),
        ({"host": "localhost:1234"}, 200),
        ({"host": "[::1]:1234"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": OWN}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
    ids=str,
)
def test_other_sites_are_refused(client, url, headers, status):
    headers = {name: url if value is OWN else value for name, value in headers.items()}
    answer = client.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403


def test_token(engine):
    transport = httpx.ASGITransport(make_app(engine, ("localhost", "*"), "a secret of sixteen"))

    async def ask(path, **headers):
        async with httpx.AsyncClient(transport=transport, base_url="http://192.168.1.2:8080") as client:
            return (await client.get(path, headers=headers)).status_code

    def status(path, **headers):
        return asyncio.run(ask(path, **headers))

    assert status("/v1/models") == 401 and status("/v1/models", authorization="Bearer a secret of sixteem") == 401
    assert status("/v1/models", authorization="Bearer \xe9".encode("latin-1")) == 401
    assert status("/v1/models", authorization="Bearer a secret of sixteen") == 200
    assert status("/") == status("/health") == 200  # the page brings no secret, and asks for the token
    assert status("/", host="evil.example") == 403


def test_full(trained, engine):
    """What does not fit is told to come back, and a request that goes makes room."""
    small = Engine(trained, max_batch=1, max_waiting=2)
    try:
        hold, wanted = threading.Event(), engine.sample(3, 1, trained.info.config.sampling)
        wait_for(lambda: small.status == "ok", 60)
        requests = [small.submit([wanted], lambda event: hold.wait(30))]
        wait_for(lambda: small.load() == (1, 0))
        requests += [small.submit([wanted], lambda event: None) for _ in range(2)]
        served = Served(make_app(small))
        with httpx.Client(base_url=served.url) as client:
            answer = client.post(GENERATIONS, json={"prompt": "3"})
            assert refused(answer, 429, "wait already") and int(answer.headers["retry-after"]) >= 1
            requests[1].cancel()
            assert small.load()[1] == 1
            hold.set()
            assert client.post(GENERATIONS, json={"prompt": "3"}, timeout=30).status_code == 200
            small.stop()
            wait_for(lambda: not small._thread.is_alive())
            assert refused(client.post(GENERATIONS, json={"prompt": "3"}), 503, "stops")
        served.close()
    finally:
        hold.set()
        small.close()


def test_many_streams_with_disconnects_and_slow_readers(client, url, engine):
    """200 at once; a quarter goes away after the first event, some never read: the others get all, and nothing is left."""

    async def one(session, number):
        body = {"prompt": str(number % 10), "seed": number, "stream": True}
        while True:
            async with session.stream("POST", GENERATIONS, json=body) as answer:
                if answer.status_code == 429:
                    await asyncio.sleep(0.2)
                    continue
                got = []
                async for line in answer.aiter_lines():
                    got += events([line])
                    if number % 4 == 0 and got:
                        return None
                return got[-1]["type"], len(got)

    async def never_reads():
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        body = b'{"prompt": "3", "n": 4, "stream": true}'
        head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        return writer

    async def everything():
        # No connection is used twice: the server closes idle ones, maybe just when the next request of a slow client comes.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as session:
            writers = [await never_reads() for _ in range(4)]
            results = await asyncio.gather(*(one(session, number) for number in range(200)))
            for writer in writers:
                writer.close()
        return results

    results = asyncio.run(everything())
    assert [result for number, result in enumerate(results) if number % 4] == [("image_generation.completed", 4)] * 150
    wait_for(lambda: engine.load() == (0, 0))
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


def test_a_slow_reader_keeps_the_newest_previews(monkeypatch):
    """All of them while they are small; beyond that one for each sample, and the last one always."""
    most = 18

    def preview(index, group):
        return Preview(index, group, np.zeros(4, np.int32), np.zeros((8, 8, 1), np.uint8), group == 9)

    async def read():
        box = Mailbox(lambda event: True)
        for group in range(1, 10):
            for index in range(2):
                box.hear(preview(index, group))
            await asyncio.sleep(0)
            assert len(box.waiting) <= most
        return [(event.index, event.group) async for event in box.events(2)]

    assert asyncio.run(read()) == [(index, group) for group in range(1, 10) for index in range(2)]
    monkeypatch.setattr(app_module, "BACKLOG", 4 * 64)
    most = 4
    got = asyncio.run(read())
    assert dict(got) == {0: 9, 1: 9} and len(got) <= most


def test_silence_and_time_limits(client, engine, monkeypatch):
    """A stream that waits says so now and then, and none takes for ever; its samples leave."""
    monkeypatch.setattr(app_module, "SILENT_SECONDS", 0.01)
    hold = threading.Event()
    engine.call(lambda: hold.wait(20))
    with client.stream("POST", GENERATIONS, json={"prompt": "3", "stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": waiting"
        hold.set()
        assert [event["group"] for event in events(lines)] == [1, 2, 3, 4]
    hold.clear()
    engine.call(lambda: hold.wait(20))
    monkeypatch.setattr(app_module, "REQUEST_SECONDS", 0.1)
    assert refused(client.post(GENERATIONS, json={"prompt": "3"}), 504, "seconds")
    with pytest.raises(httpx.HTTPError):
        stream(client)
    hold.set()
    wait_for(lambda: engine.load() == (0, 0))


def test_nothing_of_a_request_is_logged(client, caplog):
    client.post(GENERATIONS, json={"prompt": "a secret prompt"})
    client.post(TOKENS, json={"image": "c2VjcmV0"})
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "options, word",
    [
        ({"host": "0.0.0.0"}, "--token"),
        ({"host": "192.168.1.2"}, "--token"),
        ({"host": "example.org"}, "--token"),
        ({"token": "absent"}, "cannot read the token"),
        ({"token": "short"}, "16 characters"),
        ({"checkpoint": "absent"}, "absent"),
        ({"checkpoint": "tokenizer"}, "holds a tokenizer"),
        ({"port": "taken"}, "cannot listen"),
        ({"host": "a..b", "token": "long"}, "cannot listen"),
    ],
    ids=str,
)
def test_what_the_command_refuses(tiny_run, tmp_path, options, word):
    (tmp_path / "short").write_text("secret\n")
    (tmp_path / "long").write_text("a-secret-of-sixteen")
    taken = socket.create_server(("127.0.0.1", 0))
    places = {
        "absent": tmp_path / "absent",
        "short": tmp_path / "short",
        "long": tmp_path / "long",
        "tokenizer": tiny_run / "tokenizer",
    }
    options = {name: str(places.get(value, value)) for name, value in options.items()}
    if "port" in options:
        options["port"] = taken.getsockname()[1]
    with taken, pytest.raises(InputError, match=word):
        Serve(**{"checkpoint": str(tiny_run), **options}).run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it(tiny_run, number):
    """Even with a stream under way: exit code 0, no traceback."""
    command = [sys.executable, "-m", "dar_jax", "serve", str(tiny_run), "--port", "0"]
    environment = os.environ | {"XLA_FLAGS": f"{FLAGS} {FASTER}", "JAX_COMPILATION_CACHE_DIR": CACHE}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    url = process.stdout.readline().split()[0]
    wait_for(lambda: httpx.get(f"{url}health", timeout=60).status_code == 200, 60)
    with httpx.stream("POST", f"{url}v1/images/generations", json={"prompt": "3", "stream": True}, timeout=60) as answer:
        process.send_signal(number)
        answer.read()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and not errors.strip(), errors


def test_without_the_extra(monkeypatch, tiny_run):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(InputError, match=r"\[serve\]"):
        Serve(str(tiny_run)).run()


def test_the_page_is_packaged():
    assert (Path(app_module.__file__).parent / "page.html").is_file()
    assert "serve/page.html" in (Path(__file__).parent.parent / "setup.cfg").read_text()
