"""The paper's tokenizer of ImageNet at 256 x 256 pixels (section 3.2): 307,444,672 parameters, 256 tokens in 8 groups.

Command:  dar-jax train experiments/imagenet256_tokenizer.py --workdir runs/tokenizer --data.path IMAGENET
          (IMAGENET: a folder with one sub-folder of images per class, or with `train` and `val` that hold them)
          Kaggle's files: --data.path ILSVRC/Data/CLS-LOC --data.labels LOC_val_solution.csv
          TFDS, in its ArrayRecord format: --data.source tfds --data.dataset imagenet2012 --data.path DATA_DIR
Time:     published: about 5 days on 16 A100. Not measured here.
Memory:   compiled for 64 TPU v5e (16 GiB each), 16 images a chip: 10.0 GiB; with --train.remat dots it does not fit.
Needs:    the files of LPIPS and DINOv2, see docs/weights.md, or --loss.lpips 0 --loss.repa 0.
Result:   published: rFID 1.52 on the validation images. Not measured here.
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
        name="imagenet256_tokenizer",
        model=TokenizerConfig(
            image_size=256,
            encoder_patch_size=16,
            encoder_layers=8,
            encoder_width=768,
            decoder_layers=8,
            decoder_width=768,
            head_size=64,
            num_tokens=256,
            num_groups=8,
            num_denoising_steps=8,
            codebook_size=16384,
            code_dim=8,
            velocity=VelocityConfig(
                width=768, layers=12, head_size=64, patch_size=8, data_std=0.6, time_shift=2.0, repa_layer=8
            ),
        ),
        loss=TokenizerLossConfig(flow=1.0, codebook=1.0, commitment=0.25, lpips=0.5, repa=0.5),
        data=DataConfig(source="folder", image_size=256, crop="random", crop_fraction=(0.8, 1.0), flip=True, workers=8),
        optimizer=OptimizerConfig(
            learning_rate=2e-4, schedule="constant", warmup_steps=500, beta1=0.9, beta2=0.95, clip_norm=1.0, ema_decay=0.999
        ),
        train=TrainConfig(
            steps=210_000, batch_size=1024, dtype="bfloat16", remat="full", checkpoint_every=5000, sample_every=5000
        ),
    )
)
