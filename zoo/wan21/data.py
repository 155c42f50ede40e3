"""Text-video data for Wan2.1: the user's list of videos -> an index of buckets -> micro-batches.

common/diffusion/lists.py says what a row may hold, buckets.py which bucket a video goes to, and dataset.py how it is
cut. Examples of rows (`--data`):

    videos.jsonl   {"path": "a.mp4", "cap": "a red car"}                                 also .json, .csv, data.txt
    pairs.jsonl    {"chosen": "a.mp4", "rejected": "b.mp4", "caption": "a red car"}      dpo_t2v.sh, dpo_i2v.sh

The VAE's strides are 4, 8 and 8, and the patch is 1x2x2. So a bucket has 4n+1 frames and sides in multiples of 16. The
bucket 81x480x832 has 32,760 tokens, 49x480x832 has 20,280.

All ranks of a tensor x context x pipeline group train on the same samples. Each rank encodes its share of the step's
micro-batches (VAE, text, given frames) and sends the result to the others.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu

from common import device, lora, parallel
from common.data import BucketSampler, Step, prefetch
from common.diffusion import dataset, features
from common.diffusion.dataset import Index, PairDataset, VideoTextDataset
from common.drops import note_drops

from .config import WanConfig, latent_grid
from .encoders import Encoders
from .options import ExtractOptions, TrainOptions, encoder_facts, parse_buckets

if TYPE_CHECKING:
    from .train import FlowMatching


def build_index(
    o: TrainOptions | ExtractOptions, source: Path, name: str = "index.jsonl", drops: str = "drops.jsonl"
) -> Index:
    """Builds the run's index of a list of videos or, for dpo, of pairs. drops: the file that lists rows left out."""
    pairs = o.job == "dpo"
    return dataset.build_index(o, source, parse_buckets(o.buckets), pairs=pairs, name=name, drops=drops)


class Batches:
    """Yields this rank's micro-batches, step by step: the user's videos, encoded, then noised by `flow`."""

    def __init__(
        self, o: TrainOptions, config: WanConfig, index: Index, flow: "FlowMatching", drops: str = "drops.jsonl"
    ):
        self.o, self.config, self.index, self.flow, self.drops = o, config, index, flow, o.out / drops
        self.device = device.current()
        self.videos = 2 if o.job == "dpo" else 1  # videos per item of the dataset: 2 for pairs
        self.sampler = BucketSampler(
            [row.bucket for row in index.rows[:: self.videos]],
            o.global_batch // self.videos,
            o.micro_batch // self.videos,
            mpu.get_data_parallel_rank(),
            o.dp,
            o.seed,
        )
        self.encoders = Encoders(o.weights, config, o.precision, o.vae_tiling)
        if o.features:
            self.dataset = features.FeatureDataset(o.features, index)
            self.empty = self._pad(features.read_empty_text(o.features))
        else:
            facts = " ".join(encoder_facts(o, config).values())
            dataset_class = PairDataset if o.job == "dpo" else VideoTextDataset
            self.dataset = dataset_class(index, cache_dir=o.cache, encoder=facts)
            self.empty = self.encoders.text.encode([""])[0]

    def __call__(self, start: int, end: int | None = None) -> Iterator[Step]:
        """Yields the steps from `start` on: of each step this rank's share of the micro-batches, decoded or cached."""
        group = parallel.sample_group()
        share = (group.rank(), group.size())
        return prefetch(self.dataset, self.sampler, start, end or self.o.steps, self.o.workers, share)

    def prepare(self, loaded: Step) -> list[dict]:
        """Encodes a loaded step. Every rank of the sample group gets all its training batches
        (`FlowMatching.noised`)."""
        if self.o.adapts:
            lora.seed_dropout(self.o.seed, loaded.step)
        group = parallel.sample_group()
        ranks = dist.get_process_group_ranks(group)
        read_here = dict(zip(loaded.numbers, loaded.micro_batches, strict=True))
        for batch in read_here.values():
            if batch["dropped"]:
                note_drops(self.drops, self.dataset.drops(batch["dropped"]), len(self.index.rows), self.o.max_drop)
        shape = (self.o.micro_batch, self.config.out_dim, *latent_grid(self.index.buckets[loaded.bucket]))
        batches = []
        for i in range(self.o.micro_batches):
            latents, text, condition = (
                self._encode_mine(read_here[i]) if i in read_here else self._allocate_batch(shape)
            )
            if group.size() > 1:
                for tensor in (latents, text, *condition.values()):
                    dist.broadcast(tensor, ranks[i % group.size()], group=group)
            if self.videos == 2:  # the chosen video's frames condition both videos of a pair
                condition = {name: torch.cat([value.chunk(2)[0]] * 2) for name, value in condition.items()}
            slots = [*self.sampler.slots(i)] * self.videos  # the videos of a pair have the same noise and timestep
            batch = self.flow.noised(latents, text, self.empty, loaded.step, slots) | condition
            if i in read_here:
                batch |= {"rows": read_here[i]["rows"], "captions": read_here[i]["captions"]}
            batches.append(batch)
        return batches

    def _encode_mine(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Returns (latents, text, condition) of a micro-batch that this rank read."""
        if batch["latents"] is not None:
            names = ("y", "image") if self.config.given_frames else ()
            condition = {name: batch[name].to(self.device) for name in names}
            return batch["latents"].to(self.device), self._pad(batch["text"]), condition
        latents, text, condition = self.encoders.encode(batch["pixels"], batch["captions"])
        for i, key in enumerate(batch["keys"] or []):
            dataset.store(self.o.cache, key, latents[i], text[i], {name: value[i] for name, value in condition.items()})
        return latents, text, condition

    def _allocate_batch(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """Allocates (latents of `shape`, text, condition), to receive a micro-batch from another rank."""
        config, latents, condition = self.config, torch.empty(shape, device=self.device), {}
        if config.given_frames:
            condition["y"] = latents.new_empty(shape[0], config.in_dim - config.out_dim, *shape[2:])
            condition["image"] = latents.new_empty(shape[0], config.image_rows, config.image_dim)
        return latents, self.empty.new_empty(shape[0], *self.empty.shape), condition

    def _pad(self, text: torch.Tensor) -> torch.Tensor:
        """Pads text embeddings [..., n, D] with zeros to [..., text_len, D], on the device."""
        return F.pad(text.to(self.device), (0, 0, 0, self.config.text_len - text.shape[-2]))
