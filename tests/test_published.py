"""Where weights come from: the order of the places, checksums, and downloads that are whole or leave nothing."""

import contextlib
import dataclasses
import hashlib
import http.client
import http.server
import sys
import threading
import urllib.error
import urllib.request

import pytest

from dar_jax.cli import main as cli
from dar_jax.errors import InputError
from dar_jax.weights import published
from dar_jax.weights.published import Source, resolve

BODY = bytes(range(256)) * 4000  # almost 1 MiB
SUM = hashlib.sha256(BODY).hexdigest()
HEADS = b"heads"
open_local = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        self.server.agent = self.headers["User-Agent"]
        if self.path in self.server.redirects:
            self.send_response(302)
            self.send_header("Location", self.server.redirects[self.path])
            return self.end_headers()
        if self.path not in self.server.bodies:
            return self.send_error(404)
        body, length = self.server.bodies[self.path]
        self.send_response(200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client may hang up
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("DAR_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offer(server, cache, monkeypatch):
    """offer(body, length=..., **fields): "net" is weights of one file, net.pth, that a local server sends. Returns its URL."""

    def offer(body, length=..., **fields):
        server.asked, server.redirects, server.bodies = [], {}, {"/net.pth": (body, len(body) if length is ... else length)}
        url = f"http://127.0.0.1:{server.server_port}/net.pth"
        monkeypatch.setitem(published.SOURCES, "net", ((Source("net.pth", "MIT", url=url, **fields),),))
        return url

    return offer


@pytest.fixture
def online(monkeypatch):
    """The local server is reached without encryption, which is refused otherwise."""
    monkeypatch.setattr(published, "open_https", open_local)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(name, **files) puts a Python package on the path that cannot be imported."""

    def package(name, **files):
        folder = tmp_path / "site" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("raise SystemExit('imported')")
        for file, content in files.items():
            (folder / f"{file}.pth").write_bytes(content)
        monkeypatch.syspath_prepend(tmp_path / "site")

    return package


def offline(url):
    raise urllib.error.URLError(OSError("no route\nto host"))


def complaint(*args):
    with pytest.raises(InputError) as caught:
        resolve(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


def contents(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_download_then_cache(offer, online, cache, server, capsys):
    offer(BODY, size=len(BODY), sha256=SUM)
    weights = resolve("net")
    assert (weights.files, weights.sha256) == ((cache / "net.pth",), (SUM,))
    assert weights.files[0].read_bytes() == BODY
    messages = capsys.readouterr().err
    assert "1.02 MB, licence MIT" in messages and messages.endswith("net.pth 1.02 MB/1.02 MB\n")
    assert resolve("net") == weights
    assert str(weights) == f"{cache / 'net.pth'} (SHA-256 {SUM})"
    assert server.asked == ["/net.pth"] and contents(cache) == ["net.pth"]


def test_unknown_sum_is_printed_and_kept(offer, online, cache, capsys, server):
    offer(BODY)
    resolve("net")
    assert SUM in capsys.readouterr().err
    assert (cache / "net.pth.sha256").read_text() == f"{SUM}  net.pth\n"
    assert resolve("net").sha256 == (SUM,)
    (cache / "net.pth").write_bytes(HEADS)
    message = complaint("net")
    assert "expected by net.pth.sha256" in message and SUM[:16] in message and "delete it" in message
    (cache / "net.pth").unlink()
    offer(HEADS)  # the authors changed their file
    resolve("net")
    assert resolve("net").sha256 == (hashlib.sha256(HEADS).hexdigest(),) and server.asked == ["/net.pth"]


@pytest.mark.parametrize(
    ("fields", "length", "reason"),
    [
        ({"sha256": "0" * 64}, ..., f"SHA-256 {SUM[:16]}..., expected was {'0' * 16}...: it was deleted, download it again"),
        ({}, len(BODY) + 1, f"the connection ended after {len(BODY)} of {len(BODY) + 1} bytes"),
        ({"size": 5}, ..., f"it has {len(BODY)} bytes there, expected were 5"),
        ({}, None, "does not say how many bytes"),
    ],
    ids=["wrong sum", "truncated", "other size", "no size"],
)
def test_failed_download_leaves_nothing(offer, online, cache, fields, length, reason):
    url = offer(BODY, length, **fields)
    message = complaint("net")
    assert reason in message and url in message
    assert contents(cache) == []


def test_interrupted_download_leaves_nothing(offer, cache, monkeypatch):
    class Interrupted:
        headers = {"Content-Length": str(3 * published.CHUNK)}
        reads = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, count):
            self.reads += 1
            if self.reads > 2:
                assert any(name.endswith(".tmp") for name in contents(cache))
                raise KeyboardInterrupt
            return bytes(count)

    offer(BODY)
    monkeypatch.setattr(published, "open_https", lambda url: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        resolve("net")
    assert contents(cache) == []


def test_without_network_one_line_says_what_to_put_where(offer, online, cache, server, monkeypatch):
    url = offer(BODY)
    server.bodies = {}
    assert complaint("net") == (
        f"net.pth could not be downloaded (HTTP Error 404: Not Found): put net.pth ({url}) into {cache}"
    )
    monkeypatch.setattr(published, "open_https", offline)
    assert complaint("net") == (f"net.pth could not be downloaded (no route to host): put net.pth ({url}) into {cache}")
    assert not cache.exists()


@pytest.mark.parametrize("proxy", [False, True])
def test_only_https_is_opened(offer, server, monkeypatch, proxy):
    if proxy:
        monkeypatch.setenv("http_proxy", f"https://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("no_proxy", "")
    offer(BODY)
    assert "unknown url type: http" in complaint("net")
    with pytest.raises(OSError, match="unknown url type: file"):
        published.open_https(f"file://{__file__}")
    assert server.asked == []


def test_redirects_lead_to_https_only(offer, server, monkeypatch):
    """The local server stands for one that speaks https: the encryption is left out, the rest is as it is."""
    without_tls = lambda self, request: self.do_open(http.client.HTTPConnection, request)  # noqa: E731
    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", without_tls)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    url = offer(BODY)
    https = url.replace("http://", "https://")
    server.redirects = {"/same": https, "/plain": url}
    with published.open_https(https.replace("net.pth", "same")) as response:
        assert response.read() == BODY
    assert server.asked == ["/same", "/net.pth"] and server.agent.startswith("dar_jax/")
    with pytest.raises(OSError, match="unknown url type: http"):
        published.open_https(https.replace("net.pth", "plain"))
    assert server.asked == ["/same", "/net.pth", "/plain"]


def test_order_of_places(offer, online, cache, package, server, tmp_path):
    known = {"sha256": SUM, "package": "dar_jax_carrier", "inside": "net.pth"}
    offer(BODY, **known)
    assert resolve("net").files == (cache / "net.pth",)
    (cache / "net.pth").unlink()
    package("dar_jax_carrier", net=BODY)
    assert resolve("net").files == (tmp_path / "site" / "dar_jax_carrier" / "net.pth",)
    assert "dar_jax_carrier" not in sys.modules
    (cache / "net.pth").write_bytes(BODY)
    assert resolve("net").files == (cache / "net.pth",)
    mine = tmp_path / "mine.pth"
    mine.write_bytes(HEADS)
    assert resolve("net", mine) == published.Resolved((mine,), (hashlib.sha256(HEADS).hexdigest(),))  # whatever it holds
    assert server.asked == ["/net.pth"]


def test_wrong_sums_of_files_found(offer, cache, package):
    url = offer(BODY, sha256=SUM, package="dar_jax_carrier", inside="net.pth")
    package("dar_jax_carrier", net=HEADS)
    digest = hashlib.sha256(HEADS).hexdigest()[:16]
    message = complaint("net")
    assert f"SHA-256 {digest}..., expected was {SUM[:16]}..." in message and "reinstall dar_jax_carrier" in message
    cache.mkdir()
    (cache / "net.pth").write_bytes(HEADS)
    assert complaint("net").endswith(f"expected was {SUM[:16]}...: delete it and download {url} again")


def test_files_that_belong_together(cache, package, monkeypatch, tmp_path):
    whole = Source("whole.ckpt", "BSD", package="dar_jax_whole", inside="whole.pth")
    body, heads = (
        Source("body.pth", "BSD", url="https://a.org/body.pth"),
        Source("heads.pth", "BSD", url="https://a.org/heads.pth"),
    )
    heads = dataclasses.replace(heads, package="dar_jax_heads", inside="heads.pth")
    monkeypatch.setitem(published.SOURCES, "net", ((whole,), (body, heads)))
    both = "put body.pth (https://a.org/body.pth) and heads.pth (https://a.org/heads.pth) into"
    monkeypatch.setattr(published, "open_https", offline)
    assert both in complaint("net")
    package("dar_jax_heads", heads=HEADS)
    assert "put body.pth (https://a.org/body.pth) into" in complaint("net")
    cache.mkdir()
    (cache / "body.pth").write_bytes(BODY)
    assert resolve("net").files == (cache / "body.pth", tmp_path / "site" / "dar_jax_heads" / "heads.pth")

    package("dar_jax_whole", whole=BODY)
    assert [path.name for path in resolve("net").files] == ["whole.pth"]
    (cache / "heads.pth").write_bytes(HEADS)
    assert resolve("net").files == (cache / "body.pth", cache / "heads.pth")

    assert resolve("net", cache).files == (cache / "body.pth", cache / "heads.pth")
    assert "give the folder that holds body.pth and heads.pth" in complaint("net", cache / "body.pth")
    (cache / "heads.pth").unlink()
    assert "does not hold net, which is whole.ckpt, or body.pth and heads.pth" in complaint("net", cache)
    assert "nowhere.pth does not exist" in complaint("net", tmp_path / "nowhere.pth")
    assert "lpips_vgg16, dinov2_vitb14" in complaint("nte")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DAR_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert published.cache_folder() == tmp_path / "dar_jax" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert published.cache_folder() == tmp_path / ".cache" / "dar_jax" / "weights"
    monkeypatch.setenv("DAR_JAX_CACHE", "~/mine")
    assert published.cache_folder() == tmp_path / "mine"


def test_a_user_without_a_home_folder(monkeypatch):
    for name in ("DAR_JAX_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError, as for a number without a name
    assert published.cache_folder() is None
    assert "put D-AR-L-360K.pt" in (line := complaint("dar_l")) and "a folder that DAR_JAX_CACHE names" in line
    cli.use_compilation_cache()


def test_table():
    for name, rows in published.SOURCES.items():
        assert any(all(source.url for source in row) for row in rows), f"{name} cannot be downloaded"
        for source in (source for row in rows for source in row):
            assert source.url is None or (source.url.startswith("https://") and source.url.endswith("/" + source.name))
            assert source.url or source.package
            assert source.sha256 is None or len(bytes.fromhex(source.sha256)) == 32
            if (digits := source.name.removesuffix(".pth").rpartition("-")[2]) and len(digits) == 8:
                assert source.sha256.startswith(digits)


def test_progress_on_a_terminal(offer, online, cache, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    offer(BODY * 4)
    resolve("net")
    lines = capsys.readouterr().err.split("\r\033[K")
    assert len(lines) > 3 and lines[1].startswith("[#") and "net.pth 262 kB/4.1 MB, " in lines[1] and "B/s, 0:0" in lines[1]
    assert lines[-1].startswith("net.pth 4.1 MB/4.1 MB\n")
