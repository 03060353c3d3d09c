"""Variants that find the tokens in fewer passes: exactly those of the base, or by the probabilities that they say."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax.core import FrozenDict
from fork_runs import TRANSFORMERS, module_of, path_of, run, tokens_of, trains_and_samples

from dar_jax.cli.main import main
from dar_jax.config import SamplingConfig, TokenizerConfig, TransformerConfig
from dar_jax.errors import InputError
from dar_jax.experiment import load_experiment
from dar_jax.inference.samples import sample
from dar_jax.inference.trained import load_sampler
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama, score
from dar_jax.sampling import sampler
from dar_jax.sampling.predict import token_by_token
from dar_jax.sampling.prepare import SamplerParams, Unstacked, prepare, unstacked
from dar_jax.sampling.settings import Method, Networks, make_settings
from dar_jax.sampling.speculate import speculation


@pytest.mark.parametrize("name", TRANSFORMERS["tokens"])
def test_transformer_trains_and_samples(name, trained, tmp_path):
    trains_and_samples(name, trained(name), tmp_path)


def speculated(opened, window, small=False, sampling=None, seeds=range(6), **given):
    """Tokens and passes of samples with a window of so many guesses, whose drafter is the model itself."""
    opened = opened(None)
    networks, params, seeds = opened.networks, opened.params, jnp.asarray(seeds)
    sampling = sampling or SamplingConfig((2, 2))
    if small:
        method = Method(predict=speculation(window, drafter=module_of("speculative").drafter))
        networks = dataclasses.replace(networks, method=method, others=FrozenDict({"draft": networks.transformer}))
        params = {**params, "others": {"draft": params["transformer"]}}
    else:
        sampling = dataclasses.replace(sampling, speculate=window)
    settings = make_settings(sampling, opened.config, networks.method)
    params = prepare(networks, params)
    state = sampler.begin(networks, params, settings, seeds % 10, seeds, **given)
    for _ in range(settings.num_groups):
        state = sampler.advance(networks, params, settings, state)
    return np.asarray(state.prediction.tokens[:, : opened.config.num_tokens]), np.asarray(state.prediction.calls)


@pytest.mark.parametrize(
    ("window", "sampling"),
    [
        (1, SamplingConfig((1, 1))),
        (16, SamplingConfig((1.1, 8), temperature=0.0)),
        (8, SamplingConfig((3, 0.5), top_k=20)),
        (5, SamplingConfig((2, 2), top_p=0.9, cfg_interval=5)),
    ],
)
def test_speculation_gives_the_same_tokens(window, sampling, opened):
    seeds = np.arange(6)
    expected = tokens_of(opened(None), seeds % 10, seeds, sampling)
    tokens, calls = speculated(opened, window, sampling=sampling)
    np.testing.assert_array_equal(tokens, expected)
    assert calls.max() <= 16 and (window > 1 or calls.min() == 16)


def test_the_option_changes_no_picture(tiny_run, tmp_path):
    command = ["sample", tiny_run, "--labels", "3,7", "--seeds", "1,2"]
    for name, option in (("plain", ()), ("guessed", ("--speculate", "8"))):
        run(*command, *option, "--out", tmp_path / name)
    plain, guessed = (
        [path.read_bytes() for path in sorted((tmp_path / name).glob("*_seed*.png"))] for name in ("plain", "guessed")
    )
    assert len(plain) == 2 and plain == guessed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--labels", "3", "--seeds", "1", "--speculate", "17"], "but an image has 16 tokens"),
        (
            ["sample", "--labels", "3", "--seeds", "1", "--speculate", "8", "--experiment", path_of("unmasking")],
            "leave it at 0",
        ),
        (["edit", "--image", "image.png", "--enlarge", "4", "--speculate", "8"], "give --speculate 0"),
    ],
)
def test_where_guesses_are_refused(arguments, message, tiny_run, tmp_path, capsys):
    assert main([arguments[0], str(tiny_run), *arguments[1:], "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_speculation_after_given_tokens(opened):
    seeds, prefix = np.arange(6), np.arange(30).reshape(6, 5)
    expected = tokens_of(opened(None), seeds % 10, seeds, SamplingConfig((2, 2)), prefix=prefix)
    np.testing.assert_array_equal(speculated(opened, 5, prefix=prefix)[0], expected)


def test_guesses_set_the_passes(opened):
    """All right: a pass for each window; all wrong: at most one for each token; a network that drafts for itself is right."""
    seeds = np.arange(6)
    expected = tokens_of(opened(None), seeds % 10, seeds, SamplingConfig((2, 2)))
    for guesses, most in ((expected, 4), ((expected + 1) % 64, 16)):
        tokens, calls = speculated(opened, 5, prefix=guesses, num_given=np.zeros(6, np.int32))
        np.testing.assert_array_equal(tokens, expected)
        assert calls.max() <= most
    tokens, calls = speculated(opened, 5, small=True)
    np.testing.assert_array_equal(tokens, expected)
    assert (calls == 4).all()


def test_passes_are_those_of_each_sample_alone(opened):
    one, calls = speculated(opened, 4, seeds=[3])
    many, all_calls = speculated(opened, 4, seeds=range(6))
    np.testing.assert_array_equal(one[0], many[3])
    assert calls[0] == all_calls[3] and len(set(all_calls.tolist())) > 1


def test_passes_are_reported_where_a_fork_finds_the_tokens(opened, caplog):
    seeds = np.arange(6)
    with caplog.at_level("INFO", "dar_jax"):
        (base,) = sample(opened(None), seeds % 10, seeds, SamplingConfig((2, 2)))
        assert (base.calls == 16).all() and "passes" not in caplog.text
        (fork,) = sample(opened("speculative"), seeds % 10, seeds, SamplingConfig((2, 2)))
    mean, most = fork.calls.mean(), fork.calls.max()
    assert 2 <= mean < 16 and f"{mean:.1f} passes of the transformer a sample, at most {most}" in caplog.text


@pytest.mark.parametrize("name", ["group_parallel", "any_block", "unmasking", "energy"])
def test_a_sample_does_not_depend_on_its_batch(name, trained, one_device):
    fork = load_sampler(trained(name), load_experiment(path_of(name)), mesh=one_device)
    together = [batch.images for batch in sample(fork, [1, 2, 3], [4, 5, 6], SamplingConfig((2, 1)))]
    alone = [batch.images for batch in sample(fork, [1, 2, 3], [4, 5, 6], SamplingConfig((2, 1)), batch_size=1)]
    assert np.abs(np.concatenate(together).astype(int) - np.concatenate(alone)).max() <= 1


def test_group_parallel_predicts_as_it_trains(trained, one_device):
    fork = load_sampler(trained("group_parallel"), load_experiment(path_of("group_parallel")), mesh=one_device)
    params = dict(fork.params["transformer"])
    params["output"] = jax.random.normal(jax.random.key(0), params["output"].shape)
    params = {**fork.params, "transformer": params}
    settings = make_settings(SamplingConfig((1, 1), temperature=0.0), fork.config, fork.networks.method)
    samples = sampler.generate(fork.networks, params, settings, jnp.arange(3), jnp.arange(3))
    logits = fork.networks.transformer.apply({"params": params["transformer"]}, jnp.arange(3), samples.tokens)
    np.testing.assert_array_equal(logits.argmax(-1), samples.tokens)
    assert len(np.unique(samples.tokens[:, :4])) > 3  # the slots of the first group are told apart


def any_block(trained, one_device, name="any_block"):
    """A fork of three steps whose logits are no longer close to zero, and what its tokens are drawn with."""
    fork = load_sampler(trained("any_block"), load_experiment(path_of(name)), mesh=one_device)
    params = dict(fork.params["transformer"])
    for number, part in enumerate(("output", "shift_table", "token_table", "class_table")):
        params[part] = jax.random.normal(jax.random.key(number), params[part].shape)
    return fork.networks, params, fork


def test_blocks_of_any_block_fit_the_groups():
    def sizes(name, tokens_per_group):
        experiment = load_experiment(path_of(name))
        config = dataclasses.replace(experiment.config, fork={"tokens_per_group": tokens_per_group})
        return list(experiment.model(config, jnp.float32, "none").sizes())

    assert sizes("any_block", 8) == 8 * [1] + 8 * [8] and sizes("any_block:groups", 8) == 16 * [8]
    for name, wrong in (("any_block", 0), ("any_block", 6), ("any_block:groups", 32), ("any_block:halves", 1)):
        with pytest.raises(InputError, match=f"tokens_per_group is {wrong}, it should be a power of 2 from "):
            sizes(name, wrong)


def test_blocks_of_one_are_the_base(trained, one_device):
    networks, params, fork = any_block(trained, one_device, "any_block:ones")
    base = Llama(networks.transformer.config)
    codes, labels = jax.random.randint(jax.random.key(0), (3, 16), 0, 64), jnp.arange(3)
    logits = networks.transformer.apply({"params": params}, labels, codes)
    np.testing.assert_array_equal(logits, base.apply({"params": params}, labels, codes))
    settings = make_settings(SamplingConfig((2, 1)), fork.config)
    tokens = []
    for each in (networks, dataclasses.replace(networks, transformer=base, method=Method())):
        weights = prepare(each, {**fork.params, "transformer": params})
        tokens.append(sampler.generate(each, weights, settings, labels, jnp.arange(3)).tokens)
    np.testing.assert_array_equal(*tokens)


def test_a_block_is_predicted_in_one_pass_as_in_training(trained, one_device):
    for name in ("any_block:halves", "any_block", "any_block:groups"):
        networks, params, fork = any_block(trained, one_device, name)
        model, labels = networks.transformer, jnp.arange(3)
        settings = make_settings(SamplingConfig((1, 1), temperature=0.0), fork.config)
        weights = prepare(networks, {**fork.params, "transformer": params})
        tokens = sampler.generate(networks, weights, settings, labels, jnp.arange(3)).tokens
        np.testing.assert_array_equal(model.apply({"params": params}, labels, tokens).argmax(-1), tokens)


def test_a_block_sees_the_blocks_before_it(trained, one_device):
    networks, params, _ = any_block(trained, one_device)
    model, codes = networks.transformer, jnp.zeros((1, 16), jnp.int32)
    starts = np.arange(16) // model.sizes() * model.sizes()

    def logits(change):
        return model.apply({"params": params}, jnp.zeros(1, jnp.int32), codes + change.astype(jnp.int32))

    for place in range(15):
        changed = np.abs(logits(jnp.arange(16) == place) - logits(jnp.zeros(16)))[0].max(-1) > 0
        np.testing.assert_array_equal(changed, starts > place)  # all tokens of the blocks that begin after it


def two_streams(trained, one_device, name="block_diffusion"):
    """A run of block_diffusion.py, whose logits are no longer close to zero, with a file's parts of sampling."""
    fork = load_sampler(trained("block_diffusion"), load_experiment(path_of(name)), mesh=one_device)
    params = dict(fork.params["transformer"])
    for number, part in enumerate(("output", "mask", "token_table", "class_table")):
        params[part] = jax.random.normal(jax.random.key(number), params[part].shape)
    return dataclasses.replace(fork, params={**fork.params, "transformer": params})


