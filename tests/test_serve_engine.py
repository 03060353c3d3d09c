"""The engine of `dar-jax serve`: whatever comes and goes beside it, a sample has the tokens and the image that it has alone."""

import functools
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dar_jax.config import MeshConfig, SamplingConfig
from dar_jax.inference.trained import load_sampler
from dar_jax.models.pixels import to_uint8
from dar_jax.parallel import make_mesh
from dar_jax.sampling.sampler import generate
from dar_jax.sampling.settings import make_settings
from dar_jax.serve.engine import Engine, Failure

SETTINGS = [  # the first three share a batch
    SamplingConfig(guidance=(1.5, 3.0)),
    SamplingConfig(guidance=(4.0, 1.0), temperature=0.7),
    SamplingConfig(guidance=(2.0, 2.0), num_groups=2),
    SamplingConfig(guidance=(1.0, 1.0), temperature=0.0),
]
PREFIX = tuple(range(20, 36))


@pytest.fixture(scope="module")
def trained(tiny_run):
    return load_sampler(tiny_run, mesh=make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


@pytest.fixture(scope="module")
def engine(trained):
    engine = Engine(trained, max_batch=4, max_waiting=40)
    yield engine
    engine.close()
    assert not engine._thread.is_alive()


@pytest.fixture(scope="module")
def alone(trained):
    """alone(label, seed, noise seed, number of the settings, length of the prefix) -> tokens and image, of `generate`."""

    @functools.cache
    def draw(label, seed, noise_seed, number, length):
        prefix = np.array([PREFIX[:length]], np.int32) if length else None
        made = make_settings(SETTINGS[number], trained.config, trained.networks.method)
        arrays = (np.array([number]) for number in (label, seed, noise_seed))
        label, seed, noise_seed = arrays
        with jax.set_mesh(trained.mesh):
            samples = generate(
                trained.networks, trained.sampler_params, made, label, seed, prefix, noise_seeds=noise_seed.astype(np.uint32)
            )
        return np.asarray(samples.tokens[0]), to_uint8(np.asarray(samples.images[0]))

    return draw


class Heard:
    """Collects what a request is told."""

    def __init__(self, engine, wishes, hold=None):
        self.wishes, self.events, self.done, self.hold = wishes, [], threading.Event(), hold
        samples = [engine.sample(*wish[:2], SETTINGS[wish[3]], wish[2], PREFIX[: wish[4]]) for wish in wishes]
        self.request = engine.submit(samples, self.hear)

    def hear(self, event):
        if self.hold:
            self.hold.wait(20)
        self.events.append(event)
        if isinstance(event, Failure) or len(self.finals()) == len(self.wishes):
            self.done.set()

    def finals(self):
        return {event.index: event for event in self.events if not isinstance(event, Failure) and event.final}


def check(heard, alone):
    for index, event in heard.finals().items():
        tokens, image = alone(*heard.wishes[index])
        np.testing.assert_array_equal(event.tokens, tokens)
        np.testing.assert_allclose(event.image.astype(int), image, atol=1)
    for index in range(len(heard.wishes)):
        groups = [event.group for event in heard.events if event.index == index]
        assert groups == list(range(1, len(groups) + 1))


wish = st.tuples(
    st.integers(0, 2), st.integers(0, 3), st.integers(0, 3), st.integers(0, len(SETTINGS) - 1), st.sampled_from([0, 0, 5, 16])
)
step = st.one_of(st.lists(wish, min_size=1, max_size=4), st.tuples(st.just("cancel"), st.integers(0, 9)), st.floats(0, 0.02))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps=st.lists(step, min_size=1, max_size=9))
def test_finished_samples_are_those_of_generate(engine, alone, steps):
    """Random arrivals, cancels, labels, seeds, settings and prefixes."""
    requests, cancelled = [], set()
    for action in steps:
        if isinstance(action, list):
            requests.append(Heard(engine, action))
        elif isinstance(action, float):
            time.sleep(action)
        elif requests:
            number = action[1] % len(requests)
            requests[number].request.cancel()
            cancelled.add(number)
    for number, heard in enumerate(requests):
        assert number in cancelled or heard.done.wait(60)
        check(heard, alone)
        assert number in cancelled or len(heard.finals()) == len(heard.wishes)
    wait_for(lambda: engine.load() == (0, 0))


def wait_for(holds, seconds=20):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
