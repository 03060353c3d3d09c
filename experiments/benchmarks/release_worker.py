"""Times the PyTorch release for `sampling.py` and `train_step.py`, in the release's own environment, without dar_jax.

Command:  python release_worker.py FOLDER encode|decode|predict|train SIZE BATCH DTYPE REPEATS
Prints the seconds of the fastest run after a first one. Weights are random.
"""

import os
import sys
import time
from pathlib import Path

folder, kind, size, batch, dtype, repeats = sys.argv[1:]
batch, repeats = int(batch), int(repeats)
sys.path.insert(0, folder)

import torch  # noqa: E402
import yaml  # noqa: E402

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_num_threads(len(os.sched_getaffinity(0)))
torch.manual_seed(0)


def tokenizer():
    from tokenizer.tokenizer_image.vq_model import VQModel

    settings = yaml.safe_load((Path(folder) / "configs" / "tokenizer_v1.yaml").read_text())["model"]
    return VQModel(settings).eval().to(device)  # the release decodes in float32 whatever the transformer's dtype


def encode():
    model, images = tokenizer(), torch.zeros(batch, 3, 256, 256, device=device)
    return lambda: model.encode(images)


def decode():
    model, condition = tokenizer(), torch.zeros(batch, 256, 768, device=device)
    return lambda: model.decode_into_pixels(condition, 256, 256)


def transformer(**dropout):
    from autoregressive.models.gpt import GPT_models

    sizes = dict(vocab_size=16384, block_size=256, num_classes=1000, cls_token_num=1, model_type="c2i")
    return GPT_models[f"GPT-{size}"](**sizes, **dropout)


def predict():
    from autoregressive.models.generate import generate

    model = transformer().eval().to(device, getattr(torch, dtype))
    labels = torch.arange(batch, device=device)
    settings = dict(cfg_scale="1.1,8", temperature=1.0, top_k=0, top_p=1.0, sample_logits=True)
    return lambda: generate(model, labels, 256, **settings)


def train():
    """A step with dropout, clipping and AdamW; the release's own script adds no moving average unless it is asked to."""
    model = transformer(resid_dropout_p=0.1, ffn_dropout_p=0.1, token_dropout_p=0.1).train().to(device)
    groups = [[p for p in model.parameters() if (p.dim() >= 2) == decayed] for decayed in (True, False)]
    settings = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.05, 0.0))]
    optimizer = torch.optim.AdamW(settings, lr=1e-4, betas=(0.9, 0.95), fused=True)
    codes, labels = torch.randint(0, 16384, (batch, 256), device=device), torch.arange(batch, device=device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = model(cond_idx=labels, idx=codes[:, :-1], targets=codes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


with torch.inference_mode(kind != "train"):
    timed = {"encode": encode, "decode": decode, "predict": predict, "train": train}[kind]()
    seconds(timed)
    print(min(seconds(timed) for _ in range(repeats)))
