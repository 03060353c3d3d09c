"""The command `dar-jax`."""
