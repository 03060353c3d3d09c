"""Many requests on one model: samples join and leave between groups of tokens, and each has the tokens that it has alone.

One thread owns the devices. Samples that are after the same group, and whose settings have the same form, are advanced
together as a cohort of 1, 4 or 16 rows (so that few programs are compiled). New samples run first until they have caught up
with a cohort, then join it; a cohort is overtaken at most as often as there are groups. An image of which a part is drawn anew
is a cohort of its own, whose rows are its particles (`sampling.particles`). No web here: `Engine.submit` takes
samples from any thread and calls back with their previews.

Shapes: B rows, T tokens, G groups, R pixels along a side while denoising, H W pixels of an image, C channels.
"""

import collections
import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dar_jax.config import SamplingConfig
from dar_jax.errors import InputError
from dar_jax.inference.trained import Trained
from dar_jax.models.pixels import to_float, to_uint8
from dar_jax.parallel.batches import batch_sharding, full_batch, to_host
from dar_jax.parallel.sharding import put
from dar_jax.sampling.observe import Observed, log_likelihood, project, steered
from dar_jax.sampling.particles import Particles, advance_particles, begin_particles, check_groups
from dar_jax.sampling.sampler import (
    SamplerState,
    Samples,
    advance,
    begin,
    decode,
    form,
    lookup_codes,
    regroup,
    snapshot,
)
from dar_jax.sampling.settings import Settings, denoising_times, make_settings, per_sample

log = logging.getLogger("dar_jax.serve")

BUCKETS = (1, 4, 16, 64, 256)  # rows that programs are compiled for
MOST_FAILURES = 3  # in a row, before the engine gives up


class Full(Exception):
    """As many samples wait as may; try again later."""


class Closed(Exception):
    """The engine has stopped, or failed."""


@dataclass(frozen=True)
class Sample:
    """One image to draw; made and checked by `Engine.sample`. prefix int32 [k], image uint8 [R, R, C], known bool [R, R], or
    None."""

    label: int
    seed: int
    noise_seed: int
    settings: Settings  # NumPy arrays
    num_groups: int
    prefix: np.ndarray | None
    image: np.ndarray | None  # with `known` the pixels that stay, and from a start step on, where to start from
    known: np.ndarray | None
    particles: int  # rows, 1 where nothing is known


@dataclass(frozen=True)
class Preview:
    """Sample `index` of a request after `group` groups (1 .. G): tokens int32 [k], image uint8 [H, W, C]."""

    index: int
    group: int
    tokens: np.ndarray
    image: np.ndarray
    final: bool


@dataclass(frozen=True)
class Failure:
    """The request ends without its images; `message` may be shown to whoever sent it."""

    message: str


class Request:
    """Samples on their way. `cancel` may be called from any thread, at any time and more than once."""

    def __init__(self, engine: "Engine", samples: Sequence[Sample], listener: Callable[[Preview | Failure], None]):
        self.engine, self.samples, self.listener = engine, samples, listener
        self.cancelled, self.left = False, len(samples)

    def cancel(self) -> None:
        """Its samples leave the devices at the next boundary between groups; nothing more is heard of them."""
        self.engine._cancel(self)


@dataclass(eq=False)
class _Row:
    request: Request
    index: int
    overtaken: int = 0  # how often others went first

    @property
    def sample(self) -> Sample:
        return self.request.samples[self.index]


@dataclass(eq=False)
class _Cohort:
    """Rows that are advanced together, padded with None."""

    rows: list[_Row | None]
    settings: Settings
    state: SamplerState | Particles  # particles where the only row is an image of which a part is known

    @property
    def live(self) -> list[_Row]:
        return [row for row in self.rows if row is not None]


