"""Files of the release: the numbers they give, what they become when written again, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from parity_cases import load_rules

from dar_jax import parallel
from dar_jax.cli.main import main
from dar_jax.config import SamplingConfig, TokenizerTraining
from dar_jax.errors import InputError
from dar_jax.inference.trained import load_sampler, load_tokenizer
from dar_jax.release.checkpoints import export_checkpoint, import_checkpoint, open_start, read_checkpoint
from dar_jax.release.names import tokenizer_entries
from dar_jax.sampling.sampler import decode, generate
from dar_jax.sampling.settings import make_settings
from dar_jax.training import checkpoint
from dar_jax.training.optimizer import make_optimizer
from dar_jax.training.state import abstract_state
from dar_jax.weights import torch_file
from dar_jax.weights.table import from_release

GREEDY = SamplingConfig(guidance=(4.0, 4.0), temperature=0.0)


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def files():
    """The small tokenizer's and transformer's file."""
    return GOLDEN / "tokenizer_checkpoint.pt", GOLDEN / "ar_checkpoint.pt"


@pytest.fixture(scope="module")
def imported(files, tmp_path_factory):
    """A transformer's folder with its tokenizer, both imported."""
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_checkpoint(files[1], folder, tokenizer=files[0])
    return folder


@pytest.fixture(scope="module")
def parity(golden, tmp_path_factory):
    """(what was imported from the folder of parity cases, expected values by kind, what makes inputs)."""
    paths = [golden / f"{kind}_checkpoint.pt" for kind in ("tokenizer", "ar")]
    if not all(path.exists() for path in paths):
        pytest.skip("this folder holds no checkpoints")
    expected = {path.stem: dict(np.load(path.with_suffix(".npz"))) for path in paths}
    seed, rules = json.loads((golden / "checkpoints.json").read_text())["seed"], load_rules(golden)
    folder = tmp_path_factory.mktemp("parity") / "run"
    import_checkpoint(paths[1], folder, tokenizer=paths[0])
    return folder, expected, lambda name, *arguments: getattr(rules, name)(seed, *arguments)


def plain(tensors):
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in tensors.items()}


def assert_same(tensors, others):
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype, name
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)