def predicted(fork, predict=None, sampling=None, seeds=range(6), **given):
    """The state of a predictor after all groups."""
    predict, seeds = predict or fork.networks.method.predict, jnp.asarray(seeds)
    settings = make_settings(sampling or SamplingConfig((2, 0.5), temperature=0.9), fork.config)
    arguments = fork.networks, prepare(fork.networks, fork.params), settings
    state = predict.begin(*arguments, seeds % 10, seeds, given.get("prefix"), given.get("num_given"))
    for group in range(4):
        state = predict.group(*arguments, state, group)
    return state


def test_the_known_stream_is_the_base(trained, one_device):
    fork = two_streams(trained, one_device)
    model, params = fork.networks.transformer, {"params": fork.params["transformer"]}
    base = {"params": {name: value for name, value in params["params"].items() if name != "mask"}}
    codes, labels = jax.random.randint(jax.random.key(0), (3, 16), 0, 64), jnp.arange(3)
    expected = Llama(model.config).apply(base, labels, codes)
    np.testing.assert_array_equal(model.apply(params, labels, codes), expected)
    known, masked = model.apply(params, labels, codes, jnp.ones((3, 16), bool), jnp.arange(16), method="streams")
    np.testing.assert_allclose(known, expected, atol=1e-5)
    np.testing.assert_allclose(masked, expected, atol=1e-5)  # blocks of 1


