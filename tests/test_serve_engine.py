"""The engine of `dar-jax serve`: whatever comes and goes beside it, a sample has the tokens and the image that it has alone."""

import dataclasses
import functools
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import wait_for

from dar_jax.config import MeshConfig, SamplingConfig
from dar_jax.errors import InputError
from dar_jax.experiment import load_experiment
from dar_jax.inference.trained import load_sampler
from dar_jax.models.pixels import to_uint8
from dar_jax.parallel import make_mesh
from dar_jax.sampling.sampler import generate
from dar_jax.sampling.settings import Method, make_settings, normal_noise
from dar_jax.serve import engine as engine_module
from dar_jax.serve.engine import Closed, Engine, Failure, Full

SETTINGS = [  # the first three share a batch
    SamplingConfig(guidance=(1.5, 3.0)),
    SamplingConfig(guidance=(4.0, 1.0), temperature=0.7),
    SamplingConfig(guidance=(2.0, 2.0), num_groups=2),
    SamplingConfig(guidance=(1.0, 1.0), temperature=0.0),
]
PREFIX = tuple(range(20, 36))


@pytest.fixture(scope="module")
def trained(engine):
    return engine.trained


def drawn_alone(trained, label, seed, noise_seed, number, length):
    """Tokens and image by `generate`, of SETTINGS[number] and a prefix of this length."""
    prefix = np.array([PREFIX[:length]], np.int32) if length else None
    made = make_settings(SETTINGS[number], trained.config, trained.networks.method)
    last, made = made.num_groups, dataclasses.replace(made, num_groups=trained.config.num_groups)
    condition = trained.networks.condition({"label": np.array([label], np.int32)})
    seeds = (np.array([each], np.uint32) for each in (seed, noise_seed))
    with jax.set_mesh(trained.mesh):
        arguments = (trained.networks, trained.sampler_params, made, condition, next(seeds))
        samples = generate(*arguments, prefix=prefix, noise_seeds=next(seeds), previews=True)
    tokens = np.asarray(samples.tokens[0])[: last * trained.config.tokens_per_group]
    return tokens, to_uint8(np.asarray(samples.previews[last - 1, 0]))


@pytest.fixture(scope="module")
def alone(trained):
    return functools.cache(functools.partial(drawn_alone, trained))


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


@settings(max_examples=10, deadline=None, derandomize=True)
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


def test_requests_on_many_devices(tiny_run, alone):
    """Rows are sharded over a mesh; they join, leave and are put together there."""
    trained = load_sampler(tiny_run, mesh=make_mesh(MeshConfig(2, 1, 1), jax.devices()[:2]))
    engine = Engine(trained, max_batch=2)
    try:
        requests = [Heard(engine, [(number, number, number, 0, 0)]) for number in range(5)]
        for heard in requests:
            assert heard.done.wait(120)
            check(heard, alone)
    finally:
        engine.close()


def test_an_image_under_way_is_overtaken_a_few_times_only(engine):
    """While new ones keep coming, and never share its batch."""
    ends, first = [], Heard(engine, [(0, 1, 1, 0, 0)])
    first.done.wait(60)

    class Timed(Heard):
        def hear(self, event):
            super().hear(event)
            if event.final:
                ends.append(self)

    slow = Timed(engine, [(0, 1, 1, 3, 0)])
    others = [Timed(engine, [(0, seed, 1, 0, 0)] * 2) for seed in range(16)]
    for heard in [slow, *others]:
        assert heard.done.wait(60)
    assert ends.index(slow) <= 6  # of 33


def test_full_and_closed(trained):
    engine = Engine(trained, max_batch=1, max_waiting=4)
    wait_for(lambda: engine.status == "ok", 60)
    hold = threading.Event()
    calls = [engine.call(lambda: hold.wait(60))]
    wait_for(calls[0].running)
    calls.append(engine.call(print))
    heard = [Heard(engine, [(0, 1, 1, 0, 0)] * 2) for _ in range(2)]
    with pytest.raises(Full, match="4 images wait"):
        Heard(engine, [(0, 1, 1, 0, 0)])
    heard[0].request.cancel()
    heard.append(Heard(engine, [(0, 1, 1, 0, 0)]))
    engine.stop()
    assert [each.events for each in heard] == [[], [Failure("the server stops")], [Failure("the server stops")]]
    for use in (lambda: Heard(engine, [(0, 1, 1, 0, 0)]), lambda: engine.call(print)):
        with pytest.raises(Closed, match="stops"):
            use()
    hold.set()
    engine.close()
    assert calls[0].result() and engine.load() == (0, 0)
    with pytest.raises(Closed):
        calls[1].result()


