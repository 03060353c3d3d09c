"""Names on the Hugging Face Hub wherever something is read, and folders exported for it.

Most with a stand-in for the client, one with the real client against a server on this machine.
"""

import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import stub_hub
from PIL import Image
from safetensors.numpy import load_file, save_file

from dar_jax.cli.main import main
from dar_jax.config import DataConfig
from dar_jax.data.sources import open_source
from dar_jax.errors import InputError
from dar_jax.evaluation.fid import _open
from dar_jax.inference.info import describe
from dar_jax.inference.model import load
from dar_jax.inference.trained import load_tokenizer
from dar_jax.release.checkpoints import export_folder, import_checkpoint, open_start, open_weights, read_checkpoint
from dar_jax.training import checkpoint
from dar_jax.weights import hub, published

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A transformer's folder with its tokenizer."""
    folder = tmp_path_factory.mktemp("run") / "run"
    import_checkpoint(GOLDEN / "ar_checkpoint.pt", folder, tokenizer=GOLDEN / "tokenizer_checkpoint.pt")
    return folder


@pytest.fixture
def stub(tmp_path, monkeypatch):
    stub = stub_hub.Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub.module)
    hub._snapshot.cache_clear()
    yield stub
    hub._snapshot.cache_clear()


def same_weights(one, other):
    jax.tree.map(
        np.testing.assert_array_equal, *(checkpoint.load_part(checkpoint.inspect(path), "ema") for path in (one, other))
    )


@pytest.mark.parametrize("path", ["runs/a", Path("hf:") / "a", "gs://bucket/run", "", b"hf://a/b"])
def test_other_paths_stay_as_they_are(stub, path):
    assert hub.local(path) is path and not stub.calls


@pytest.mark.parametrize(
    "name, asked",
    [
        ("hf://a/b", ("model", "a/b", None, None)),
        ("hf://a/b/", ("model", "a/b", None, None)),
        ("hf://a-1/b.c@v1", ("model", "a-1/b.c", "v1", None)),
        ("hf://a/b/x y/model.pt", ("model", "a/b", None, ["x y/model.pt", "x y/model.pt/*"])),
        ("hf://datasets/a/b/train@refs/pr/3", ("dataset", "a/b", "refs/pr/3", ["train", "train/*"])),
    ],
)
def test_names(stub, name, asked):
    stub.fails = RuntimeError("seen")
    with pytest.raises(InputError, match="seen"):
        hub.local(name)
    assert stub.calls == [asked]


@pytest.mark.parametrize(
    "name",
    ["", "a", "a/", "/b", "a//b", "a/b//c", "../b", "a/..", "a/b/..", "a/b/../../c", "a/b/.", "a/b/...", ".a/b", "-a/b"]
    + [
        "a/b@",
        "a/b@..",
        "a/b@/x",
        "a/b@x/../y",
        "a/b@x@y",
        "a/b/c@d/@e",
        "a/b/*",
        "a/b/[ab]",
        "a/b/c?",
        "a/b\\c",
        "a/b/c\\..\\d",
    ]
    + ["a/b\n", "a/b/c\0", "a/b@x\n", "a b/c", "ä/b", "user:password@host/a/b", "a" * 99 + "/b"],
)
def test_hostile_names_are_refused(stub, name):
    with pytest.raises(InputError, match="is no name on the Hub: hf://OWNER/NAME") as raised:
        hub.local(f"hf://{name}")
    assert len(str(raised.value).splitlines()) == 1 and not stub.calls


@pytest.mark.parametrize(
    "error, line",
    [
        (stub_hub.RevisionNotFoundError("x\ny"), "a/b on the Hub has no revision r"),
        (
            stub_hub.GatedRepoError("x\ny"),
            "a/b on the Hub is gated: accept its terms at https://huggingface.co/a/b, then hf auth",
        ),
        (
            stub_hub.RepositoryNotFoundError("x\ny"),
            "the Hub has no model a/b, or it is private; for a private one: hf auth login",
        ),
        (stub_hub.LocalEntryNotFoundError("no\nnet"), "a/b at r is not in the cache of huggingface-hub, and the Hub cannot be"),
        (OSError("reset\nby peer"), "a/b at r cannot be read from the Hub: OSError: reset by peer"),
    ],
)
def test_one_line_says_what_is_wrong(stub, error, line):
    stub.fails = error
    with pytest.raises(InputError, match=re.escape(line)) as raised:
        hub.local("hf://a/b@r")
    assert len(str(raised.value).splitlines()) == 1
    stub.fails = None
    stub.folder("a/b")
    with pytest.raises(InputError, match="a/b on the Hub holds no x/y at v1$"):
        hub.local("hf://a/b/x/y@v1")


def test_without_the_package_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["info", "hf://a/b"]) == 2
    line = 'dar-jax: hf://a/b is on the Hugging Face Hub; that needs: pip install ".[hub]"\n'
    assert capsys.readouterr().err == line


