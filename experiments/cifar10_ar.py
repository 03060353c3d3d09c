"""A transformer over the codes of `cifar10_tokenizer.py`, sized for one GPU; `small` for two CPU cores.

Command:  dar-jax train experiments/cifar10_ar.py --workdir runs/cifar10_ar --tokenizer runs/cifar10_tokenizer --data.path DIR
          (DIR: the folder of the binary version of CIFAR-10: data_batch_1.bin ... test_batch.bin)
          `small` takes stored codes: dar-jax tokenize RUN --data.path DIR --out CODES (RUN: cifar10_tokenizer.py:small), then
          dar-jax train experiments/cifar10_ar.py:small --workdir runs/small --tokenizer RUN --data.path CODES
Then:     dar-jax sample runs/cifar10_ar --labels cat,dog,ship --seeds 1,2,3 --out samples
Time:     an estimate, not measured: about 20 minutes on an A100, from 20 GFLOP for each of 5 million images at 30 % of
          its bfloat16 peak; both stages together stay below an hour.
Result:   not measured at this size. `small`, 9 minutes on two CPU cores: 2.12 bits a held-out code, FID 112 (1,000 samples;
          docs/results.md).
"""

from dataclasses import replace

from dar_jax.config import DataConfig, OptimizerConfig, SamplingConfig, TrainConfig, TransformerConfig, TransformerTraining
from dar_jax.experiment import Experiment

recipe = TransformerTraining(
    name="cifar10_ar",
    model=TransformerConfig(layers=12, heads=8, width=512, num_tokens=64, vocab_size=4096, num_classes=10),
    data=DataConfig(source="cifar10", image_size=32, crop="ten_crop", ten_crop_scale=1.1, flip=False),
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, schedule="cosine", warmup_steps=500, weight_decay=0.05),
    train=TrainConfig(steps=20_000, batch_size=256, checkpoint_every=2500, sample_every=2500),
    sampling=SamplingConfig(guidance=(1.1, 4.0)),
)
experiment = Experiment(recipe)
small = Experiment(
    replace(
        recipe,
        name="cifar10_ar_small",
        model=replace(recipe.model, layers=4, heads=3, width=192, vocab_size=1024),
        data=replace(recipe.data, source="codes", crop="none"),
        optimizer=replace(recipe.optimizer, learning_rate=4e-3, warmup_steps=100, ema_decay=0.99),
        train=TrainConfig(steps=1000, batch_size=64, checkpoint_every=300, sample_every=0),
    )
)