def test_what_fails_fails_alone(engine, alone, monkeypatch, caplog):
    """A request whose work fails is told so; the others go on, unless it happens again and again."""
    real = engine_module.advance

    def advance(networks, params, settings, state):
        if int(np.asarray(state.prediction.condition)[0]) == 9:
            raise RuntimeError("out of memory")
        return real(networks, params, settings, state)

    monkeypatch.setattr(engine_module, "advance", advance)
    bad = Heard(engine, [(9, 1, 1, 3, 0)])
    good = Heard(engine, [(1, 1, 1, 0, 0)])
    assert bad.done.wait(60) and good.done.wait(60)
    assert [type(event) for event in bad.events] == [Failure] and "memory" not in bad.events[0].message
    assert "out of memory" in caplog.text
    check(good, alone)
    assert engine.status == "ok"


def test_particles_take_the_room_of_samples(engine, monkeypatch):
    """More than there is ever room for begin alone; where memory does not suffice, that request alone fails."""
    real, beside, heard, done = engine._begin_edit, [], [], threading.Event()

    def begin_edit(row):
        beside.append([each.sample.particles for cohort in engine._cohorts for each in cohort.live] + [row.sample.particles])
        if row.sample.particles > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(row)

    def hear(event):
        heard.append(event)
        if sum(isinstance(event, Failure) or event.final for event in heard) == 8:
            done.set()

    monkeypatch.setattr(engine, "max_batch", 8)
    monkeypatch.setattr(engine, "_begin_edit", begin_edit)
    image, known = np.zeros((8, 8, 1), np.uint8), np.tile(np.arange(8) < 4, (8, 1))
    for particles in (4, 4, 4, 16, 16, 16, 16):
        engine.submit([engine.sample(3, 1, SETTINGS[3], 1, None, image, known=known, particles=particles)], hear)
    engine.submit([engine.sample(3, 1, SETTINGS[3])], hear)
    assert done.wait(60) and engine.status == "ok"
    assert sum(isinstance(event, Failure) for event in heard) == 4
    assert all(sum(each) <= 8 or each == [16] for each in beside) and beside.count([16]) == 4


def draw(logits, keys, position, tokens, settings):
    return jax.vmap(jax.random.categorical)(keys, logits.at[:, :32].add(-1) / settings.temperature)


FORKS = {
    "draw": Method(draw=draw, noise=lambda keys, shape: 0.5 * normal_noise(keys, shape)),
    "predict": load_experiment(Path(__file__).parent.parent / "experiments" / "variants" / "speculative.py").method,
}


@pytest.mark.parametrize("name", FORKS)
def test_replaced_parts(trained, name):
    """Parts that know nothing of settings with a batch axis get them without."""
    networks = dataclasses.replace(trained.networks, method=FORKS[name], condition=lambda batch: (batch["label"] + 1) % 10)
    fork = dataclasses.replace(trained, networks=networks)
    engine, expected = Engine(fork, max_batch=1 + (name == "draw")), functools.partial(drawn_alone, dataclasses.replace(fork))
    try:
        wishes = [(0, 1, 2, 0, 0), (1, 2, 3, 0, 0), (1, 1, 1, 1, 0)]
        requests = [Heard(engine, [wish]) for wish in wishes]
        for heard, wish in zip(requests, wishes):
            assert heard.done.wait(120)
            tokens, image = expected(*wish)
            np.testing.assert_array_equal(heard.events[-1].tokens, tokens)
            np.testing.assert_allclose(heard.events[-1].image.astype(int), image, atol=1)
    finally:
        engine.close()


def test_what_cannot_be_served(trained, caplog):
    class Series(type(trained.networks.tokenizer)):
        data_shape = (64, 2)

    networks = dataclasses.replace(trained.networks, tokenizer=Series(trained.config))
    with pytest.raises(InputError, match=r"data are \[64, 2\]; only images can be served"):
        Engine(dataclasses.replace(trained, networks=networks))

    def broken(batch):
        raise InputError("this experiment needs an edge map")

    engine = Engine(dataclasses.replace(trained, networks=dataclasses.replace(trained.networks, condition=broken)))
    wait_for(lambda: engine.status == "failed")
    with pytest.raises(Closed, match="needs an edge map"):
        engine.submit([engine.sample(0, 0, SETTINGS[0])], print)
    engine.close()


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"seed": -1}, "seed is -1"),
        ({"noise_seed": 2**32}, "noise_seed is"),
        ({"prefix": [64]}, "token 64"),
        ({"prefix": [0] * 17}, "17 tokens"),
        ({"image": np.zeros((8, 8, 1), np.uint8)}, "start_step is 0"),
        ({"sampling": SamplingConfig(start_step=2)}, "start_step is 2"),
        ({"sampling": SamplingConfig(num_groups=9)}, "num_groups is 9"),
    ],
    ids=str,
)
def test_wrong_samples(engine, wrong, word):
    with pytest.raises(InputError, match=word):
        engine.sample(**{"label": 0, "seed": 0, "sampling": SETTINGS[0], **wrong})
