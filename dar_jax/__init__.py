"""D-AR, diffusion via autoregressive models (arXiv 2505.23660), in JAX and Flax.

`dar_jax.load("runs/digits")` opens a checkpoint for sampling, encoding and scoring; see docs/api.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dar_jax.errors import InputError as InputError
    from dar_jax.inference.model import Model as Model
    from dar_jax.inference.model import load as load

__version__ = "0.2.0"
__all__ = ["InputError", "Model", "__version__", "load"]

_HOMES = {"InputError": "dar_jax.errors", "Model": "dar_jax.inference.model", "load": "dar_jax.inference.model"}


def __getattr__(name: str) -> Any:
    """Imports what needs JAX at first use, so that `import dar_jax` and the command's --help stay fast."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
