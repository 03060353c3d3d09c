"""A checkpoint in use: samples, reconstructions, stored codes, and pictures of them."""