def test_an_imported_tokenizer_gives_the_stored_numbers(parity):
    folder, expected, inputs = parity
    trained = load_tokenizer(folder)
    config = trained.config
    batch = len(expected["tokenizer_checkpoint"]["codes"])
    images = inputs("smooth_images", "images", batch, config.image_size).transpose(0, 2, 3, 1)
    noise = inputs("noise", "x0", (batch, 3, config.resolution, config.resolution)).transpose(0, 2, 3, 1)
    model, params = trained.networks.tokenizer, trained.params["tokenizer"]
    quantized = model.apply({"params": params}, jnp.asarray(images), method=lambda m, x: m.quantize(m.encode(x)))
    np.testing.assert_array_equal(quantized.codes, expected["tokenizer_checkpoint"]["codes"])
    settings = make_settings(SamplingConfig(), config)
    decoded = decode(
        trained.networks, trained.params, settings, quantized.values, jnp.arange(batch), noise=jnp.asarray(noise)
    ).images
    stored = expected["tokenizer_checkpoint"]["decoded"]
    step = -(-config.resolution // stored.shape[-1])
    np.testing.assert_allclose(np.asarray(decoded).transpose(0, 3, 1, 2)[:, :, ::step, ::step], stored, rtol=0, atol=2e-4)


def test_an_imported_transformer_gives_the_stored_tokens(parity):
    expected = parity[1]["ar_checkpoint"]
    trained = load_sampler(parity[0])
    settings = make_settings(GREEDY, trained.config)
    labels = jnp.asarray(expected["labels"])
    samples = generate(trained.networks, trained.params, settings, labels, jnp.arange(len(labels)))
    np.testing.assert_array_equal(samples.tokens, expected["greedy_cfg4"])


def test_export_of_an_import_is_identical(files, imported, tmp_path):
    original = torch_file.read(files[0])
    export_checkpoint(imported / "tokenizer", tmp_path / "tokenizer.pt")
    exported = torch_file.read(tmp_path / "tokenizer.pt")
    for part in ("model", "ema"):
        added = exported[part].keys() - original[part].keys()
        assert all(name.startswith("diff_decoder.net.repa_out.") for name in added) and len(added) == 6
        assert_same(original[part], {name: tensor for name, tensor in exported[part].items() if name not in added})
    told = original["config"]["_data"]["model"]
    assert {name: exported["config"]["model"][name] for name in told if name != "diff_decoder"}.items() <= told.items()
    assert exported["steps"] == original["steps"]

    original = torch_file.read(files[1])
    export_checkpoint(imported, tmp_path / "ar.pt")
    assert_same(plain(original["model"]), torch_file.read(tmp_path / "ar.pt")["model"])
    export_checkpoint(imported, tmp_path / "ar.safetensors", "safetensors")
    again = read_checkpoint(tmp_path / "ar.safetensors")
    assert again.step == original["steps"]
    jax.tree.map(np.testing.assert_array_equal, again.ema, read_checkpoint(files[1]).ema)


def test_models_of_ones_own_are_exported_with_a_word_of_warning(tiny_run, tmp_path):
    notes = export_checkpoint(tiny_run / "tokenizer", tmp_path / "file.pt")
    assert "channels 1 (there 3), head size 8 (there 64)" in notes[-1]
    params = checkpoint.load(tiny_run / "tokenizer").params
    config = checkpoint.inspect(tiny_run / "tokenizer").config.model
    tensors = torch_file.read(tmp_path / "file.pt")["model"]
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    unused = r"quantize\.codebook_used|diff_decoder\.net\.repa_out\..*"
    jax.tree.map(np.testing.assert_array_equal, from_release(tokenizer_entries(config), tensors, abstract, unused), params)
    export_checkpoint(tiny_run, tmp_path / "ar.pt")
    again = read_checkpoint(tmp_path / "ar.pt", heads=2)
    jax.tree.map(np.testing.assert_array_equal, again.ema, jax.device_get(checkpoint.load(tiny_run).params))


def test_every_form_of_a_file_gives_the_same(files, tmp_path):
    contents = torch_file.read(files[0])
    wanted, path = read_checkpoint(files[0]), tmp_path / "0001234.pt"
    bare = contents["ema"]
    told = {"config": contents["config"], "args": {"image_size": wanted.config.data.image_size}}
    tokens = {"num_all_queries": 256, "num_query_groups": 8, "num_denoising_steps": 8}  # nobody says otherwise
    for form, exact in [
        ({"ema": bare, "steps": 1234, **told}, True),
        ({"module": {f"module._orig_mod.{name}": tensor for name, tensor in bare.items()}, **told}, True),
        ({"state_dict": {name: tensor for name, tensor in bare.items() if "codebook_used" not in name}, **told}, True),
        ({"model": {"junk": bare["patchify.weight"]}, "ema": bare, **told}, None),
        (bare, False),
    ]:
        torch_file.write(path, form)
        if exact is None:  # the trained weights are looked at too
            with pytest.raises(InputError, match="left over .junk"):
                read_checkpoint(path)
            continue
        found = read_checkpoint(path)
        assert found.step == 1234
        jax.tree.map(np.testing.assert_array_equal, found.ema, wanted.ema)
        name = found.config.name
        if exact:
            assert dataclasses.replace(found.config, name=name) == dataclasses.replace(wanted.config, name=name)
        else:
            assert found.config.model.num_tokens == tokens["num_all_queries"] and "no configuration" in str(found.notes)
            assert found.config.model.encoder_width == wanted.config.model.encoder_width

    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in bare.items()}
    torch_file.write(path, {"ema": half, **told})
    found = read_checkpoint(path)
    assert any("bfloat16" in note for note in found.notes)
    for leaf, close in zip(jax.tree.leaves(found.ema), jax.tree.leaves(wanted.ema)):
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, close, rtol=2**-8)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_optimizer_is_taken(files, imported, tmp_path, groups):
    contents = torch_file.read(files[1])
    names = list(contents["model"])
    order = names if groups == 1 else sorted(names, key=lambda name: contents["model"][name].ndim < 2)
    weights = contents["model"]
    state = {
        number: {"step": np.array(7.0, np.float32), "exp_avg": weights[name] * 2, "exp_avg_sq": weights[name] ** 2}
        for number, name in enumerate(order)
    }
    cut = len(names) if groups == 1 else sum(contents["model"][name].ndim > 1 for name in names)
    numbers = [list(range(cut)), list(range(cut, len(names)))][:groups]
    optimizer = {"state": state, "param_groups": [{"lr": 1e-4, "params": group} for group in numbers]}
    torch_file.write(tmp_path / "file.pt", contents | {"optimizer": optimizer})
    assert "with the optimizer" in import_checkpoint(tmp_path / "file.pt", tmp_path / "run")[0]

    loaded = checkpoint.load(tmp_path / "run")
    config, model = loaded.info.config, loaded.experiment.build_model()
    target = abstract_state(
        lambda: loaded.experiment.init_params(model), make_optimizer(config.optimizer, 10), parallel.make_mesh(config.mesh)
    )
    found = checkpoint.restore(tmp_path / "run", target)
    adam = next(part for part in found.opt_state[1] if isinstance(part, optax.ScaleByAdamState))
    jax.tree.map(lambda mu, nu, w: np.testing.assert_array_equal((mu, nu), (2 * w, w**2)), adam.mu, adam.nu, found.params)
    assert adam.count == 7

    del state[3]["exp_avg"]
    for groups, reason in ((optimizer["param_groups"], "lacks exp_avg"), ([{"params": 5}], "has 0 parameters")):
        torch_file.write(tmp_path / "file.pt", contents | {"optimizer": {"state": state, "param_groups": groups}})
        assert f"does not fit its weights, it {reason}" in str(read_checkpoint(tmp_path / "file.pt").notes)