def test_streams_see_what_they_may(trained, one_device):
    fork = two_streams(trained, one_device)
    model, params = fork.networks.transformer, {"params": fork.params["transformer"]}
    starts, hidden = jnp.asarray([0] * 3 + [3] * 5 + [8] * 8), jnp.arange(16) % 3 == 0

    @jax.jit
    def logits(codes):
        return jnp.stack(model.apply(params, jnp.zeros(1, int), codes[None], hidden[None], starts, method="streams"))[:, 0]

    before = logits(jnp.zeros(16, int))
    for place in range(16):
        known, masked = np.abs(logits(jnp.zeros(16, int).at[place].set(1)) - before).max(axis=-1) > 0
        np.testing.assert_array_equal(known, np.arange(16) > place)
        inside = (starts == starts[place]) & ~hidden[place] & (place < 15 and starts[place + 1] == starts[place])
        np.testing.assert_array_equal(masked, (starts > place) | inside)


def test_hidden_tokens_cost_what_they_cost_in_any_order(one_device):
    """With all rates: the mean over the orders in which three tokens become known."""
    block_diffusion = module_of("block_diffusion")
    block_diffusion.LOWEST_RATE = 0.0
    config = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=3, vocab_size=3, num_classes=2)
    model, codes, starts = block_diffusion.TwoStreams(config), jnp.asarray([[0, 2, 1]]), jnp.zeros(3, int)
    arguments = jnp.zeros(1, int), codes, jnp.ones((1, 3), bool), starts
    params = jax.jit(lambda: model.init(jax.random.key(0), *arguments, method="streams")["params"])()
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    each = {}
    apply = jax.jit(lambda hidden: model.apply({"params": params}, *arguments[:2], hidden, starts, method="streams")[1][0])
    for hidden in itertools.product([True, False], repeat=3):
        logits = apply(jnp.asarray([hidden]))
        each[hidden] = -jnp.take_along_axis(jax.nn.log_softmax(logits), codes[0, :, None], axis=-1)[:, 0]
    orders = list(itertools.permutations(range(3)))
    costs = [each[tuple(place in order[index:] for place in range(3))][order[index]] for order in orders for index in range(3)]
    many = [jnp.repeat(leaf, 4000, axis=0) for leaf in arguments[:2]]
    losses = jax.jit(lambda key: block_diffusion.losses(model, params, *many, starts, key)[2])
    drawn = [losses(jax.random.key(seed)) for seed in range(8)]
    assert np.mean(drawn) == pytest.approx(np.mean(costs), abs=5 * np.std(drawn) / np.sqrt(8)) and np.std(drawn) < 0.2


