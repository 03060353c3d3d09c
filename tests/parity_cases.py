"""Reads the parity cases: configuration, deterministic weights, expected arrays."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dar_jax.config import TransformerConfig
from dar_jax.models.tokenizer import Tokenizer
from dar_jax.models.transformer import Llama
from dar_jax.release.names import tokenizer_entries, transformer_entries
from dar_jax.release.sizes import tokenizer_config
from dar_jax.weights.table import from_release


def load_rules(folder: Path):
    """The module that makes the weights and inputs of a folder of cases."""
    spec = importlib.util.spec_from_file_location("parity_rules", folder / "params.py")
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    return rules


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    info: dict
    expected: dict[str, np.ndarray]
    rules: object  # the module that makes weights and inputs
    compared: set[str] = dataclasses.field(default_factory=set)  # names of expected arrays that were looked at

    @classmethod
    def load(cls, folder: Path, name: str) -> "Case":
        with np.load(folder / f"{name}.npz") as arrays:
            expected = dict(arrays)
        return cls(name, json.loads((folder / f"{name}.json").read_text()), expected, load_rules(folder))

    @property
    def seed(self) -> int:
        return self.info["seed"]

    def tokenizer(self):
        """(model, parameters, table of names) of a tokenizer case."""
        model = Tokenizer(tokenizer_config(self.info["config"], self.info["image_size"]))
        images = jnp.zeros((1, *(model.config.image_size,) * 2, model.config.channels))
        return model, *self._params(model, tokenizer_entries(model.config), images)

    def inception(self) -> dict[str, np.ndarray]:
        """The tensors of Inception's file, by name."""

        def tensor(name: str, shape: list[int]) -> np.ndarray:
            x = self.rules.fill(self.seed, name, tuple(shape))
            if name.endswith("running_var"):
                return 1 + np.abs(x)
            return 1 + x if name.endswith("bn.weight") else x

        return {name: tensor(name, shape) for name, shape in self.info["parameters"].items()}

    def llama(self):
        """(model, parameters, table of names) of a transformer case."""
        config = self.info["config"]
        sizes = {"layers": config["n_layer"], "heads": config["n_head"], "kv_heads": config.get("n_kv_head")}
        sizes |= {"width": config["dim"], "num_tokens": config["block_size"]}
        sizes |= {name: config[name] for name in ("vocab_size", "num_classes")}
        model = Llama(TransformerConfig(**sizes))
        tokens = jnp.zeros((1, config["block_size"]), jnp.int32)
        return model, *self._params(model, transformer_entries(model.config), jnp.zeros(1, jnp.int32), tokens)

    def _params(self, model, entries, *inputs):
        abstract = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        tensors = {name: self.rules.fill(self.seed, name, tuple(shape)) for name, shape in self.info["parameters"].items()}
        return from_release(entries, tensors, abstract), entries

    def check(self, name: str, value, atol: float = 2e-4):
        """Compares a value in the release's layout with the stored slice of it. Full-size cases leave some values out."""
        if name not in self.expected:
            return
        self.compared.add(name)
        strides = self.info["strides"].get(name, [1] * np.ndim(value))
        value = np.asarray(value)[tuple(slice(None, None, step) for step in strides)]
        np.testing.assert_allclose(value, self.expected[name], rtol=0, atol=atol, err_msg=name)

    def check_relative(self, name: str, value, rtol: float = 1e-4, atol: float = 0.0):
        if name not in self.expected:
            return
        self.compared.add(name)
        np.testing.assert_allclose(np.asarray(value), self.expected[name], rtol=rtol, atol=atol, err_msg=name)

    def check_gradients(self, tensors: dict[str, np.ndarray]):
        """Gradient norms; those of key biases are zero but for rounding, hence the 1e-7."""
        self.check_relative("grad_norms", [np.linalg.norm(tensors[name]) for name in self.info["grad_names"]], atol=1e-7)
