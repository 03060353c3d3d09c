"""Every command on a tokenizer and a transformer of the digits that were trained for a handful of steps, and every error."""

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from many_hosts import FASTER, FLAGS
from PIL import Image

from dar_jax import quickstart
from dar_jax.cli import main as cli
from dar_jax.cli.use import Info
from dar_jax.data import codes
from dar_jax.training import checkpoint

ROOT = Path(__file__).parent.parent
TOKENIZER = str(ROOT / "experiments" / "digits_tokenizer.py")
TRANSFORMER = str(ROOT / "experiments" / "digits_ar.py")
CODES = quickstart.TOKENIZER.model.codebook_size
TINY_TRAINING = ["--train.batch-size", "8", "--train.checkpoint-every", "2", "--train.log-every", "1"]
TINY_TRAINING += ["--optimizer.learning-rate", "3e-2", "--optimizer.warmup-steps", "0", "--optimizer.ema-decay", "0.5"]
TINY_TOKENIZER = ["--model.encoder-width", "16", "--model.encoder-layers", "1", "--model.decoder-width", "16"]
TINY_TOKENIZER += ["--model.velocity.width", "16", "--model.velocity.layers", "1", *TINY_TRAINING]
TINY_TRANSFORMER = ["--model.width", "16", "--model.heads", "2", "--model.layers", "1", *TINY_TRAINING]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with `tokenizer` and `ar`, the folders of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer, ar = str(folder / "tokenizer"), str(folder / "ar")
    steps = ["--train.steps", "2", "--train.sample-every", "2"]
    assert cli.main(["train", TOKENIZER, "--workdir", tokenizer, *TINY_TOKENIZER, *steps]) == 0
    assert cli.main(["train", TRANSFORMER, "--workdir", ar, "--tokenizer", tokenizer, *TINY_TRANSFORMER, *steps]) == 0
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images of other sizes and kinds than the tokenizer's, one of them unreadable."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (folder / "class").mkdir()
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "class" / "a.jpg")
    Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(folder / "class" / "b.png")
    (folder / "class" / "c.png").write_text("no image")
    return folder


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_train_took_the_overrides(runs):
    info = checkpoint.inspect(runs / "tokenizer")
    assert info.step == 2 and info.config.optimizer.learning_rate == 3e-2 and info.config.model.velocity.width == 16
    assert info.config.model.codebook_size == CODES  # what was not overridden is the experiment's
    assert checkpoint.inspect(runs / "ar").config.tokenizer == str(runs / "tokenizer")
    assert checkpoint.inspect(runs / "ar" / "tokenizer").step == 2
    assert list((runs / "ar" / "logs").glob("events*"))


def test_train_goes_on_only_with_resume(runs, capsys):
    train = ["train", TOKENIZER, "--workdir", str(runs / "tokenizer"), *TINY_TOKENIZER, "--train.steps", "2"]
    before = files(runs / "tokenizer" / "checkpoints")
    assert cli.main(train) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*train, "--resume"]) == 0
    assert "2 steps from step 2" in capsys.readouterr().out
    assert files(runs / "tokenizer" / "checkpoints") == before


def test_sample(runs, tmp_path, capsys):
    sample = ["sample", str(runs / "ar"), "--labels", "3,7", "--seeds", "11,12", "--out", str(tmp_path / "a")]
    assert cli.main(sample) == 0
    assert files(tmp_path / "a") == ["digits_ar_label3_seed11.png", "digits_ar_label7_seed12.png", "grid.png"]
    assert str(tmp_path / "a" / "grid.png") in capsys.readouterr().out
    image = np.asarray(Image.open(tmp_path / "a" / "digits_ar_label3_seed11.png"))
    assert image.shape == (8, 8)

    options = "--previews --animate --guidance 2 --temperature 0.9 --top-k 40 --top-p 0.9 --solver euler"
    options += " --num-denoising-steps 8 --prefix-tokens 1,2,3 --prefix-length 2 --batch-size 1"
    sample[-1] = str(tmp_path / "b")
    assert cli.main([*sample, *options.split()]) == 0
    stems = ["digits_ar_label3_seed11", "digits_ar_label7_seed12"]
    groups = [f"{stem}{end}.png" for stem in stems for end in ("", "_group1", "_group2", "_group3", "_group4")]
    assert files(tmp_path / "b") == sorted([*groups, "denoising.webp", "grid.png", "groups.png"])
    assert (np.asarray(Image.open(tmp_path / "b" / f"{stems[0]}.png")) != image).any()
    with Image.open(tmp_path / "b" / "denoising.webp") as animation:
        assert animation.n_frames == 4
    many = [*sample[:3], "3", "--seeds", ",".join(map(str, range(2000))), "--animate", "--out", str(tmp_path / "c")]
    assert cli.main(many) == 2 and "2000 samples are too many for one animation" in capsys.readouterr().err


