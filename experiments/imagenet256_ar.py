"""The paper's transformers for ImageNet at 256 x 256 pixels (section 3.3): `l`, `xl` and `xxl`.

Command:  dar-jax train experiments/imagenet256_ar.py:l --workdir runs/ar_l --tokenizer runs/tokenizer --data.path IMAGENET
          (runs/tokenizer: of imagenet256_tokenizer.py; IMAGENET: a folder with one sub-folder of images per class, or with
          `train` and `val` that hold them; for TFDS and Kaggle's files see imagenet256_tokenizer.py)
          Codes are computed within the training step. To compute them once and for all, ten crops of each image, 6.7 GB:
          dar-jax tokenize runs/tokenizer --data.path IMAGENET --out codes/train
          dar-jax tokenize runs/tokenizer --data.path IMAGENET --data.split val --out codes/val
          and train with --data.source codes --data.path codes --data.held-out-split val.
Time:     published: L 2 days, XL 3 days on 16 A100. Not measured here.
Memory:   the step on stored codes, compiled for 64 TPU v5e (16 GiB each): L 4.0 GiB a chip (10.2 without remat, which a
          compiler's plan makes slower), XL 7.3, XXL 11.3; the state is sharded over up to 16 devices.
Result:   published (50,000 samples):
          L    342,910,976 parameters: FID 7.43 without guidance; 1.1 -> 8: FID 2.44, IS 263.0, precision .78, recall .61
          XL   774,699,520 parameters: FID 5.11 without guidance; 1.1 -> 10: FID 2.09, IS 298.4, precision .79, recall .62
          XXL  1,410,972,672 parameters: FID 2.00, IS 300.6 with guidance
"""

from dar_jax.config import (
    TRANSFORMER_SIZES,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    SamplingConfig,
    TrainConfig,
    TransformerConfig,
    TransformerTraining,
)
from dar_jax.experiment import Experiment


def recipe(size: str, last_guidance: float) -> Experiment:
    """The recipe of one size, with its published guidance."""
    return Experiment(
        TransformerTraining(
            name=f"imagenet256_ar_{size.lower()}",
            model=TransformerConfig(
                **TRANSFORMER_SIZES[size],
                num_tokens=256,
                vocab_size=16384,
                num_classes=1000,
                token_dropout=0.1,
                attention_dropout=0.1,
                mlp_dropout=0.1,
                class_dropout=0.1,
            ),
            data=DataConfig(source="folder", image_size=256, crop="ten_crop", ten_crop_scale=1.1, flip=False, workers=8),
            optimizer=OptimizerConfig(
                learning_rate=4e-4,
                schedule="linear",
                decay_start=300_000,  # the last 50 of 300 epochs
                final_learning_rate=1e-5,
                beta1=0.9,
                beta2=0.95,
                weight_decay=0.05,
                clip_norm=1.0,
                ema_decay=0.0,
            ),
            train=TrainConfig(
                steps=360_000, batch_size=1024, dtype="bfloat16", remat="dots", checkpoint_every=5000, sample_every=5000
            ),
            sampling=SamplingConfig(guidance=(1.1, last_guidance)),
            mesh=MeshConfig(data=-1, fsdp=-1),  # parameters are sharded and gathered layer by layer
        )
    )


l = recipe("L", 8.0)  # noqa: E741 (as the paper calls it)
xl = recipe("XL", 10.0)
xxl = recipe("XXL", 10.0)
