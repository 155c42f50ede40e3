"""What the proofs of tests/test_models.py need to know of this model: small architectures, an oracle, a training
sample, layouts. A copied recipe has its own; change it right after model.py.
"""

import dataclasses

import diffusers
import torch

from common import cli
from common.release import Table

from . import convert
from .config import WanConfig
from .model import WanBlock
from .options import TrainOptions

# All dimensions are different, so that a test notices two that are swapped. text_len is 512 for image-to-video, because
# diffusers always takes the last 512 rows of the context as text.
_TEXT = WanConfig(
    dim=48, ffn_dim=80, num_heads=4, num_layers=4, in_dim=16, out_dim=16, patch_size=(1, 2, 2),
    text_dim=20, text_len=7, freq_dim=32, eps=1e-6, image_dim=None, image_tokens=0, first_last=False,
)  # fmt: skip
_IMAGE = dataclasses.replace(_TEXT, in_dim=36, image_dim=28, image_tokens=5, text_len=512)
CONFIGS = {"t2v": _TEXT, "i2v": _IMAGE, "flf2v": dataclasses.replace(_IMAGE, first_last=True)}
PUBLISHED = {  # parameters, tensors on disk
    "1.3B": (1_418_996_800, 825),
    "14B": (14_288_491_584, 1095),
    "14B-i2v": (16_394_878_784, 1303),
    "14B-flf2v": (16_395_536_704, 1304),
}
BLOCK = WanBlock
GRID, GLOBAL_BATCH = (3, 4, 8), 4  # latent frames, rows, columns: 24 tokens
LAYOUTS = {  # processes, options, architectures
    "dp2": (2, {}, ["t2v"]),
    "fsdp2": (2, {"fsdp": True}, ["t2v", "i2v"]),
    "tp2": (2, {"tp": 2}, ["t2v", "i2v"]),
    "tp2 sp": (2, {"tp": 2, "sp": True}, ["t2v", "flf2v"]),
    "cp2 ulysses": (2, {"cp": 2}, ["t2v"]),
    "cp2 ring": (2, {"cp": 2, "ulysses": 1}, ["t2v"]),
    "pp2 vpp2": (2, {"pp": 2, "vpp": 2}, ["t2v", "i2v"]),
    "tp2 sp pp2": (4, {"tp": 2, "sp": True, "pp": 2}, ["t2v"]),
}
QUICK = ["--sample-steps", "1", "--global-batch", "4"]  # options that shorten the steps and the work after training
REFUSED = {"more heads than there are": (8, {"tp": 8}, "does not divide 4 attention heads")}


def options(config: WanConfig, **values) -> TrainOptions:
    """Returns checked options of a training run with four videos per step."""
    defaults = {"size": "tiny", "layout": "tiny", "precision": "fp32", "micro_batch": 1, "global_batch": GLOBAL_BATCH,
             "steps": 20, "lr": 1e-3, "lr_schedule": "constant"}  # fmt: skip
    o = TrainOptions(**{f.name: f.default for f in dataclasses.fields(TrainOptions)} | defaults | values)
    return cli.check_layout(o, heads=config.num_heads, layers=config.num_layers, tokens=config.tokens(GRID))


def sequence_length(o: TrainOptions, config: WanConfig) -> int:
    split = o.cp * (o.tp if o.sp else 1)
    return (config.tokens(GRID) // split + config.context_rows) * split


def tables(config: WanConfig) -> dict[str, Table]:
    """Returns the table of every layout in which the model is released."""
    return {"original": convert.table(config, False), "diffusers": convert.table(config, True)}


# ------------------------------------------------------------------------------------------------------------- a step


def sample(config: WanConfig, place: int, step: int) -> dict:
    """Draws the video at a place of the step's global batch: latents [1, C, *GRID] with caption, timestep,
    condition."""
    generator = torch.Generator().manual_seed(1000 * step + place)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    text = noise(config.text_len, config.text_dim)
    text[:, config.text_len - 5 + place % 4 :] = 0  # captions have different lengths
    t, weight = (torch.rand(1, generator=generator) for _ in range(2))
    batch = {"x": noise(config.out_dim, *GRID), "target": noise(config.out_dim, *GRID), "text": text}
    batch |= {"t": 1000 * t, "weight": 0.5 + weight}
    if config.given_frames:
        batch["y"] = noise(config.in_dim - config.out_dim, *GRID)
        batch["image"] = noise(config.image_rows, config.image_dim)
    return batch


def collate(samples: list[dict]) -> dict:
    """Joins samples to one micro-batch."""
    return {key: torch.cat([s[key] for s in samples]) for key in samples[0]}


def prepare(o: TrainOptions, micro_batches: list[dict]) -> list[dict]:
    """Prepares a step's micro-batches as training does before it runs them."""
    return micro_batches


# ------------------------------------------------------------------------------------------------------------- oracle


def oracle(config: WanConfig) -> torch.nn.Module:
    """Builds diffusers' model."""
    values = {k: v for k, v in config.to_diffusers().items() if not k.startswith("_")}
    return diffusers.WanTransformer3DModel(**values | {"patch_size": tuple(values["patch_size"])})


def to_oracle(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Converts a name and its tensor (a weight or its gradient) to the oracle's."""
    return convert.to_diffusers(name), tensor


def oracle_loss(model: torch.nn.Module, samples: list[dict]) -> torch.Tensor:
    """Computes the oracle's loss on the samples of a step."""
    losses = []
    for s in samples:
        x, image = (torch.cat((s["x"], s["y"]), 1), s["image"]) if "y" in s else (s["x"], None)
        if image is not None:
            image = image.view(-1, _IMAGE.image_tokens, image.shape[-1])  # [images, I, image_dim]
        out = model(x, s["t"], s["text"], image, return_dict=False)[0]
        losses.append((out - s["target"]).square().mean() * s["weight"][0])
    return torch.stack(losses).mean()