def test_sample_from_images(runs, images, tmp_path):
    sample = ["sample", str(runs / "ar"), "--labels", "3", "--seeds", "1,2", "--weights", "params", "--resolution", "16"]
    options = ["--prefix-image", str(images / "class" / "a.jpg"), "--prefix-length", "8"]
    options += ["--start-image", str(images / "class" / "b.png"), "--start-step", "2", "--groups", "3"]
    assert cli.main([*sample, *options, "--out", str(tmp_path)]) == 0
    assert np.asarray(Image.open(tmp_path / "digits_ar_label3_seed2.png")).shape == (16, 16)


@pytest.mark.parametrize("run", ["ar", "tokenizer"])
def test_reconstruct(runs, images, tmp_path, capsys, caplog, run):
    assert cli.main(["reconstruct", str(runs / run), "--images", str(images), "--out", str(tmp_path)]) == 0
    assert files(tmp_path) == ["grid.png", "images/class/a.jpg.png", "images/class/b.png", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["images"], report["unreadable"]) == (2, 1)
    original = np.asarray(Image.open(images / "class" / "b.png")).astype(float)
    decoded = np.asarray(Image.open(tmp_path / "images" / "class" / "b.png"))
    expected = 10 * np.log10(255**2 / np.mean((original - decoded) ** 2))
    assert report["psnr_of_each"]["class/b.png"] == pytest.approx(expected, abs=1e-3)
    assert f"PSNR {report['psnr']:.2f} dB over 2 images (1 unreadable)" in capsys.readouterr().out
    assert "c.png" in caplog.text


def test_tokenize_and_train_on_the_codes(runs, tmp_path):
    out = str(tmp_path / "codes")
    assert cli.main(["tokenize", str(runs / "tokenizer"), "--out", out, "--data.split", "test", "--shard-size", "200"]) == 0
    assert len(codes.open_codes(out)) == 297
    train = ["train", TRANSFORMER, "--workdir", str(tmp_path / "run"), "--tokenizer", str(runs / "tokenizer")]
    train += [
        *TINY_TRANSFORMER,
        "--train.steps",
        "1",
        "--train.sample-every",
        "0",
        "--data.source",
        "codes",
        "--data.path",
        out,
    ]
    assert cli.main(train) == 0
    assert checkpoint.latest_step(tmp_path / "run") == 1


def test_info(runs, capsys):
    assert cli.main(["info", str(runs / "ar")]) == 0
    out = capsys.readouterr().out
    params = checkpoint.load(runs / "ar").params
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters" in out
    for line in ("step 2 of 2", "10 classes: 0, 1", "model.width = 16", "data.source = digits", "tokenizer 'digits_tokenizer'"):
        assert line in out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert f"Example: dar-jax {command} " in out and "--" in out
    assert all(f"--{name}" in out for name in {"sample": ["labels", "prefix-image"]}.get(command, []))


