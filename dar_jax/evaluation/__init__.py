"""What trained networks are used for: samples, reconstructions, stored codes, and the pictures of them."""
