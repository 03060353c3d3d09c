"""A transformer over the codes of `digits_tokenizer.py`, computed on the fly: the quickstart's, trained longer.

Command:  dar-jax train experiments/digits_ar.py --workdir runs/digits_ar --tokenizer runs/digits_tokenizer
Then:     dar-jax sample runs/digits_ar --labels 0,1,2,3,4,5,6,7,8,9 --seeds 1 --out samples
Time:     an estimate, about 6 minutes on two CPU cores.
Result:   not measured at this length; `dar-jax quickstart` prints what its own length gives.
"""

import dataclasses

from dar_jax.quickstart import DIGITS, TRANSFORMER
from dar_jax.training.experiment import Experiment

experiment = Experiment(
    dataclasses.replace(
        TRANSFORMER,
        name="digits_ar",
        data=DIGITS,
        train=dataclasses.replace(TRANSFORMER.train, steps=3000, checkpoint_every=1000, sample_every=1000),
    )
)