@pytest.mark.parametrize("sampling", [SamplingConfig((2, 0.5)), SamplingConfig((3, 1), temperature=0.0)])
def test_a_network_that_drafts_for_itself_gives_its_own_tokens(sampling, trained, one_device):
    fork, prefix = two_streams(trained, one_device), jnp.arange(30).reshape(6, 5)
    for given in ({}, {"prefix": prefix}):
        expected = predicted(fork, Method().predict, sampling, **given).tokens
        state = predicted(fork, sampling=sampling, **given)
        np.testing.assert_array_equal(state.tokens[:, :16], expected)
        assert state.calls.max() <= 16 and state.calls.min() < 16


def rule_of(name):
    """The rule of an experiment of unmasking.py."""
    return getattr(module_of("unmasking"), name).method.predict.group.args[0].args[0]


@pytest.mark.parametrize("name", ["experiment", "left_two", "random_two", "ascend", "entropies", "sure", "sums"])
def test_rules(name):
    """Each place once, at least one a pass, whatever the other rows are; the numbers of places of the simple rules."""
    rule, keys = rule_of(name), jax.random.split(jax.random.key(1), 5)
    each = jax.nn.log_softmax(jnp.asarray([0, 1, 4, 8, 20])[:, None, None] * jax.random.normal(jax.random.key(0), (5, 8, 6)))
    still_open, counts = jnp.ones((5, 8), bool).at[0, :3].set(False), []
    for number in range(8):
        chosen = still_open & rule(each, still_open, number, keys)
        alone = still_open[2:3] & rule(each[2:3], still_open[2:3], number, keys[2:3])
        np.testing.assert_array_equal(chosen[2:3], alone)
        assert (chosen.any(axis=1) == still_open.any(axis=1)).all()
        counts.append(int(chosen[1].sum()))
        still_open = still_open & ~chosen
    assert not still_open.any()
    expected = {"experiment": [8], "left_two": [2] * 4, "random_two": [2] * 4, "ascend": [1, 2, 5]}
    assert name not in expected or [count for count in counts if count] == expected[name]