def test_whatever_is_read_may_be_on_the_hub(stub, run, tmp_path):
    folder = stub.folder("me/model")
    shutil.copytree(run, folder / "run")
    shutil.copy(GOLDEN / "tokenizer_checkpoint.pt", folder)
    np.savez(folder / "images.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    data = stub.folder("me/data", "dataset") / "train" / "cats"
    data.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(data / "1.png")

    same_weights("hf://me/model/run", run)
    assert checkpoint.inspect("hf://me/model/run").tokenizer.is_tokenizer
    assert load_tokenizer("hf://me/model/run@v1").networks.tokenizer.config.codebook_size
    assert read_checkpoint(hub.local("hf://me/model/tokenizer_checkpoint.pt")).step == 1234
    assert open_weights("hf://me/model/tokenizer_checkpoint.pt").step == 1234
    start = open_start("hf://me/model/run", checkpoint.inspect(run).config)
    assert start.name == "hf://me/model/run, step 360000"
    import_checkpoint(GOLDEN / "ar_checkpoint.pt", tmp_path / "again", tokenizer="hf://me/model/run/tokenizer")
    same_weights(tmp_path / "again" / "tokenizer", run / "tokenizer")
    source = open_source(DataConfig(path="hf://datasets/me/data", image_size=8))
    assert source.class_names == ("cats",) and source[0]["image"].shape == (8, 8, 3)
    assert _open("hf://me/model/images.npz", None)[1].count == 2
    assert published.resolve("fid_inception", "hf://me/model/images.npz").files[0].is_file()
    before = len(stub.calls)
    checkpoint.inspect("hf://me/model/run")
    assert len(stub.calls) == before  # a revision stays the same within a process


@pytest.mark.parametrize(
    "command",
    [
        ["train", "experiments/digits_tokenizer.py", "--workdir", "hf://me/run"],
        ["tokenize", "RUN", "--data.source", "digits", "--data.channels", "3", "--out", "hf://me/codes"],
        ["generate", "RUN", "--out", "hf://me/samples.npz"],
        ["import", str(GOLDEN / "tokenizer_checkpoint.pt"), "--workdir", "hf://me/run"],
        ["export", "RUN", "hf://me/model", "--format", "safetensors"],
        ["export", "RUN", "hf://me/model.pt"],
    ],
)
def test_nothing_is_written_to_the_hub(run, stub, capsys, monkeypatch, command):
    monkeypatch.chdir(GOLDEN.parent.parent)
    assert main([str(run) if word == "RUN" else word for word in command]) == 2
    assert re.search(r"^dar-jax: cannot write to hf://me\S*: from the Hub, files are only read", capsys.readouterr().err, re.M)


def test_an_exported_folder_is_the_same_checkpoint(run, stub, tmp_path, capsys):
    logs = run / "logs"
    logs.mkdir(exist_ok=True)
    records = [{"step": 1, "loss": 9.0}, {"step": 9, "loss": 2.5, "eval_fid": 71.25}, {"step": 360_001, "loss": 1.0}]
    (logs / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "report.json").write_text('{"reconstruction_psnr": 18.9, "seconds": 3, "fast": true}')
    folder = stub.folder("me/model")
    assert main(["export", str(run), str(folder), "--format", "safetensors", "--licence", "cc-by-4.0"]) == 0
    assert f"hf upload OWNER/NAME {folder}" in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == ["README.md", "dar_jax.json", "files.json", "model.safetensors", "tokenizer"]

    here, there = load(run), load("hf://me/model")
    jax.tree.map(np.testing.assert_array_equal, here.trained.params, there.trained.params)
    assert there.class_names == here.class_names
    assert dataclasses.replace(there.trained.networks.transformer, parent=None) == here.trained.networks.transformer
    assert open_start("hf://me/model", here.trained.info.config).name == "hf://me/model, step 360000"
    assert "holds ema (resumed" in describe("hf://me/model") and "164,864 parameters" in describe(folder)
    with pytest.raises(InputError, match="holds no params, only ema"):
        load("hf://me/model", weights="params")
    export_folder("hf://me/model", tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    card = (folder / "README.md").read_text()
    for part in (
        "---\nlicense: cc-by-4.0\nlibrary_name: dar_jax\n",
        "| in all | 164,864 |",
        "| tokenizer: in all | 574,016 |",
        "folder, train: 64 x 64 pixels, 3 channels; 10 classes",
        'dar_jax.load("hf://OWNER/NAME")',
        "| loss | 2.5 | 9 |",
        "| eval\\_fid | 71.25 | 9 |",
        "| reconstruction\\_psnr | 18.9 | report.json |",
        "The weights are under cc-by-4.0",
        "    optimizer.learning-rate = 0.0004",
    ):
        assert part in card, part
    assert "seconds" not in card and "license" not in (tmp_path / "again/README.md").read_text()
    with pytest.raises(InputError, match="is not empty; choose another folder"):
        export_folder(run, folder)
    with pytest.raises(InputError, match="no licence of the Hub"):
        export_folder(run, tmp_path / "third", "my own\nlicence")
    assert not (tmp_path / "third").exists()


def test_a_card_shows_hostile_text_as_text_and_no_paths(tmp_path):
    info = checkpoint.inspect(GOLDEN / "old_checkpoint")
    weights = jax.device_get(checkpoint.load_part(info, "ema"))
    names = ("</pre><script>\n# heading\x1b[2J", *info.class_names[1:])
    checkpoint.save_for_inference(tmp_path / "run", info.config, weights, 1, names, hooks=("loss", "condition"))
    export_folder(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "    </pre><script> # heading\\x1b[2J, " in card and "\x1b" not in card
    assert "The run replaced its condition: loading needs its experiment file" in card
    assert "Its tokenizer is not here" in card
    settings = json.loads((tmp_path / "out/dar_jax.json").read_text())["config"]
    assert settings["tokenizer"] is None and settings["data"]["path"] is None
    with pytest.raises(InputError, match="lacks its tokenizer"):
        load(tmp_path / "out")


@pytest.mark.parametrize("what", ["bytes", "cut", "gone", "names", "step", "description", "newer", "json", "files"])
def test_damaged_exports_are_refused(run, tmp_path, what):
    folder = tmp_path / "out"
    export_folder(run / "tokenizer", folder)
    weights, description = folder / "model.safetensors", json.loads((folder / "dar_jax.json").read_text())
    if what == "bytes":
        weights.write_bytes(weights.read_bytes()[:-4] + b"\1\2\3\4")
    elif what == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif what == "gone":
        weights.unlink()
    elif what == "names":  # with the right checksum
        save_file({f"{name}/x": array for name, array in load_file(weights).items()}, weights)
        entry = [weights.stat().st_size, checkpoint.exported.checksum_of_file(weights)]
        (folder / "files.json").write_text(json.dumps({"ema": {"model.safetensors": entry}}))
    elif what == "files":
        (folder / "files.json").write_text("{}")
    elif what == "json":
        (folder / "dar_jax.json").write_text('{"format": ')
    else:
        description |= {"step": {"step": -1}, "description": {"class_names": ["a"]}, "newer": {"format": 9}}[what]
        if what != "description":
            description.pop("crc32")
            description["crc32"] = checkpoint.checksum_of(description)
        (folder / "dar_jax.json").write_text(json.dumps(description))
    with pytest.raises(InputError, match="damaged|settings in .* are not those of its weights|newer dar_jax") as raised:
        load_tokenizer(folder)
    assert len(str(raised.value).splitlines()) == 1


class Server(http.server.BaseHTTPRequestHandler):
    """Two of the Hub's services, the list of a repository's files and the files, for the one repository me/model at COMMIT."""

    folder: Path
    COMMIT = "0123456789" * 4

    def do_GET(self):  # noqa: N802 (the name that http.server calls)
        path = self.path.partition("?")[0]
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if re.fullmatch(rf"/api/models/me/model(/revision/(main|{self.COMMIT}))?", path):
            siblings = [{"rfilename": name} for name in files]
            self.answer(json.dumps({"id": "me/model", "sha": self.COMMIT, "siblings": siblings}).encode())
        elif path == f"/api/models/me/model/tree/{self.COMMIT}":
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file)}
                for name, file in files.items()
            ]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/api/models/me/model/revision/"):
            self.answer(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
        elif (name := path.removeprefix(f"/me/model/resolve/{self.COMMIT}/")) in files:
            self.answer(files[name].read_bytes(), 200, {"ETag": f'"{_digest(files[name])}"', "X-Repo-Commit": self.COMMIT})
        else:
            self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815

    def answer(self, body: bytes, code: int = 200, headers: dict | None = None):
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def _digest(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


ASK = """
import sys
from dar_jax.weights import hub
for name in sys.argv[1:]:
    try:
        print(hub.local(name))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_the_real_client(run, tmp_path):
    pytest.importorskip("huggingface_hub")
    served = type("Served", (Server,), {"folder": tmp_path / "served"})
    export_folder(run, served.folder / "small")
    (served.folder / "large.bin").write_bytes(b"not asked for")
    names = ["hf://me/model/small", "hf://me/model/small@v9", "hf://me/other", "hf://me/model/nothing"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}
        env |= {"PYTHONPATH": str(GOLDEN.parent.parent), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
        env.pop("HF_HUB_OFFLINE", None)

        def ask(*names: str, **more: str) -> list[str]:
            command = [sys.executable, "-c", ASK, *names]
            return subprocess.run(command, env=env | more, capture_output=True, text=True, check=True).stdout.splitlines()

        place, no_revision, no_repository, no_file = ask(*names)
        server.shutdown()
    same_weights(place, run)
    assert Path(place, "model.safetensors").is_symlink() and not Path(place).with_name("large.bin").exists()
    assert no_revision == "InputError: me/model on the Hub has no revision v9"
    assert no_repository.startswith("InputError: the Hub has no model me/other, or it is private")
    assert no_file == "InputError: me/model on the Hub holds no nothing"
    offline = ask("hf://me/model/small", "hf://me/model/large.bin", "hf://me/other", HF_HUB_OFFLINE="1")
    assert offline[0] == place
    assert all(line.startswith("InputError: me/") and "cannot be re" in line or "holds no" in line for line in offline[1:])