def test_overview_names_every_command(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


def test_help_of_an_experiment_and_of_a_tokenizer_lists_its_settings(runs, capsys):
    for arguments, lines in (
        (["train", TRANSFORMER], ("--optimizer.learning-rate FLOAT", "--sampling.guidance FLOAT FLOAT", "--tokenizer")),
        (["tokenize", str(runs / "tokenizer")], ("(default: digits)", "--data.crop {random,center,ten_crop,none}")),
    ):
        with pytest.raises(SystemExit):
            cli.main([*arguments, "--help"])
        out = capsys.readouterr().out
        assert all(line in out for line in lines)


def test_help_does_not_wait_for_jax():
    code = (
        "import sys; from dar_jax.cli.main import parse; parse(['sample', 'a', '--labels', '1', '--seeds', '1', '--out', 'b'])"
    )
    assert subprocess.run([sys.executable, "-c", f"{code}; sys.exit('jax' in sys.modules)"], cwd=ROOT).returncode == 0


SAMPLE = ["sample", "{runs}/ar", "--out", "{out}", "--labels", "3", "--seeds", "1"]
RECONSTRUCT = ["reconstruct", "{runs}/ar", "--out", "{out}", "--images"]
TRAIN = ["train", TOKENIZER, "--workdir", "{out}", *TINY_TOKENIZER]
TRAIN_AR = ["train", TRANSFORMER, "--workdir", "{out}", *TINY_TRANSFORMER]
ERRORS = {
    # name: (what the line says, arguments)
    "unknown command": ("did you mean sample?", ["sampel"]),
    "unknown override": ("did you mean --train.steps", [*TRAIN, "--train.step", "3"]),
    "unknown option": ("there is no option --sead; did you mean --seeds?", [*SAMPLE, "--sead", "3"]),
    "wrong type": ("--train.steps takes INT, not 'many'", [*TRAIN, "--train.steps", "many"]),
    "wrong type in a list": ("--seeds takes N,N, not '1,x'", [*SAMPLE[:-1], "1,x"]),
    "wrong type of a fork's own": (
        "--fork.max-characters takes INT, not '1.5'",
        ["train", str(ROOT / "tests/forks/text.py"), "--workdir", "{out}", "--fork.max-characters", "1.5"],
    ),
    "wrong choice": ("--solver takes {adams2,euler}, not 'exact'", [*SAMPLE, "--solver", "exact"]),
    "too few values": ("--sampling.guidance takes FLOAT FLOAT, not '1'", [*TRAIN_AR, "--sampling.guidance", "1"]),
    "value of a flag": ("takes no further argument 'yes'", [*SAMPLE, "--previews", "yes"]),
    "value of a flag after =": ("--previews takes no value, not 'yes'", [*SAMPLE, "--previews=yes"]),
    "further argument": ("takes no further argument 'b'", ["info", "{runs}/ar", "b"]),
    "no checkpoint": ("Missing from dar-jax info: CHECKPOINT (see", ["info"]),
    "no experiment": ("Missing from dar-jax train: EXPERIMENT, which comes first (see", ["train", "--workdir", "{out}"]),
    "missing argument": ("Missing from dar-jax sample: --out STR (see", ["sample", "{runs}/ar", *SAMPLE[-4:]]),
    "missing value": ("--labels lacks its value, A,B", ["sample", "{runs}/ar", "--labels"]),
    "missing experiment": ("there is no experiment file nowhere.py", ["train", "nowhere.py", "--workdir", "{out}"]),
    "experiment that fails": (
        "fails.py, line 2, cannot be run: ZeroDivisionError",
        ["train", "{tmp}/fails.py", "--workdir", "{out}"],
    ),
    "missing checkpoint": ("{tmp}/nowhere does not exist", ["sample", "{tmp}/nowhere", *SAMPLE[2:]]),
    "folder without a checkpoint": ("holds no checkpoint", ["info", "{tmp}/empty"]),
    "missing data": ("{tmp}/nowhere does not exist", [*TRAIN, "--data.source", "folder", "--data.path", "{tmp}/nowhere"]),
    "empty folder": ("{tmp}/empty holds no images", [*TRAIN, "--data.source", "folder", "--data.path", "{tmp}/empty"]),
    "empty folder to reconstruct": (
        "holds no images",
        ["reconstruct", "{runs}/ar", "--images", "{tmp}/empty", "--out", "{out}"],
    ),
    "missing folder": ("does not exist", ["reconstruct", "{runs}/ar", "--images", "{tmp}/nowhere", "--out", "{out}"]),
    "image size below the patch": (
        "multiple of encoder_patch_size",
        [*TRAIN, "--model.image-size", "2", "--data.image-size", "2"],
    ),
    "image below the patch": (
        "thin.png is 8 x 3 pixels, smaller than the tokenizer's patches of 4",
        [*RECONSTRUCT, "{tmp}/thin"],
    ),
    "prefix image below the patch": (
        "8 x 3 pixels",
        [*SAMPLE, "--prefix-image", "{tmp}/thin/thin.png", "--prefix-length", "3"],
    ),
    "missing prefix image": ("there is no image", [*SAMPLE, "--prefix-image", "{tmp}/no.png", "--prefix-length", "3"]),
    "prefix image of 60,000 pixels": (
        "large.png cannot be read: ",
        [*SAMPLE, "--prefix-image", "{tmp}/large/large.png", "--prefix-length", "3"],
    ),
    "images at both levels": ("holds images (1) and folders with images (class)", [*RECONSTRUCT, "{tmp}/both"]),
    "damaged prefix image": ("cannot be read", [*SAMPLE, "--prefix-image", "{tmp}/fails.py", "--prefix-length", "3"]),
    "label out of range": ("label 10 is out of range, classes are 0 .. 9", [*SAMPLE[:-4], "--labels", "10", "--seeds", "1"]),
    "no such class": ("no class 'three'", [*SAMPLE[:-4], "--labels", "three", "--seeds", "1"]),
    "labels and seeds": ("do not pair up", [*SAMPLE[:-4], "--labels", "1,2", "--seeds", "1,2,3"]),
    "prefix longer than T": (
        "prefix length is 17, it should be 0 .. 16",
        [*SAMPLE, "--prefix-image", "{images}/class/b.png", "--prefix-length", "17"],
    ),
    "guidance of three": ("guidance is one scale or two", [*SAMPLE, "--guidance", "1,2,3"]),
    "too many groups": ("num_groups is 9", [*SAMPLE, "--groups", "9"]),
    "mesh": ("does not fit", [*SAMPLE, "--mesh", "3,1,1"]),
    "decoder mesh of all devices": ("some of the devices", [*SAMPLE, "--decoder-mesh", "8,1,1"]),
    "mesh beside a decoder mesh": ("does not fit the 6 devices", [*SAMPLE, "--mesh", "8,1,1", "--decoder-mesh", "2,1,1"]),
    "decoder mesh of two sizes": ("a mesh has three sizes", [*SAMPLE, "--decoder-mesh", "1,1"]),
    "tokenizer given to sample": ("holds a tokenizer", ["sample", "{runs}/tokenizer", *SAMPLE[2:]]),
    "transformer as tokenizer": ("not of a tokenizer", [*TRAIN_AR, "--tokenizer", "{runs}/ar"]),
    "no tokenizer": ("--tokenizer", TRAIN_AR),
    "tokenizer that does not fit": ("vocab_size", [*TRAIN_AR, "--tokenizer", "{runs}/tokenizer", "--model.vocab-size", "32"]),
    "truncated checkpoint": ("{tmp}/truncated/checkpoints/2 is damaged", ["sample", "{tmp}/truncated", *SAMPLE[2:]]),
    "truncated metadata": ("is damaged", ["info", "{tmp}/headless"]),
    "unwritable folder": ("cannot write to {tmp}/fails.py/out", [*SAMPLE, "--out", "{tmp}/fails.py/out"]),
    "unwritable folder of a run": (
        "cannot write to {tmp}/fails.py/run",
        ["train", TOKENIZER, *TINY_TOKENIZER, "--workdir", "{tmp}/fails.py/run"],
    ),
    "unwritable folder of a quickstart": ("cannot write to", ["quickstart", "--workdir", "{tmp}/fails.py/run"]),
    "quickstart in a used folder": ("holds no quickstart", ["quickstart", "--workdir", "{images}"]),
    "quickstart in another run's folder": ("other settings", ["quickstart", "--workdir", "{tmp}/truncated"]),
    "data that the tokenizer cannot take": (
        "data.image_size is 30, but the tokenizer's is 8",
        ["evaluate-ar", "{runs}/ar", "--out", "{out}", "--data.source", "digits", "--data.image-size", "30"],
    ),
    "coloured data": (
        "data.channels is 3, but the tokenizer's is 1",
        ["evaluate-tokenizer", "{runs}/ar", "--data.channels", "3"],
    ),
    "codes where images are needed": (
        "data.source is codes",
        ["evaluate-tokenizer", "{runs}/ar", "--data.source", "codes", "--data.path", "{tmp}/empty"],
    ),
    "a split for training": (
        "data.held_out_split is for training",
        ["evaluate-tokenizer", "{runs}/ar", "--data.held-out-split", "nosuch"],
    ),
    "training with a start step": ("sampling.start_step is 1", [*TRAIN_AR, "--sampling.start-step", "1"]),
    "training with too many groups": (
        "num_groups is 9",
        [*TRAIN_AR, "--tokenizer", "{runs}/tokenizer", "--sampling.num-groups", "9"],
    ),
    "edit with guesses": (
        "finds tokens beyond a group",
        [
            "edit",
            "{runs}/ar",
            "--experiment",
            str(ROOT / "experiments/variants/speculative.py"),
            "--image",
            "{images}/class/b.png",
        ]
        + ["--enlarge", "4", "--seeds", "1", "--out", "{out}"],
    ),
    "tokenizing random crops": ("crop is random", ["tokenize", "{runs}/tokenizer", "--data.crop", "random", "--out", "{out}"]),
}


@pytest.fixture(scope="module")
def broken(runs, images, tmp_path_factory):
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "fails.py").write_text("\n1 / 0\n")
    (folder / "empty").mkdir()
    (folder / "thin").mkdir()
    Image.new("L", (8, 3)).save(folder / "thin" / "thin.png")
    (folder / "large").mkdir()
    content = (folder / "thin" / "thin.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    (folder / "large" / "large.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    (folder / "both" / "class").mkdir(parents=True)
    for place in ("a.png", "class/b.png"):
        Image.new("L", (8, 8)).save(folder / "both" / place)
    for name in ("truncated", "headless"):
        shutil.copytree(runs / "ar", folder / name)
    (data,) = (folder / "truncated" / "checkpoints" / "2" / "ema" / "d").iterdir()
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    for metadata in (folder / "headless" / "checkpoints" / "2").rglob("_*METADATA"):
        metadata.write_text(metadata.read_text()[:20])
    return folder


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_and_leaves_nothing_behind(name, runs, images, broken, tmp_path, capfd, monkeypatch):
    message, arguments = ERRORS[name]
    places = {"{runs}": runs, "{images}": images, "{tmp}": broken, "{out}": tmp_path / "out"}

    def fill(text):
        for place, path in places.items():
            text = text.replace(place, str(path))
        return text

    monkeypatch.chdir(tmp_path)
    before = files(broken)
    assert cli.main([fill(argument) for argument in arguments]) == 2
    err = capfd.readouterr().err
    assert err.startswith("dar-jax: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert fill(message) in err
    assert not list(tmp_path.iterdir()) and files(broken) == before


OUT_OF_RANGE = {
    f"train {TRANSFORMER} --workdir out": [
        "model.heads 0",
        "train.keep-every 0",
        "train.steps 5000000000",
        "train.seed 9223372036854775808",
        "train.evaluate-every -1",
        "train.profile 0 3",
        "train.peak-flops 0",
        "optimizer.learning-rate -1",
        "optimizer.learning-rate inf",
        "optimizer.learning-rate nan",
        "optimizer.beta2 1.5",
        "optimizer.clip-norm 0",
        "model.mlp-dropout 2",
        "data.crop-fraction 0.9 1.5",
        "data.workers -1",
        "mesh.data 0",
        "sampling.guidance 1 nan",
    ],
    f"train {TOKENIZER} --workdir out": ["model.encoder-patch-size 0", "model.encoder-layers 0", "model.num-groups 0"],
    f"plan {TRANSFORMER} --topology v5e:2x2": ["batch-size 0", "search -1", "peak 0", "memory nan", "train.steps 0"],
    "sample nowhere --labels 1 --seeds 1 --out out": [
        "batch-size 0",
        "seeds 4294967296",
        "guidance inf",
        "guidance 1,nan",
        "temperature 1e-40",
        "temperature -1",
        "top-k 5000000000",
        "top-p 1.1",
        "num-denoising-steps 0",
        "cfg-interval -2",
        "groups 0",
        "start-step 0",
        "prefix-length -1",
        "prefix-tokens 1,-1",
        "resolution 1000000000",
        "mesh 0,1,1",
    ],
    "generate nowhere --out out": [
        "num-processes 0",
        "process-id -1",
        "start-timeout 0",
        "num 4000000000",
        "num 0",
        "seed -1",
        "batch-size 1000000000",
    ],
    "reconstruct nowhere --images nowhere --out out": ["seed -1", "seed 4294967296", "num-denoising-steps 0"],
    "evaluate nowhere --reference nowhere": ["num-images 0", "batch-size -1"],
    "sweep nowhere --reference nowhere --out out": [
        "temperature 1,nan",
        "top-k -1",
        "top-p 2",
        "groups 0,1",
        "num 0",
        "num-denoising-steps 2,0",
    ],
    "import nowhere --workdir out": ["heads 0"],
}


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in OUT_OF_RANGE.items() for option in options]
)
def test_out_of_range(command, option, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), *f"--{option}".split()]) == 2
    err = capfd.readouterr().err
    name = option.split()[0].replace("-", "_")
    assert err.startswith(f"dar-jax: {name} is ") and "should be between" in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_checkpoint_of_another_experiment(runs, tmp_path, capfd):
    shutil.copytree(runs / "tokenizer", tmp_path / "run")
    before = files(tmp_path)
    train = ["train", TOKENIZER, "--workdir", str(tmp_path / "run"), "--resume", *TINY_TOKENIZER, "--model.codebook-size", "16"]
    assert cli.main(train) == 2
    err = capfd.readouterr().err
    assert "is of another experiment" in err and f"model.codebook_size {CODES} there, 16 here" in err and err.count("\n") == 1
    assert files(tmp_path) == before