def test_bounds_of_rules():
    unmasking = module_of("unmasking")
    each = jax.nn.log_softmax(jnp.log(jnp.asarray([[[0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.25] * 4, [0.95, 0.05, 0, 0]]])))
    bits = unmasking.entropy(each)
    np.testing.assert_allclose(bits[0, :3], [1, 0, 2], atol=1e-6)
    for rule, expected in (
        (unmasking.bounded(jnp.inf), [1, 1, 1, 1]),
        (unmasking.bounded(0.5), [1, 1, 0, 1]),  # 0, 0.29, 1: without the largest 0, 0, 0.29
        (unmasking.confident(0.9), [0, 1, 0, 1]),
        (unmasking.adaptive(1.5), [1, 1, 0, 0]),
        (unmasking.adaptive(0.5), [1, 0, 0, 0]),
        (unmasking.left(3), [1, 1, 1, 0]),
    ):
        np.testing.assert_array_equal(rule(each, jnp.ones((1, 4), bool), 0, None)[0], expected)


@pytest.mark.parametrize(("name", "passes"), [("experiment", 7), ("left_two", 10), ("groups", 8)])
def test_a_group_of_masks_is_drawn_as_it_is_trained(name, passes, trained, one_device):
    """Passes, and the probabilities of what was drawn, against the whole sequence in one pass for each place that was known."""
    fork, sampling = two_streams(trained, one_device, f"unmasking:{name}"), SamplingConfig((1, 1), temperature=0.7)
    state, model = predicted(fork, sampling=sampling), fork.networks.transformer
    assert (state.calls == passes).all() and (np.isnan(state.log_q[:, :4]) == (name != "groups")).all()
    starts, params = jnp.arange(16) // 4 * 4, {"params": fork.params["transformer"]}
    hidden = jnp.ones((6, 16), bool)
    last = {"experiment": [0, 1, 2, 3], "left_two": [2, 3], "groups": []}[name]  # places of the last pass
    hidden = hidden & jnp.isin(jnp.arange(16) % 4, jnp.asarray(last, int))
    logits = model.apply(params, jnp.arange(6), state.tokens, hidden, starts, method="streams")[1] / 0.7
    log_q = jnp.take_along_axis(jax.nn.log_softmax(logits), state.tokens[..., None], axis=-1)[..., 0]
    known = np.isin(np.arange(16) % 4, last) & (np.arange(16) >= 4)
    np.testing.assert_allclose(state.log_q[:, known], log_q[:, known], atol=1e-4)


def test_uniform_codes_stay_uniform(trained, one_device):
    """A rule that looked at what was drawn would prefer some codes."""
    fork = two_streams(trained, one_device, "unmasking:ascend")
    params = {**fork.params["transformer"], "output": jnp.zeros_like(fork.params["transformer"]["output"])}
    fork = dataclasses.replace(fork, params={**fork.params, "transformer": params})
    state = predicted(fork, sampling=SamplingConfig((1, 1)), seeds=range(300))
    assert scipy.stats.chisquare(np.bincount(state.tokens[:, 4:].reshape(-1), minlength=64)).pvalue > 1e-4
    np.testing.assert_allclose(state.log_q[:, 4:], -np.log(64), rtol=1e-5)


