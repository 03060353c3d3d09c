"""The mesh and the table of shardings."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dar_jax import parallel
from dar_jax.config import MeshConfig, OptimizerConfig, SamplingConfig, TokenizerConfig, TransformerConfig, VelocityConfig
from dar_jax.errors import InputError
from dar_jax.features.dinov2 import Dinov2, Dinov2Config
from dar_jax.features.inception import Inception
from dar_jax.features.vgg_lpips import Lpips
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.parallel.batches import over_batches, row_slices, split_rows
from dar_jax.sampling import sampler
from dar_jax.sampling.predict import predict_group
from dar_jax.sampling.prepare import prepare
from dar_jax.sampling.settings import Networks, make_settings
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.state import abstract_state

TOKENIZERS = {
    "released": TokenizerConfig(),
    "shared time": TokenizerConfig(
        query_low_rank=False, vq_enable=False, velocity=VelocityConfig(share_time_encoding=True, mlp_head=True)
    ),
}
LLAMAS = {"L": TransformerConfig(), "grouped": TransformerConfig(heads=16, kv_heads=2)}


def full_state(model, *inputs, mesh):
    """The abstract training state of a full-size model, optimizer and EMA included."""

    def init():
        return model.init(jax.random.key(0), *inputs)["params"]

    return abstract_state(init, make_optimizer(OptimizerConfig(), 10), mesh)


def tokenizer_state(name, mesh):
    return full_state(Tokenizer(TOKENIZERS[name]), jnp.zeros((1, 256, 256, 3)), mesh=mesh)


def llama_state(name, mesh):
    return full_state(Llama(LLAMAS[name]), jnp.zeros(1, int), jnp.zeros((1, 256), int), mesh=mesh)


@pytest.mark.parametrize("make, name", [(tokenizer_state, n) for n in TOKENIZERS] + [(llama_state, n) for n in LLAMAS])
def test_every_array_of_the_real_models_has_a_place(make, name):
    """And the table leaves next to nothing uncut: eight fsdp devices hold little more than an eighth each."""
    state = make(name, parallel.make_mesh(MeshConfig(fsdp=8)))  # an unmatched path would raise
    leaves = jax.tree.leaves(state)
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    assert held / sum(leaf.size for leaf in leaves) < 1 / 8 + 0.005


def test_layout_over_fsdp_and_tensor():
    mesh = parallel.make_mesh(MeshConfig(1, 2, 4))
    state = tokenizer_state("released", mesh)
    mu = state.opt_state[1][0].mu
    for tree in (state.params, state.ema, mu):
        block = tree["velocity"]["blocks"]
        assert block["cross_attention"]["q"]["kernel"].sharding.spec == P(None, "fsdp", "tensor", None)
        assert block["attention"]["out"]["kernel"].sharding.spec == P(None, "tensor", None, "fsdp")
        assert block["mlp"]["in"]["kernel"].sharding.spec == P(None, "fsdp", "tensor")
        assert block["mlp"]["out"]["kernel"].sharding.spec == P(None, "tensor", "fsdp")
        assert block["attention"]["q_norm"]["scale"].sharding.spec == P(None, None)
    llama = llama_state("grouped", mesh).params
    # 2 key/value heads do not divide by 4, nor do 1001 classes: those axes are left out
    assert llama["blocks"]["attention"]["qkv"]["kernel"].sharding.spec == P(None, "fsdp", None, None, None)
    assert llama["blocks"]["mlp"]["gate_up"]["kernel"].sharding.spec == P(None, "fsdp", None, "tensor")
    assert llama["class_table"].sharding.spec == P(None, "fsdp")
    assert llama["output"].sharding.spec == P("fsdp", "tensor")


def test_caches_are_cut_by_batch_and_heads():
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    for batch, axes in ((8, ("data", "fsdp")), (1, None)):
        caches = jax.eval_shape(lambda batch=batch: Llama(TransformerConfig()).empty_caches(batch, 8))
        assert parallel.shardings(caches, mesh)[0].keys.spec == P(axes, "tensor", None, None)


def test_the_sampler_keeps_its_caches_as_the_table_says(tiny_tokenizer):
    tokenizer, params = tiny_tokenizer()
    model = Llama(TransformerConfig(layers=1, heads=2, width=16, mlp_multiple=8, num_tokens=16, vocab_size=64, num_classes=10))
    llama = jax.jit(model.init)(jax.random.key(0), jnp.zeros(1, int), jnp.zeros((1, 16), int))["params"]
    networks = Networks(tokenizer, model)
    settings = make_settings(SamplingConfig(guidance=(1.5, 3.0)), tokenizer.config)
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        weights = {"tokenizer": params, "transformer": llama}
        weights = prepare(networks, parallel.put(weights, parallel.shardings(weights, mesh)))
        labels, seeds = parallel.put((np.arange(8), np.arange(8)), parallel.batch_sharding(mesh))
        state = sampler.begin(networks, weights, settings, labels, seeds)
        prediction = predict_group(networks, weights, settings, state.prediction, 0)
    for caches in (prediction.caches, state.decoding.caches):
        places = parallel.shardings(caches, mesh)
        assert all(
            leaf.sharding.is_equivalent_to(place, leaf.ndim) and leaf.sharding.shard_shape(leaf.shape)[1] == leaf.shape[1] // 2
            for leaf, place in zip(jax.tree.leaves(caches), jax.tree.leaves(places), strict=True)
        )


def test_frozen_networks_have_places():
    """Transformers are cut like those that are trained, convolutions are whole everywhere."""
    mesh = parallel.make_mesh(MeshConfig(2, 2, 2))
    rgb = jnp.zeros((1, 32, 32, 3))
    networks = {"lpips": (Lpips(), rgb, rgb), "dinov2": (Dinov2(Dinov2Config()), rgb[:, :28, :28])}
    networks["inception"] = (Inception(True, "tensorflow1"), rgb.astype(jnp.uint8))
    shapes = {
        name: jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
        for name, (network, *inputs) in networks.items()
    }
    places = parallel.shardings(shapes, mesh)
    cut = {
        name: sum(leaf.size for leaf, place in zip(*map(jax.tree.leaves, (shapes[name], places[name]))) if any(place.spec))
        / sum(leaf.size for leaf in jax.tree.leaves(shapes[name]))
        for name in shapes
    }
    assert cut["lpips"] == cut["inception"] == 0 and cut["dinov2"] > 0.98


def test_unknown_path_is_an_error_until_a_rule_is_given():
    mesh = parallel.make_mesh(MeshConfig())
    tree = {"blocks": {"sink": jnp.zeros((2, 8, 8))}}
    with pytest.raises(InputError, match="blocks/sink"):
        parallel.shardings(tree, mesh)
    assert parallel.shardings(tree, mesh, rules=[("sink", P("data"))])["blocks"]["sink"].spec == P(None, None, "data")


def test_mesh_sizes(monkeypatch):
    assert dict(parallel.make_mesh(MeshConfig(-1, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert parallel.make_mesh(MeshConfig(2, 1, -1), jax.devices()[:6]).shape["tensor"] == 3
    for most, shape in ((16, (1, 8, 1)), (4, (2, 4, 1)), (3, (4, 2, 1))):  # at most so many, and a divisor of all
        monkeypatch.setattr(parallel.mesh, "MOST_PARTS", most)
        assert tuple(parallel.make_mesh(MeshConfig(-1, -1, 1)).shape.values()) == shape
    for sizes in ((-1, 1, -1), (-1, -1, 16), (3, 1, 1), (-1, 3, 1), (-1, 16, 1), (0, 1, 8)):
        with pytest.raises(InputError, match="mesh data x fsdp x tensor"):
            parallel.make_mesh(MeshConfig(*sizes))


def test_batches_are_padded_and_come_back_one_behind():
    mesh, events = parallel.make_mesh(MeshConfig()), []

    def batches():
        for rows, arguments in split_rows(row_slices(0, 19, 8), np.arange(19), None):
            events.append(f"read {rows.start}")
            yield rows, (*arguments, {"twice": 2 * arguments[0]})

    def function(numbers, nothing, tree):
        assert nothing is None and numbers.sharding == parallel.batch_sharding(mesh) and len(numbers) == 8
        assert jax.sharding.get_abstract_mesh().shape == mesh.shape
        return numbers + tree["twice"], None

    parts = []
    for rows, (tripled, nothing) in over_batches(function, batches(), 8, mesh):
        events.append(f"done {rows.start}")
        parts.append(tripled)
        assert nothing is None and len(tripled) == rows.stop - rows.start
        assert not jax.sharding.get_abstract_mesh().shape
    assert events == ["read 0", "read 8", "done 0", "read 16", "done 8", "done 16"]
    np.testing.assert_array_equal(np.concatenate(parts), 3 * np.arange(19))


def test_results_that_come_one_by_one():
    mesh = parallel.make_mesh(MeshConfig())

    def powers(numbers):
        for power in (1, 2, 3):
            assert jax.sharding.get_abstract_mesh().shape == mesh.shape
            yield numbers**power

    results = list(over_batches(powers, split_rows(row_slices(2, 12, 8), np.arange(12)), 8, mesh))
    assert [rows.start for rows, _ in results] == [2, 2, 2, 10, 10, 10]
    np.testing.assert_array_equal(results[-1][1], [1000, 1331])


@dataclasses.dataclass(frozen=True)
class Device:
    """As JAX tells of a GPU of one node of several, or of a TPU chip of a slice."""

    id: int
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    device_kind: str = "NVIDIA H100"
    platform: str = "gpu"
    core_on_chip: int = 0
    process_index: int = 0


def test_nodes_are_taken_apart_along_data_first():
    devices = [Device(number, number // 4) for number in range(16)]  # four nodes of four
    for sizes in ((4, 4, 1), (2, 8, 1), (1, 8, 2), (16, 1, 1)):
        found = parallel.arrange(sizes, devices)
        assert found.shape == sizes and {device.id for device in found.flat} == set(range(16))
        for neighbours in found.reshape(-1, 4):
            assert len({device.slice_index for device in neighbours}) == 1, sizes
    for sizes, nodes in (((2, 1, 3), 4), ((1, 1, 3), 2)):
        some = [Device(number, number % nodes) for number in range(math.prod(sizes))]
        with pytest.raises(InputError, match=r"cannot be split into slices or nodes of \d( \+ \d)+ devices"):
            parallel.arrange(sizes, some)


def test_an_axis_may_be_a_part_of_a_row_of_chips():
    """Which JAX refuses by default, but for TPU v5e."""
    chips = [
        Device(8 * row + column, coords=(column, row, 0), device_kind="TPU v6 lite", platform="tpu")
        for row in range(8)
        for column in range(8)
    ]
    assert len(set(parallel.arrange((4, 16, 1), chips).flat)) == 64