def start(*arguments):
    """The command in a process of its own, on one device."""
    command = [sys.executable, "-m", "dar_jax", *arguments]
    cache = jax.config.jax_compilation_cache_dir
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    environment |= {"XLA_FLAGS": f"{FLAGS} {FASTER}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def test_exit_codes_of_the_process(tmp_path):
    """The same from the outside: one line on stderr, no traceback, exit code 2."""
    with start("info", str(tmp_path / "nowhere")) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"dar-jax: {tmp_path / 'nowhere'} does not exist") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["sample", "--help"], ["info", "{runs}/ar"]])
def test_a_closed_pipe_ends_a_command_without_a_word(runs, arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "import sys; from dar_jax.cli.main import main; sys.exit(main())"]
    command += [argument.replace("{runs}", str(runs)) for argument in arguments]
    process = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")
PATHS = ValueError(f'writing "x/zarr.json" in "/a/b": {FULL.strerror}')


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        ValueError(f"writing '/a/b': {FULL}"),
        ExceptionGroup("many", [KeyError(), FULL]),
        ValueError(f'"x/zarr.json" at "/a/b": {FULL.strerror}'),
    ],
)
def test_a_full_disk_is_one_line(monkeypatch, capfd, error):
    def run(self):
        raise RuntimeError("it failed") from error

    monkeypatch.setattr(Info, "run", run)
    assert cli.main(["info", "x"]) == 2
    assert capfd.readouterr().err.startswith("dar-jax: cannot write /a/b: No space left on device;")


@pytest.mark.parametrize(
    "command",
    [
        ["train", TOKENIZER, *TINY_TOKENIZER, "--train.steps", "1"],
        ["import", str(ROOT / "tests/golden/tokenizer_checkpoint.pt")],
    ],
)
def test_a_checkpoint_on_a_full_disk_is_one_line(command, tmp_path):
    """Here no file may have more than 16 KB. Several files are written at once; of those that end later nothing is said."""
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14)); "
    code += "from dar_jax.cli.main import main; sys.exit(main())"
    arguments = [sys.executable, "-c", code, *command, "--workdir", str(tmp_path)]
    environment = os.environ | {"XLA_FLAGS": f"{FLAGS} {FASTER}", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    process = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("dar-jax: cannot write") and "File too large;" in process.stderr


def test_interrupted_training_saves_and_exits_with_130(tmp_path):
    with start("train", TOKENIZER, "--workdir", str(tmp_path), *TINY_TOKENIZER, "--train.steps", "100000") as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"stopped at step {checkpoint.latest_step(tmp_path)}" in out