class Engine:
    """Draws samples of a transformer's checkpoint, as they come, on a thread of its own.

    `status` is "warming" until the programs for one sample are compiled, then "ok"; "failed" where not even one can be drawn,
    for the reason in `failure`. `close` ends the thread.

    Args:
      trained: without a `decoder_mesh`.
      max_batch: rows on the devices at a time: samples, or the particles of an edit, which may be more if it is alone.
      max_waiting: samples that may wait for a place, beyond which `Full` is raised.

    Raises InputError for a model that it cannot serve.
    """

    def __init__(self, trained: Trained, max_batch: int = 16, max_waiting: int = 64):
        shape = getattr(trained.networks.tokenizer, "data_shape", ())
        if len(shape) != 3 or shape[-1] not in (1, 3):
            raise InputError(f"this model's data are {list(shape)}; only images can be served, [H, W, 1] or [H, W, 3]")
        self.trained, self.max_batch, self.max_waiting = trained, max_batch, max_waiting
        self.status, self.failure = "warming", ""
        self.num_groups = trained.config.num_groups
        self.num_steps = len(denoising_times(trained.info.config.sampling, trained.config, trained.networks.method))
        # A replaced draw or predictor may not know settings with a batch axis; then only equal ones share a batch.
        self._own_settings = not {"draw", "predict"} & set(trained.networks.method.replaced)
        self._buckets = sorted({full_batch(min(size, max_batch), trained.mesh) for size in BUCKETS})
        self._waiting: collections.deque[_Row] = collections.deque()
        self._calls: collections.deque[tuple[Callable[[], Any], Future]] = collections.deque()
        self._cohorts: list[_Cohort] = []
        self._requests: set[Request] = set()  # that are not finished
        self._news = threading.Condition()  # guards _requests, _waiting, _calls, _closing and every request's `cancelled`
        self._closing, self._failures = False, 0
        self._thread = threading.Thread(target=self._run, name="dar_jax.serve", daemon=True)
        self._thread.start()

    # From any thread

    def sample(
        self,
        label: int,
        seed: int,
        sampling: SamplingConfig,
        noise_seed: int | None = None,
        prefix: Sequence[int] | None = None,
        image: np.ndarray | None = None,
        known: np.ndarray | None = None,
        particles: int = 16,
    ) -> Sample:
        """Checks what a sample is to be, see `sampler.begin`; the noise is that of `seed` unless it has a seed of its own.

        Args: prefix, the first tokens; image, uint8 [R, R, C] to start from at `sampling.start_step`, 1 or later; known, bool
        [R, R], True where a pixel of the image stays, see `inference.edit.edit`, with so many particles.

        Raises InputError in one line.
        """
        networks, config = self.trained.networks, self.trained.config
        noise_seed = seed if noise_seed is None else noise_seed
        for name, number in (("seed", seed), ("noise_seed", noise_seed)):
            if not 0 <= number < 2**32:
                raise InputError(f"{name} is {number}, it should be between 0 and {2**32 - 1}")
        settings = make_settings(sampling, config, networks.method)
        if known is not None:
            check_groups(networks.method)
        if known is None and (image is None) != (sampling.start_step == 0):
            raise InputError(f"start_step is {sampling.start_step}: an image to start from needs a step from 1 on")
        if prefix is not None:
            vocabulary = networks.transformer.config.vocab_size
            if len(prefix) > config.num_tokens:
                raise InputError(f"{len(prefix)} tokens are given, an image has {config.num_tokens}")
            if wrong := [token for token in prefix if not 0 <= token < vocabulary]:
                raise InputError(f"the token {wrong[0]} is out of range, tokens are 0 .. {vocabulary - 1}")
            prefix = np.asarray(prefix, np.int32) if len(prefix) else None
        last, guided = settings.num_groups, config.num_tokens if settings.guided else 0
        settings = dataclasses.replace(settings, guided=guided, num_groups=self.num_groups)
        particles = 1 if known is None else full_batch(particles, self.trained.mesh)
        settings = jax.tree.map(np.asarray, settings)
        return Sample(label, seed, noise_seed, settings, last, prefix, image, known, particles)

    def submit(self, samples: Sequence[Sample], listener: Callable[[Preview | Failure], None]) -> Request:
        """Draws these samples as soon as there is room.

        Args: listener, called from the engine's thread with every `Preview`, each sample's last one final, or once with a
        `Failure`. It must not block.

        Raises Full or Closed.
        """
        request = Request(self, samples, listener)
        with self._news:
            if self._closing or self.status == "failed":
                raise Closed(self.failure or "the server stops")
            if len(self._waiting) + len(samples) > self.max_waiting:
                raise Full(f"{len(self._waiting)} images wait already")
            self._requests.add(request)
            self._waiting.extend(_Row(request, index) for index in range(len(samples)))
            self._news.notify()
        return request

    def call(self, function: Callable[[], Any]) -> Future:
        """Runs a short function, such as `encode`, on the engine's thread between two groups. Raises Full or Closed."""
        future: Future = Future()
        with self._news:
            if self._closing or self.status == "failed":
                raise Closed(self.failure or "the server stops")
            if len(self._calls) >= self.max_waiting:
                raise Full(f"{len(self._calls)} images wait already")
            self._calls.append((function, future))
            self._news.notify()
        return future

    def load(self) -> tuple[int, int]:
        """How many samples are on the devices, and how many wait."""
        return sum(len(cohort.live) for cohort in list(self._cohorts)), len(self._waiting)

    def stop(self) -> None:
        """Ends the thread after the group under way; requests that are not finished get a `Failure` at once."""
        with self._news:
            self._closing = True
            left, calls = list(self._requests), list(self._calls)
            self._calls.clear()
            self._news.notify()
        for request in left:
            self._end(request, self.failure or "the server stops")
        for _, future in calls:
            future.set_exception(Closed("the server stops"))

    def close(self) -> None:
        """Stops, and waits for it."""
        self.stop()
        self._thread.join()

    def _cancel(self, request: Request) -> None:
        with self._news:
            request.cancelled = True
            self._requests.discard(request)
            kept = [row for row in self._waiting if row.request is not request]
            self._waiting.clear()
            self._waiting.extend(kept)
            self._news.notify()

    # On the engine's thread

    def _run(self) -> None:
        with jax.set_mesh(self.trained.mesh):
            warming = self._warm_up()
            try:
                next(warming)
            except Exception as error:
                log.exception("not even one sample can be drawn")
                self._fail(f"the model cannot be sampled from: {' '.join(str(error).split())[:500]}")
            try:
                self._serve(warming)
            except Exception:
                log.exception("the engine fails")
                self._fail("the server has failed; its log says why")
            self.stop()

    def _serve(self, warming: Iterator[None]) -> None:
        unread = None
        work = lambda: self._closing or self._calls or self._waiting or self._cohorts or unread is not None  # noqa: E731
        while self.status == "ok" and not self._closing:
            if not work() and next(warming, self) is None:
                continue
            with self._news:
                self._news.wait_for(work)
                calls = [self._calls.popleft()] if self._calls else []  # one, so that `stop` still reaches the others
            for function, future in calls:
                _complete(future, function)
            self._leave()
            self._join()
            dispatched = self._advance_one()
            if unread is not None:  # while the devices go on
                self._read(*unread)
            unread = dispatched

    def _warm_up(self) -> Iterator[None]:
        """Compiles the programs for one sample, then, while there is nothing to draw, those for more and for regrouping."""
        sampling = dataclasses.replace(self.trained.info.config.sampling, start_step=0, num_groups=None)
        request = Request(self, [self.sample(0, 0, sampling)], lambda event: None)
        begin = lambda size: self._begin([_Row(request, 0)] * size)  # noqa: E731
        one = begin(self._buckets[0])
        for _ in range(self.num_groups):
            jax.block_until_ready(self._advance(one))
        self.status = "ok"
        yield
        cohorts = list(map(begin, self._buckets))
        for _ in range(self.num_groups - 1):
            for cohort in cohorts:
                self._advance(cohort)
                yield
            for parts in [*((one,) for one in cohorts[1:]), *itertools.combinations_with_replacement(cohorts, 2)]:
                rows = [len(part.rows) for part in parts]
                least, most = (1, rows[0] - 1) if len(parts) == 1 else (rows[1], min(sum(rows), self.max_batch))
                for size in self._buckets:
                    if least <= size <= self._size(most):
                        regroup([part.state for part in parts], np.zeros(size, np.int64))
                        yield
        for cohort in cohorts:
            self._advance(cohort)
            yield

    def _leave(self) -> None:
        """Cancelled rows leave; a cohort that would fit fewer rows gets them."""
        for cohort in self._cohorts:
            cohort.rows = [None if row is None or row.request.cancelled else row for row in cohort.rows]
        self._cohorts = [cohort for cohort in self._cohorts if cohort.live]
        for number, cohort in enumerate(self._cohorts):
            if self._size(len(cohort.live)) < len(cohort.rows):
                self._cohorts[number] = self._together([cohort])

    def _join(self) -> None:
        """Waiting samples begin where there is room, and cohorts that have come to the same group become one."""
        while rows := self._first_waiting(self.max_batch - sum(row.sample.particles for c in self._cohorts for row in c.live)):
            if (cohort := self._guarded(rows, lambda rows=rows: self._begin(rows))) is None:
                break
            self._cohorts.append(cohort)
        by_form: dict[Any, _Cohort] = {}
        for cohort in self._cohorts:
            if isinstance(cohort.state, Particles):
                by_form[id(cohort)] = cohort
                continue
            key = form(cohort.state), self._settings_form(cohort.live[0].sample)
            by_form[key] = self._together([by_form[key], cohort]) if key in by_form else cohort
        self._cohorts = list(by_form.values())

    def _first_waiting(self, room: int) -> list[_Row]:
        """Takes the first waiting sample and others that can begin with it. One of more particles than there is ever room for
        begins alone."""
        with self._news:
            if not self._waiting or room < (self._waiting[0].sample.particles if self._cohorts else 1):
                return []
            kind = self._kind(self._waiting[0].sample)
            chosen = list(itertools.islice((row for row in self._waiting if self._kind(row.sample) == kind), room))
            for row in chosen:
                self._waiting.remove(row)
        return chosen

    def _kind(self, sample: Sample) -> tuple[Any, ...]:
        alone = None if sample.known is None else id(sample)
        return self._settings_form(sample), sample.image is None, sample.prefix is None, alone

    def _settings_form(self, sample: Sample) -> tuple[Any, ...]:
        values = () if self._own_settings else tuple(leaf.tobytes() for leaf in jax.tree.leaves(sample.settings))
        return jax.tree.structure(sample.settings), values

    def _size(self, rows: int) -> int:
        return next(size for size in self._buckets if size >= rows)

    def _begin(self, rows: list[_Row]) -> _Cohort:
        networks, params, mesh = self.trained.networks, self.trained.sampler_params, self.trained.mesh
        if rows[0].sample.known is not None:
            return self._begin_edit(rows[0])
        size = self._size(len(rows))
        samples = [row.sample for row in rows + rows[-1:] * (size - len(rows))]
        column = lambda name, dtype: np.array([getattr(sample, name) for sample in samples], dtype)  # noqa: E731
        condition = networks.condition({"label": column("label", np.int32)})
        batch = jax.tree.map(np.asarray, condition), column("seed", np.uint32)
        given = {"noise_seeds": column("noise_seed", np.uint32)}
        if samples[0].image is not None:
            given["image"] = to_float(np.stack([sample.image for sample in samples]))
        if samples[0].prefix is not None:
            given["prefix"] = np.zeros((size, self.trained.config.num_tokens), np.int32)
            for tokens, sample in zip(given["prefix"], samples):
                tokens[: len(sample.prefix)] = sample.prefix
        batch, given = put((batch, given), batch_sharding(mesh))
        if samples[0].prefix is not None:
            given["num_given"] = np.array([len(sample.prefix) for sample in samples], np.int32)
        settings = self._settings(samples)
        return _Cohort(rows + [None] * (size - len(rows)), settings, begin(networks, params, settings, *batch, **given))

    def _begin_edit(self, row: _Row) -> _Cohort:
        networks, sample = self.trained.networks, row.sample
        labels = networks.condition({"label": np.full(sample.particles, sample.label, np.int32)})
        conditions = put(jax.tree.map(np.asarray, labels), batch_sharding(self.trained.mesh))
        seeds = np.array([sample.seed], np.uint32), sample.particles
        prefix = None if sample.prefix is None else sample.prefix[None]
        image = to_float(sample.image)[None] if sample.settings.start_step else None
        given = {"prefix": prefix, "image": image, "noise_seeds": np.array([sample.noise_seed], np.uint32)}
        start = begin_particles(networks, self.trained.sampler_params, sample.settings, conditions, *seeds, **given)
        return _Cohort([row], sample.settings, start)

    def _settings(self, samples: Sequence[Sample]) -> Settings:
        if not self._own_settings:
            return samples[0].settings
        return put(per_sample([sample.settings for sample in samples]), batch_sharding(self.trained.mesh))

    def _together(self, cohorts: Sequence[_Cohort]) -> _Cohort:
        """The live rows of cohorts of one form as one cohort."""
        cohorts = sorted(cohorts, key=lambda cohort: len(cohort.rows))  # fewer programs
        places = np.flatnonzero([row is not None for cohort in cohorts for row in cohort.rows])
        rows = [row for cohort in cohorts for row in cohort.live]
        padding = self._size(len(rows)) - len(rows)
        state = regroup([cohort.state for cohort in cohorts], np.pad(places, (0, padding), mode="edge"))
        settings = self._settings([row.sample for row in rows + rows[-1:] * padding])
        return _Cohort(rows + [None] * padding, settings, state)

    def _advance_one(self) -> tuple[list[_Row | None], int, Samples] | None:
        """Advances one cohort by a group: the one that is furthest behind, unless another was overtaken too often."""
        if not self._cohorts:
            return None

        def turn(cohort: _Cohort) -> tuple[int, int]:
            overtaken = max(row.overtaken for row in cohort.live)
            return -overtaken if overtaken >= self.num_groups else 0, cohort.state.group

        cohort = min(self._cohorts, key=turn)
        for row in (row for other in self._cohorts if other is not cohort for row in other.live):
            row.overtaken += 1
        rows = cohort.rows
        samples = self._guarded(cohort.live, lambda: self._advance(cohort))
        if samples is None:
            return None
        group = cohort.state.group
        cohort.rows = [None if row is None or row.sample.num_groups <= group else row for row in rows]
        return rows, group, samples

    def _advance(self, cohort: _Cohort) -> Samples:
        networks, params = self.trained.networks, self.trained.sampler_params
        if isinstance(cohort.state, Particles):
            return self._advance_edit(cohort)
        cohort.state = advance(networks, params, cohort.settings, cohort.state)
        return snapshot(networks, params, cohort.state)

    def _advance_edit(self, cohort: _Cohort) -> Samples:
        """One group of all particles; the tokens so far and the preview of the best one, or, in the end, of the one drawn."""
        trained, sample, settings = self.trained, cohort.live[0].sample, cohort.settings
        observed = Observed(to_float(sample.image)[None], np.float32(sample.known)[None, ..., None])
        last = cohort.state.group == self.num_groups - 1
        arguments = trained.networks, trained.sampler_params, settings, cohort.state
        fit = functools.partial(log_likelihood, observed=observed)
        cohort.state = advance_particles(*arguments, fit, 1 if last else sample.particles)
        shown = snapshot(trained.networks, trained.sampler_params, cohort.state.state)
        best = np.argmax(cohort.state.weights[0])
        shown = jax.tree.map(lambda leaf: leaf[best : best + 1], shown)
        if not last:
            return shown
        start = observed.values if settings.start_step else None
        values = lookup_codes(trained.networks, trained.params, cohort.state.tokens)
        noise = np.array([sample.noise_seed], np.uint32)
        networks = steered(trained.networks, trained.networks.method.steer or project)
        drawn = decode(networks, trained.sampler_params, settings, values, noise, start, observed)
        return dataclasses.replace(shown, images=drawn.images)

    def _read(self, rows: list[_Row | None], group: int, samples: Samples) -> None:
        """Waits for the devices and gives everybody their previews."""
        arrays = self._guarded(
            [row for row in rows if row], lambda: (to_host(samples.tokens), to_uint8(to_host(samples.images)))
        )
        for row, tokens, image in zip(rows, *(arrays or ((), ()))):
            if row is None or row.request.cancelled:
                continue
            if row.sample.known is not None and row.sample.image.shape == image.shape:
                image = np.where(row.sample.known[..., None], row.sample.image, image)
            image = image.copy()  # whoever reads it late does not keep the batch
            if group == row.sample.num_groups:
                row.request.left -= 1
            if not row.request.left:
                with self._news:
                    self._requests.discard(row.request)
            _tell(row.request, Preview(row.index, group, tokens, image, group == row.sample.num_groups))

    def _guarded(self, rows: Sequence[_Row], work: Callable[[], Any]) -> Any:
        """The result of work for these rows; where it fails, their requests do, and only they."""
        try:
            result = work()
        except Exception as error:
            log.exception("%d samples failed", len(rows))
            for request in {row.request for row in rows}:
                self._end(request, "drawing this image failed; the server's log says why")
            self._failures += "RESOURCE_EXHAUSTED" not in str(error)  # these samples were too many, others may not be
            if self._failures >= MOST_FAILURES:
                self._fail("drawing fails again and again; the server's log says why")
            return None
        self._failures = 0
        return result

    def _fail(self, message: str) -> None:
        self.status, self.failure = "failed", message

    def _end(self, request: Request, message: str) -> None:
        if not request.cancelled:
            request.cancel()
            _tell(request, Failure(message))


def _tell(request: Request, event: Preview | Failure) -> None:
    try:
        request.listener(event)
    except Exception:
        log.exception("a listener failed")
        request.cancel()


def _complete(future: Future, function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
