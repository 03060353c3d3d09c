"""The quality of a checkpoint: metrics of samples, reconstructions and codes, and comparisons of sampling settings."""
