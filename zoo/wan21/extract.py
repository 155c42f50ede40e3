"""Extracts features: runs the frozen VAE and encoders once over every video of a list.

    bash zoo/wan21/extract_features.sh --out features                                  # the demo's clips, any laptop
    NPROC=8 bash zoo/wan21/extract_features.sh --weights Wan2.1-T2V-14B-Diffusers --data my.jsonl --out features

The training jobs read the result with `--features`. common/diffusion/features.py describes its format.
"""

import torch.distributed as dist

from common import jsonl
from common.diffusion import features
from common.diffusion.extraction import extract

from .config import model_config
from .data import build_index
from .encoders import Encoders
from .options import ExtractOptions, feature_settings


def main(o: ExtractOptions) -> None:
    config = model_config(o)
    if dist.get_rank() == 0:
        o.out.mkdir(parents=True, exist_ok=True)
        jsonl.mend(o.out / "drops.jsonl")
        features.write_json(o.out / "settings.json", feature_settings(o, config))
    index = build_index(o, o.data)
    encoders = Encoders(o.weights, config, o.precision, o.vae_tiling)  # each is loaded when it is first used
    extract(o, index, encoders.encode, lambda captions: encoders.text.encode(captions))
