"""`python -m dar_jax` is the command `dar-jax`."""

import sys

from dar_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