def test_a_repa_head_is_taken_with_its_sizes(files, imported, tmp_path):
    export_checkpoint(imported / "tokenizer", tmp_path / "whole.pt")
    velocity = read_checkpoint(tmp_path / "whole.pt").config.model.velocity
    assert (velocity.repa_layer, velocity.repa_hidden, velocity.repa_width) == (8, 2048, 768)
    with_head = import_checkpoint(tmp_path / "whole.pt", tmp_path / "run")
    assert "REPA" not in " ".join(with_head)
    assert "repa" in checkpoint.load(tmp_path / "run").params["velocity"]


def changed(contents, part, name, value):
    """The contents of a file with one tensor or setting replaced (None: removed)."""
    table = {key: item for key, item in contents[part].items() if key != name}
    return {**contents, part: table if value is None else {**table, name: value}}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda c: changed(c, "ema", "extra.weight", np.ones((2, 2), np.float32)), "1 left over .extra.weight"),
        (lambda c: changed(c, "ema", "encoder_layers.0.gate1", None), "1 missing .encoder_layers.0.gate1"),
        (lambda c: changed(c, "ema", "encoder_layers.0.gate1", np.ones(3, np.float32)), r"gate1 has the shape \(3,\)"),
        (lambda c: changed(c, "ema", "encoder_layers.0.gate1", np.ones(64, np.int64)), "holds int64"),
        (
            lambda c: changed(c, "ema", "encoder_layers.7.gate1", np.ones(64, np.float32)),
            "layer 2 is missing, where 3 layers have names",
        ),
        (lambda c: changed(c, "ema", "encoder_layers.60000000.gate1", np.ones(64, np.float32)), "layer 2 is missing"),
        (lambda c: changed(c, "ema", f"encoder_layers.{'9' * 5000}.gate1", np.ones(64, np.float32)), "layer 2 is missing"),
        (lambda c: changed(c, "ema", "9" * 5000, np.ones(64, np.float32)), "1 left over .999"),
        (lambda c: changed(c, "ema", "decoder_embedding.weight", None), "decoder_embedding.weight is missing"),
        (lambda c: changed(c, "ema", "quantize.embedding.weight", np.zeros((), np.float32)), r"has the shape \(\)"),
        (lambda c: changed(c, "config", "model", {**c["config"]["model"], "diff_decoder": [1]}), "no sizes in 'diff_decoder'"),
        (lambda c: changed(c, "ema", "patchify.weight", None), "neither a tokenizer nor a transformer"),
        (lambda c: changed(c, "ema", "patchify.weight", np.ones(5, np.float32)), "patchify.weight has the shape"),
        (lambda c: changed(c, "ema", "note", "text"), "'note' is no tensor"),
        (lambda c: changed(c, "config", "model", {**c["config"]["model"], "encoder_dim": 128}), "says encoder_dim is 128"),
        (
            lambda c: changed(c, "config", "model", {**c["config"]["model"], "num_all_queries": 10**9}),
            "model.num_tokens is 1000000000, it should be between",
        ),
        (
            lambda c: changed(c, "config", "model", {**c["config"]["model"], "num_query_groups": [1]}),
            "num_groups should be int",
        ),
        (lambda c: {**c, "ema": [1, 2]}, "holds no weights by name"),
        (lambda c: [1, 2], "holds no weights by name"),
    ],
)
def test_unfit_files_are_refused_in_one_line(files, tmp_path, capsys, change, complaint):
    contents = {**torch_file.read(files[0])}
    contents["config"] = contents["config"]["_data"]
    torch_file.write(tmp_path / "file.pt", change(contents))
    with pytest.raises(InputError, match=complaint):
        import_checkpoint(tmp_path / "file.pt", tmp_path / "run")
    assert main(["import", str(tmp_path / "file.pt"), "--workdir", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and not out and not (tmp_path / "run").exists()


def test_sizes_that_no_memory_holds_are_refused(files, tmp_path):
    contents = torch_file.read(files[1])
    model = plain(contents["model"])
    classes, codes = (f"{name}.weight" for name in ("cls_embedding.embedding_table", "tok_embeddings"))
    model |= {name: np.zeros((2, 1 << 16), np.float16) for name in (classes, codes)}
    model |= {f"layers.{layer}.attention.wqkv.weight": np.zeros((3 << 16, 1), np.float16) for layer in range(2)}
    torch_file.write(tmp_path / "file.pt", {"model": model})
    with pytest.raises(InputError, match="the tensors hold .* numbers, the model takes"):
        read_checkpoint(tmp_path / "file.pt", heads=1)


def test_what_does_not_fit_together_is_refused(files, imported, tmp_path):
    tokenizer, transformer = files
    with pytest.raises(InputError, match="already holds a run"):
        import_checkpoint(transformer, imported)
    with pytest.raises(InputError, match="is a transformer, not a tokenizer"):
        import_checkpoint(transformer, tmp_path / "run", tokenizer=transformer)
    with pytest.raises(InputError, match="--tokenizer is for transformers"):
        import_checkpoint(tokenizer, tmp_path / "run", tokenizer=tokenizer)
    for heads in (7, 0):
        with pytest.raises(InputError, match=f"not that of {heads} heads"):
            import_checkpoint(transformer, tmp_path / "run", heads=heads)
    with pytest.raises(InputError, match="it is a folder"):
        export_checkpoint(imported, tmp_path)
    contents = torch_file.read(transformer)
    table = "_orig_mod.tok_embeddings.weight"
    for name in (table, "_orig_mod.output.weight"):
        contents = changed(contents, "model", name, contents["model"][name][:100])
    torch_file.write(tmp_path / "other.pt", contents)
    with pytest.raises(InputError, match="predicts 100 codes, the tokenizer has 256"):
        import_checkpoint(tmp_path / "other.pt", tmp_path / "run", tokenizer=tokenizer)
    with pytest.raises(InputError, match="different stages"):
        open_start(transformer, TokenizerTraining())
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match="no safetensors file"):
        read_checkpoint(tmp_path / "cut.safetensors")
    assert not (tmp_path / "run").exists()


def test_a_transformer_finds_the_tokenizer_in_its_folder(files, tmp_path):
    import_checkpoint(files[1], tmp_path / "alone")
    with pytest.raises(InputError, match="lacks its tokenizer"):
        load_sampler(tmp_path / "alone")
    import_checkpoint(files[0], tmp_path / "run" / "tokenizer")
    import_checkpoint(files[1], tmp_path / "run")
    assert load_sampler(tmp_path / "run").networks.transformer.config.num_tokens == 16
