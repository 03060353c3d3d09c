"""A tokenizer of the handwritten digits (8 x 8 pixels, 1,500 of them for training): the quickstart's, trained longer.

Command:  dar-jax train experiments/digits_tokenizer.py --workdir runs/digits_tokenizer
Time:     an estimate, about 6 minutes on two CPU cores; the quickstart's 2,500 steps were measured to take 139 s.
Result:   not measured at this length. The quickstart's 2,500 steps reconstruct held-out digits with 18.8 dB.
"""

import dataclasses

from dar_jax.experiment import Experiment
from dar_jax.quickstart import TOKENIZER

experiment = Experiment(
    dataclasses.replace(
        TOKENIZER, train=dataclasses.replace(TOKENIZER.train, steps=3000, checkpoint_every=1000, sample_every=1000)
    )
)
