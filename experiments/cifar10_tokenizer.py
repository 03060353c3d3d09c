"""A tokenizer of CIFAR-10 (32 x 32 pixels): 64 tokens in 8 groups, sized for one GPU; `small` for two CPU cores.

Command:  dar-jax train experiments/cifar10_tokenizer.py --workdir runs/cifar10_tokenizer --data.path DIR
          (DIR: the folder of the binary version of CIFAR-10: data_batch_1.bin ... test_batch.bin)
Time:     an estimate, not measured: about 25 minutes on an A100, from 21 GFLOP for each of 6 million images at 30 %
          of its bfloat16 peak.
Result:   not measured at this size. `small`, 35 minutes on two CPU cores: 15.6 dB, rFID 121 of 1,000 test
          images (docs/results.md).

Muon and the loss in units of the image, which ends as the paper's, are what helped on the digits (docs/results.md); the
learning rate is an estimate. Where the weights of LPIPS are at hand, add --loss.lpips 0.5.
"""

from dataclasses import replace

from dar_jax.config import (
    DataConfig,
    OptimizerConfig,
    TokenizerConfig,
    TokenizerLossConfig,
    TokenizerTraining,
    TrainConfig,
    VelocityConfig,
)
from dar_jax.experiment import Experiment

recipe = TokenizerTraining(
    name="cifar10_tokenizer",
    model=TokenizerConfig(
        image_size=32,
        encoder_patch_size=4,
        encoder_layers=6,
        encoder_width=384,
        decoder_layers=4,
        decoder_width=384,
        num_tokens=64,
        num_groups=8,
        max_tokens=64,
        codebook_size=4096,
        init_std=None,
        gate_init=1.0,
        velocity=VelocityConfig(width=384, layers=8, patch_size=4, repa_layer=None),
    ),
    loss=TokenizerLossConfig(entropy=0.02, flow_power=2.0, final_flow_power=0.0),
    data=DataConfig(source="cifar10", image_size=32, crop="center", flip=True),
    optimizer=OptimizerConfig(name="muon", learning_rate=1e-3, schedule="cosine", warmup_steps=500),
    train=TrainConfig(steps=25_000, batch_size=256, checkpoint_every=2500, sample_every=2500),
)
experiment = Experiment(recipe)
small = Experiment(
    replace(
        recipe,
        name="cifar10_tokenizer_small",
        model=replace(
            recipe.model,
            encoder_layers=2,
            encoder_width=192,
            decoder_layers=1,
            decoder_width=192,
            codebook_size=1024,
            velocity=replace(recipe.model.velocity, width=192, layers=4),
        ),
        optimizer=replace(recipe.optimizer, learning_rate=4e-3, warmup_steps=100, ema_decay=0.99),
        train=TrainConfig(steps=1200, batch_size=64, checkpoint_every=300, sample_every=0),
    )
)