def test_one_candidate_is_the_block_of_masks(trained, one_device):
    fork, energy = two_streams(trained, one_device, "energy"), module_of("energy")
    expected = predicted(two_streams(trained, one_device, "unmasking"))
    for given in ({}, {"prefix": jnp.arange(36).reshape(6, 6)}):
        state = predicted(fork, energy.candidates(1).method.predict, **given)
        assert given or (state.calls == 4 + 2 * 3).all()
    state = predicted(fork, energy.candidates(1).method.predict)
    np.testing.assert_array_equal(state.tokens, expected.tokens)
    of_groups = [np.reshape(each.log_q, (-1, 4, 4)).sum(axis=2) for each in (state, expected)]  # NaN in the first
    np.testing.assert_allclose(*of_groups, atol=1e-4)


def test_candidates_are_read_as_one_after_the_other(trained, one_device):
    """The keys of the chosen one are those of a fresh pass; more candidates bring the divergence down."""
    fork, energy = two_streams(trained, one_device, "energy"), module_of("energy")
    sampling, seeds = SamplingConfig((1, 1), temperature=1.0), jnp.arange(64)
    model, params = fork.networks.transformer, fork.params["transformer"]
    divergences = []
    for count in (1, 8):
        state = predicted(fork, energy.candidates(count).method.predict, sampling, seeds)
        bits, _ = score(model, params, seeds % 10, state.tokens)
        divergences.append(np.mean(np.sum(state.log_q[:, 4:] / np.log(2) + bits[:, 4:], axis=1)))
    assert 0 < divergences[1] < 0.8 * divergences[0]
    given = token_by_token.begin(
        fork.networks,
        prepare(fork.networks, fork.params),
        make_settings(sampling, fork.config),
        seeds % 10,
        seeds,
        state.tokens,
    )
    for cache, expected in zip(state.base.caches, given.caches):
        np.testing.assert_allclose(cache.keys, expected.keys, atol=1e-4)


def tiny_streams(predict, count):
    """Tokens 2 and 3 of `count` samples after given ones, of 4 codes in groups of 2, their log_q, and the 16 probabilities of
    the known stream."""
    config = TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=4, vocab_size=4, num_classes=2)
    model = module_of("block_diffusion").TwoStreams(config, largest=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros(1, int), jnp.zeros((1, 4), int))["params"]
    params = jax.tree.map(lambda leaf: 0.7 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), params)
    params["output"] *= 0.4
    tokenizer = Tokenizer(TokenizerConfig(image_size=8, channels=1, num_tokens=4, num_groups=2, num_denoising_steps=2))
    networks, settings = Networks(tokenizer, model), make_settings(SamplingConfig((1, 1)), tokenizer.config)
    arguments = networks, SamplerParams(Unstacked({}, ()), unstacked(params, jnp.float32)), settings
    labels, seeds, prefix = jnp.zeros(count, int), jnp.arange(count), jnp.tile(jnp.asarray([[1, 2]]), (count, 1))
    state = predict.begin(*arguments, labels, seeds, prefix)
    for group in range(2):
        state = predict.group(*arguments, state, group)
    every = jnp.stack([jnp.full(16, 1), jnp.full(16, 2), jnp.arange(16) // 4, jnp.arange(16) % 4], axis=1)
    bits, _ = score(model, params, labels[:16], every)
    return (
        np.asarray(state.tokens[:, 2] * 4 + state.tokens[:, 3]),
        state.log_q[:, 2:].sum(axis=1),
        2.0 ** -bits[:, 2:].sum(axis=1),
    )


def test_probabilities_of_chosen_places_are_those_of_the_draws():
    outcomes, log_q, _ = tiny_streams(module_of("unmasking").ascend.method.predict, 4000)
    found, first, counts = np.unique(outcomes, return_index=True, return_counts=True)
    assert len(found) == 16 and np.exp(log_q[first]).sum() == pytest.approx(1, abs=1e-4)
    shares = np.exp(np.asarray(log_q[first], np.float64))
    assert scipy.stats.chisquare(counts, 4000 * shares / shares.sum()).pvalue > 1e-4


def test_weights_make_independent_draws_the_joint_distribution():
    """The total variation to one by one falls with the number of candidates."""
    energy, variations = module_of("energy"), []
    for count in (1, 32):
        outcomes, _, expected = tiny_streams(energy.candidates(count).method.predict, 4000)
        variations.append(np.abs(np.bincount(outcomes, minlength=16) / 4000 - expected).sum() / 2)
    assert variations[0] > 0.08 and variations[1] < 0.2 * variations[0]
