"""D-AR, diffusion via autoregressive models (arXiv 2505.23660), in JAX and Flax."""

__version__ = "0.1.0"
