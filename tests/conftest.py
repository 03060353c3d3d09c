"""Eight simulated devices and a compilation cache for every test, and `--golden` to run the parity cases of another folder."""

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

from many_hosts import CACHE, FASTER, FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["DAR_JAX_CACHE"] = f"{CACHE}/weights"  # not the user's, whose weights would make evaluations long
os.environ.pop("PYTHONUNBUFFERED", None)  # `dar-jax` writes each line at once, also where this is not set
flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {FLAGS}"
os.environ["XLA_FLAGS"] = f"{flags} {FASTER}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

jax.devices()  # has read them
os.environ["XLA_FLAGS"] = flags  # libtpu, which reads them too, does not know FASTER
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
# Most of the time is tracing: a fifth of it goes into collecting garbage that is none, and naming lines of code.
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(50_000, 50, 1000)


SLOW = ["forks", "variants_tokens", "variants_condition", "step", "many_hosts", "parity", "cli", "sampler", "loop", "notebook"]


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker waits for one at the end."""
    names = [f"test_{name}" for name in SLOW]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests go to one worker, which makes their fixtures once."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_addoption(parser):
    parser.addoption("--golden", type=Path, default=Path(__file__).parent / "golden", help="folder of parity cases")


@pytest.fixture(autouse=True)
def compiled_functions_are_freed():
    """Those of all tests would take 8 GB of a worker."""
    yield
    if sys.platform == "linux" and int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() > 2e9:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # `keep_freed_memory` keeps it for good


@pytest.fixture(scope="session")
def golden(pytestconfig):
    """The folder of parity cases."""
    return pytestconfig.getoption("--golden")


def golden_cases(config, prefix: str) -> list[str]:
    return sorted(path.stem for path in config.getoption("--golden").glob(f"{prefix}*.json"))


def pytest_generate_tests(metafunc):
    for fixture, prefix in (("tokenizer_case", "tokenizer_"), ("ar_case", "ar_"), ("filter_case", "filter")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, golden_cases(metafunc.config, prefix), indirect=True, scope="module")


@pytest.fixture(scope="module")
def tokenizer_case(request):
    return _load(request)


@pytest.fixture(scope="module")
def ar_case(request):
    return _load(request)


@pytest.fixture(scope="module")
def filter_case(request):
    return _load(request)


def _load(request):
    from parity_cases import Case

    return Case.load(request.config.getoption("--golden"), request.param)


@pytest.fixture
def narrow_vgg(monkeypatch):
    """LPIPS with a sixteenth of its channels, where its weights are random anyway."""
    from dar_jax.features import vgg_lpips

    monkeypatch.setattr(vgg_lpips, "STAGES", tuple((count, channels // 16) for count, channels in vgg_lpips.STAGES))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """make(**sizes) -> (model, random parameters) of a tokenizer of 8-pixel grey images, 4 groups by default."""
    import jax.numpy as jnp

    from dar_jax.config import TokenizerConfig, VelocityConfig
    from dar_jax.models.tokenizer import Tokenizer

    def make(**sizes):
        defaults = {"image_size": 8, "channels": 1, "encoder_patch_size": 4, "encoder_layers": 2, "decoder_layers": 2}
        defaults |= {"encoder_width": 16, "decoder_width": 16, "head_size": 8, "num_tokens": 16, "num_groups": 4}
        defaults |= {"num_denoising_steps": 4, "codebook_size": 64, "init_std": None, "gate_init": 1.0}
        velocity = VelocityConfig(width=16, layers=2, head_size=8, patch_size=4, repa_layer=None)
        config = TokenizerConfig(**{**defaults, "velocity": velocity, **sizes})
        model = Tokenizer(config)
        images = jnp.zeros((1, config.image_size, config.image_size, config.channels))
        params = jax.jit(model.init)(jax.random.key(0), images)["params"]
        # The output and modulation matrices start at zero, which would hide what flows through them.
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(1)
        return model, jax.tree.unflatten(tree, [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves])

    return make


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_tokenizer):
    """The folder of a transformer's run on the digits, with random weights."""
    import jax.numpy as jnp

    from dar_jax.config import DataConfig, SamplingConfig, TokenizerTraining, TransformerConfig, TransformerTraining
    from dar_jax.models.transformer import Llama
    from dar_jax.training.checkpoint import save_for_inference

    folder, names = tmp_path_factory.mktemp("run"), tuple("0123456789")
    data = DataConfig(source="digits", image_size=8, channels=1, crop="center", flip=False)
    tokenizer, params = tiny_tokenizer()
    save_for_inference(folder / "tokenizer", TokenizerTraining(model=tokenizer.config, data=data), params, 1, names)
    model = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=16, vocab_size=64, num_classes=10)
    inputs = (jnp.zeros(1, jnp.int32), jnp.zeros((1, 16), jnp.int32))
    params = jax.jit(Llama(model).init)(jax.random.key(2), *inputs)["params"]
    params |= {"output": 0.3 * jax.random.normal(jax.random.key(3), params["output"].shape)}
    config = TransformerTraining(name="tiny", model=model, data=data, sampling=SamplingConfig(guidance=(1.5, 3.0)))
    save_for_inference(folder, config, params, 1, names)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_run):
    """The folder of a fork's run of three steps, made at first use."""
    from fork_runs import train

    folders = {}

    def make(name):
        name = {"unmasking": "block_diffusion", "energy": "block_diffusion"}.get(name, name)  # whose runs they sample from
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("fork")
            train(name, folders[name], tiny_run)
        return folders[name]

    return make


@pytest.fixture(scope="session")
def one_device():
    from dar_jax.config import MeshConfig
    from dar_jax.parallel import make_mesh

    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="session")
def opened(tiny_run, one_device):
    """The random transformer of `tiny_run` with a fork's parts of sampling; None: without."""
    from fork_runs import path_of

    from dar_jax.experiment import load_experiment
    from dar_jax.inference.trained import load_sampler

    return lambda name: load_sampler(tiny_run, None if name is None else load_experiment(path_of(name)), mesh=one_device)


@pytest.fixture(scope="session")
def engine(tiny_run, one_device):
    """The engine of `dar-jax serve` over the tiny run, for up to four samples at a time on one device."""
    from serving import wait_for

    from dar_jax.inference.trained import load_sampler
    from dar_jax.serve.engine import Engine

    engine = Engine(load_sampler(tiny_run, mesh=one_device), max_batch=4, max_waiting=40)
    wait_for(lambda: engine.status == "ok", 120)
    yield engine
    engine.close()
    assert not engine._thread.is_alive()


@pytest.fixture(scope="session")
def url(engine):
    """The address of `dar-jax serve` over that engine."""
    from serving import Served

    from dar_jax.serve.app import make_app

    served = Served(make_app(engine))
    yield served.url
    served.close()
