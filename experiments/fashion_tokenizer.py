"""A tokenizer of Fashion-MNIST (28 x 28 pixels, grey, 60,000 for training): 64 tokens in 8 groups, sized for two CPU cores.

Command:  dar-jax train experiments/fashion_tokenizer.py --workdir runs/fashion_tokenizer --data.path DIR
          (DIR: the folder of the four idx files, train-images-idx3-ubyte.gz and so on; Debian's package dataset-fashion-mnist
          has them in /usr/share/datasets/fashion-mnist)
Time:     14 to 17 minutes on two idle CPU cores.
Result:   held-out images are reconstructed with 19.2 dB, and 82.8 % of them are read as their class (originals: 91.2 %). Two
          steps are better than four in both, eight worse. See docs/results.md. `variants/perceptual.py:fashion` tunes the
          decoder in 5 minutes to a third less distance.
"""

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

experiment = Experiment(
    TokenizerTraining(
        name="fashion_tokenizer",
        model=TokenizerConfig(
            image_size=28,
            channels=1,
            encoder_patch_size=7,
            encoder_layers=1,
            encoder_width=128,
            decoder_layers=1,
            decoder_width=128,
            head_size=32,
            num_tokens=64,
            num_groups=8,
            num_denoising_steps=4,
            max_tokens=64,
            codebook_size=512,
            init_std=None,
            gate_init=1.0,
            velocity=VelocityConfig(width=128, layers=4, head_size=32, patch_size=7, repa_layer=None),
        ),
        loss=TokenizerLossConfig(entropy=0.02, flow_power=2.0),
        data=DataConfig(source="idx", dataset="fashion-mnist", image_size=28, channels=1, crop="none", flip=False),
        optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, schedule="cosine", warmup_steps=100, ema_decay=0.99),
        train=TrainConfig(steps=1800, batch_size=64, checkpoint_every=600, sample_every=600),
    )
)
