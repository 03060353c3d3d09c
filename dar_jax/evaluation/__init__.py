"""How good a checkpoint is: images against images, codes, and what sampling settings change."""
