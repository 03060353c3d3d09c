"""The frozen feature networks: the numbers of their PyTorch originals, and the names of their published files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from parity_cases import Case

from dar_jax.errors import InputError
from dar_jax.features.dinov2 import Dinov2, Dinov2Config, preprocess, resize_positions
from dar_jax.features.inception import Inception
from dar_jax.features.load import load_dinov2, load_inception, load_lpips
from dar_jax.features.names import (
    DINOV2_UNUSED,
    INCEPTION_UNUSED,
    LPIPS_UNUSED,
    canonical_inception,
    canonical_lpips,
    dinov2_entries,
    inception_entries,
    lpips_entries,
)
from dar_jax.features.vgg_lpips import Lpips, of_small_map, unit
from dar_jax.models.pixels import resize_bilinear
from dar_jax.weights import torch_file
from dar_jax.weights.table import from_release, to_release


def pytest_generate_tests(metafunc):
    for network in ("lpips", "dinov2", "inception"):
        if f"{network}_name" in metafunc.fixturenames:
            files = metafunc.config.getoption("--golden").glob(f"{network}*.json")
            metafunc.parametrize(f"{network}_name", sorted(file.stem for file in files), scope="module")


def nhwc(x):
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def images_of(case, name="images"):
    return nhwc(case.rules.smooth_images(case.seed, name, case.info["batch"], case.info["image_size"]))


def tensors_of(case, change=lambda name, x: x):
    shapes = case.info["parameters"].items()
    return {name: change(name, case.rules.fill(case.seed, name, tuple(shape))) for name, shape in shapes}


def converted(model, entries, tensors, unused, *inputs):
    """The parameters, after checking that they give every used tensor back bit by bit."""
    params = from_release(entries, tensors, jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"], unused)
    back = to_release(entries, params)
    assert set(tensors) - set(back) <= {"mask_token", "fc.bias"}
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, tensors[name], err_msg=name)
    return params


def check(case, name, value, tolerance=1e-4):
    """Largest error, relative to the root mean square of what is expected."""
    case.check(name, value, atol=tolerance * np.sqrt(np.mean(np.square(case.expected[name]))))


@pytest.fixture(scope="module")
def lpips(golden, lpips_name):
    case = Case.load(golden, lpips_name)
    tensors = tensors_of(case, lambda name, x: np.abs(x) if name.startswith("lin") else x)
    images = images_of(case, "a")
    return case, tensors, converted(Lpips(), lpips_entries(), tensors, LPIPS_UNUSED, images, images)


def test_lpips(lpips):
    case, _, params = lpips
    images, others = images_of(case, "a"), images_of(case, "b")
    distance = jax.jit(Lpips().apply)
    check(case, "distance", distance({"params": params}, images, others))
    assert case.compared == set(case.expected)
    np.testing.assert_array_equal(distance({"params": params}, images, images), 0)


def test_lpips_has_gradients_where_features_or_differences_are_zero(lpips):
    params, images = lpips[2], jax.random.uniform(jax.random.key(0), (1, 16, 16, 3))
    gradients = jax.jit(jax.grad(lambda x, y, params: Lpips().apply({"params": params}, x, y).sum(), argnums=(0, 1)))
    without_features = jax.tree.map(np.zeros_like, params)
    for pair, weights in (((images, images), params), ((images, -images), without_features)):
        for gradient in gradients(*pair, weights):
            np.testing.assert_array_equal(gradient, 0)  # a NaN would not be
    for gradient in gradients(images, -images, params):
        assert np.isfinite(gradient).all() and np.any(gradient)
    np.testing.assert_array_equal(jax.grad(lambda x: unit(x).sum())(jnp.zeros((2, 3))), 0)


@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (1, 4)])
def test_convolutions_of_maps_smaller_than_the_kernel(height, width):
    x = jax.random.normal(jax.random.key(0), (2, height, width, 3))
    module = nn.Conv(5, (3, 3), precision="highest")
    params = module.init(jax.random.key(1), x)
    ours = module.copy(conv_general_dilated=of_small_map).apply(params, x)
    np.testing.assert_allclose(ours, module.apply(params, x), atol=1e-5)


def test_lpips_of_small_images_is_refused():
    with pytest.raises(InputError, match="at least 16 pixels, these have 32x15"):
        jax.eval_shape(Lpips().init, jax.random.key(0), jnp.zeros((1, 32, 15, 3)), jnp.zeros((1, 32, 15, 3)))


def test_lpips_files(lpips, tmp_path):
    """One file in either naming, or torchvision's network (with its classifier) and the heads apart."""
    _, tensors, _ = lpips
    heads = {name: x for name, x in tensors.items() if name.startswith("lin")}
    network = {name: x for name, x in tensors.items() if name not in heads}
    torchvision = {f"features.{name.split('.', 2)[2]}": x for name, x in network.items()}
    assert "features.28.bias" in torchvision
    linen = {"VGG16_0": {f"Conv_{i}": {} for i in range(13)}}
    for index, layer in enumerate([0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]):
        layer = {"kernel": torchvision[f"features.{layer}.weight"], "bias": torchvision[f"features.{layer}.bias"]}
        linen["VGG16_0"][f"Conv_{index}"] = layer | {"kernel": layer["kernel"].transpose(2, 3, 1, 0)}
    for index in range(5):
        linen[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": heads[f"lin{index}.model.1.weight"].transpose(2, 3, 1, 0)}}
    classifier = {"classifier.6.bias": np.zeros(1000, np.float32)}
    files = {"whole": tensors, "vgg16": torchvision | classifier, "heads": heads, "linen": linen}
    for name, contents in files.items():
        torch_file.write(tmp_path / name, contents)
    whole = traverse_util.flatten_dict(load_lpips(tmp_path / "whole"))
    for paths in (["vgg16", "heads"], ["linen"]):
        loaded = traverse_util.flatten_dict(load_lpips(*(tmp_path / path for path in paths)))
        assert set(loaded) == set(whole)
        for path, x in whole.items():
            np.testing.assert_array_equal(loaded[path], x)
    with pytest.raises(InputError, match=r"vgg16 cannot be used as LPIPS with VGG16: .* 5 missing \(lin0.model.1.weight"):
        load_lpips(tmp_path / "vgg16")


def test_dinov2(golden, dinov2_name):
    case = Case.load(golden, dinov2_name)
    images = preprocess(images_of(case))
    check(case, "preprocessed", nchw(images))
    model = Dinov2(Dinov2Config())
    params = converted(model, dinov2_entries(model.config), tensors_of(case), DINOV2_UNUSED, images)
    check(case, "patch_tokens", jax.jit(model.apply)({"params": params}, images))
    assert case.compared == set(case.expected)


@pytest.fixture(scope="module")
def tiny_dinov2():
    config = Dinov2Config(width=16, layers=3, heads=2, patch_size=4, table_side=3)
    images = jax.random.normal(jax.random.key(0), (2, 8, 20, 3))
    shapes = jax.eval_shape(Dinov2(config).init, jax.random.key(1), images)["params"]
    random = np.random.default_rng(0)
    return config, jax.tree.map(lambda x: random.normal(0, 0.25, x.shape).astype(np.float32), shapes), images


def test_dinov2_of_other_sizes(tiny_dinov2):
    config, params, images = tiny_dinov2
    tokens, narrow = (Dinov2(config, dtype).apply({"params": params}, images) for dtype in (jnp.float32, jnp.bfloat16))
    assert tokens.shape == (2, 10, 16) and narrow.dtype == jnp.float32
    assert 0 < float(jnp.std(tokens - narrow)) < 0.05 * float(jnp.std(tokens))
    table = params["position_table"][1:]
    assert resize_positions(table, 3, 3, 3) is table


def test_dinov2_file(tiny_dinov2, tmp_path):
    config, params, _ = tiny_dinov2
    tensors = to_release(dinov2_entries(config), params)
    torch_file.write(tmp_path / "file", tensors | {"mask_token": np.zeros((1, 16), np.float32)})
    for path, x in traverse_util.flatten_dict(load_dinov2(tmp_path / "file", config)).items():
        np.testing.assert_array_equal(x, traverse_util.flatten_dict(params)[path], err_msg=str(path))
    torch_file.write(tmp_path / "registers", tensors | {"register_tokens": np.zeros((1, 4, 16), np.float32)})
    with pytest.raises(InputError, match="registers cannot be used as DINOv2: .* 1 left over .register_tokens"):
        load_dinov2(tmp_path / "registers", config)


def test_preprocess_at_another_resolution():
    white = preprocess(jnp.ones((1, 64, 40, 3)), 28)
    assert white.shape == (1, 28, 28, 3)
    np.testing.assert_allclose(white[0, 5, 27], [2.2489, 2.4286, 2.64], atol=1e-4)


def test_inception(golden, inception_name):
    case = Case.load(golden, inception_name)
    images = jnp.floor(127.5 * (images_of(case) + 1)).astype(jnp.uint8)
    model = Inception(classifier=True)
    params = converted(model, inception_entries(True), case.inception(), INCEPTION_UNUSED, images)
    features = jax.jit(model.apply)({"params": params}, images)
    check(case, "pool", features.pool)
    check(case, "mixed_6_conv", nchw(features.spatial), tolerance=1e-5)  # 1e-4 would not tell the conventions of resizing apart
    check(case, "logits_without_bias", features.logits)
    assert case.compared == set(case.expected)


def test_inception_without_classifier():
    features, variables = jax.eval_shape(Inception(False).init_with_output, jax.random.key(0), jnp.zeros((3, 32, 20, 3)))
    assert features.logits is None and features.pool.shape == (3, 2048) and features.spatial.shape == (3, 17, 17, 7)
    paths = traverse_util.flatten_dict(variables["params"], sep="/")
    assert {entry.ours for entry in inception_entries(False)} == set(paths)


@pytest.mark.parametrize(("convention", "expected"), [("tensorflow1", [0, 5, 10, 10]), ("half_pixel", [0, 2.5, 7.5, 10])])
def test_resize_bilinear(convention, expected):
    images = jnp.array([[0.0, 10], [20, 30]]).reshape(1, 2, 2, 1)
    resized = resize_bilinear(images, 2, 4, convention)
    np.testing.assert_array_equal(resized[0, :, :, 0], [expected, np.add(expected, 20)])
    np.testing.assert_array_equal(resize_bilinear(images, 4, 2, convention)[0, :, 0, 0], 2 * np.array(expected))


def test_names_of_tensorflow(tmp_path):
    pairs = {
        "conv": "Conv2d_1a_3x3",
        "conv_4": "Conv2d_4a_3x3",
        "mixed.conv": "Mixed_5b.branch1x1",
        "mixed_2.tower.conv_1": "Mixed_5d.branch5x5_2",
        "mixed_1.tower_2.conv": "Mixed_5c.branch_pool",
        "mixed_3.conv": "Mixed_6a.branch3x3",
        "mixed_3.tower.conv": "Mixed_6a.branch3x3dbl_1",
        "mixed_7.tower.conv_2": "Mixed_6e.branch7x7_3",
        "mixed_4.tower_1.conv_4": "Mixed_6b.branch7x7dbl_5",
        "mixed_8.tower.conv_1": "Mixed_7a.branch3x3_2",
        "mixed_8.tower_1.conv_3": "Mixed_7a.branch7x7x3_4",
        "mixed_9.tower_conv": "Mixed_7b.branch3x3_1",
        "mixed_9.tower_mixed_conv_1": "Mixed_7b.branch3x3_2b",
        "mixed_10.tower_1_mixed_conv": "Mixed_7c.branch3x3dbl_3a",
        "mixed_10.tower_2_conv": "Mixed_7c.branch_pool",
    }
    leaves = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
    tensors = {f"net.layers.{name}.{leaf}": np.full(2, i) for i, name in enumerate(pairs) for leaf in leaves}
    canonical = canonical_inception(tensors)
    for i, name in enumerate(pairs.values()):
        for leaf in leaves.values():
            np.testing.assert_array_equal(canonical.pop(f"{name}.{leaf}"), i)
        np.testing.assert_array_equal(canonical.pop(f"{name}.bn.weight"), 1)
    assert not canonical
    assert canonical_inception({"net.layers.mixed_9.tower.conv.weight": 0}) == {"net.layers.mixed_9.tower.conv.weight": 0}
    torch_file.write(tmp_path / "part", tensors)
    with pytest.raises(InputError, match="part cannot be used as FID Inception: .* missing"):
        load_inception(tmp_path / "part")


def test_layers_without_end_keep_their_names():
    tensors = {name.format("9" * 5000): np.zeros(2) for name in ("features.{}.bias", "VGG16_0.Conv_{}.bias")}
    assert canonical_lpips(tensors) == tensors


@pytest.mark.parametrize("contents", [[np.zeros(2)], {"epoch": 3}])
def test_what_holds_no_weights_is_refused(tmp_path, contents):
    torch_file.write(tmp_path / "file", contents)
    for load in (load_lpips, load_inception, lambda path: load_dinov2(path, Dinov2Config())):
        with pytest.raises(InputError, match="file is no file of weights"):
            load(tmp_path / "file")
