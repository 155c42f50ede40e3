"""Train Wan2.1 text-to-video and image-to-video: data, model, objective, loop.

    bash zoo/wan21/pretrain_t2v.sh                                                    # laptop: tiny model, demo clips
    bash zoo/wan21/pretrain_i2v.sh                                                    # the same, from a first frame
    NPROC=8 bash zoo/wan21/pretrain_t2v.sh --size 1.3B --weights Wan2.1-T2V-1.3B-Diffusers --data my.jsonl

Every rank of a tensor x context x pipeline group trains on the same samples: each encodes its share of the step's
micro-batches (VAE, text, given frames) and hands them to the others. Noise, timesteps and caption dropout are drawn
from generators seeded by (seed, step, place in the global batch), so they do not depend on the layout and need no state
to resume.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state as mpu

from common import checkpoint, cli, device, lora, parallel, release, resume
from common import train as loop
from common.data import BucketSampler, Step, check_drops, note_drops, prefetch
from common.video import probe_video, read_frames

from . import convert, data, features, images, preference
from .config import WanConfig, latent_grid, model_config
from .encoders import Encoders
from .evaluate import compare, in_words, judge_demo
from .infer import condition_on, sample
from .model import WanBlock, build, draw, velocity_tokens
from .options import DEMO_CAPTIONS, HERE, TrainOptions, is_demo, run_facts, starts_from
from .videos import write

SAMPLE_BATCH = 16
HELD_OUT = ("held-out.jsonl", "held-out-drops.jsonl")  # the index of --validation, and what it leaves out

# --------------------------------------------------------------------------------------------------------- objective


def sigma(index: torch.Tensor, shift: float) -> torch.Tensor:
    """Noise level of timestep index 0..999 (0 is pure noise): s = shift u / (1 + (shift - 1) u), u = 1 - index/1000."""
    u = 1 - index.double() / 1000
    return (shift * u / (1 + (shift - 1) * u)).float()


def bell_weights(shift: float) -> torch.Tensor:
    """Loss weight by timestep index [1000]: exp(-2 ((t - 500)/1000)^2) over the shifted t = 1000 s, its minimum taken
    off, scaled to mean 1 (the convention of MindSpeed-MM and DiffSynth; the authors published none)."""
    t = 1000 * sigma(torch.arange(1000), shift).double()
    weight = torch.exp(-2 * ((t - 500) / 1000) ** 2)
    weight = weight - weight.min()
    return (weight * 1000 / weight.sum()).float()


class FlowMatching:
    """Rectified flow: x_s = (1 - s) x0 + s n, the model predicts n - x0."""

    def __init__(self, o: TrainOptions):
        self.o = o
        self.weights = bell_weights(o.shift) if o.weighting == "bell" else torch.ones(1000)

    def noised(
        self, latents: torch.Tensor, text: torch.Tensor, empty: torch.Tensor, step: int, slots: Sequence[int]
    ) -> dict:
        """latents fp32 [B, C, F, H, W] and text [B, T, D] of the places `slots` of the step's global batch -> a
        training batch: x and target [B, C, F, H, W], t and weight [B], text with captions dropped to `empty` [T, D]."""
        noise, draws = torch.empty_like(latents), []
        for i, slot in enumerate(slots):
            generator = torch.Generator(latents.device).manual_seed(checkpoint.stable_seed(self.o.seed, step, slot))
            noise[i].normal_(generator=generator)
            # Host numbers come from the host: reading them from the device would stop it. The hash is uniform below 2^63.
            draws.append(checkpoint.stable_seed(self.o.seed, step, slot, "host"))
        index = torch.tensor([draw % 1000 for draw in draws])
        dropped = torch.tensor([draw // 1000 < self.o.caption_dropout * 2**63 / 1000 for draw in draws]).to(text.device)
        if self.o.timesteps == "per-batch":  # what the reference does: one draw for the whole batch
            index = index[:1].expand(len(index))
        s = sigma(index, self.o.shift).to(latents.device).view(-1, 1, 1, 1, 1)
        return {
            "x": (1 - s) * latents + s * noise,
            "target": noise - latents,
            "t": 1000 * s.flatten(),
            "weight": self.weights[index].to(latents.device),
            "text": torch.where(dropped.view(-1, 1, 1), empty, text),
        }


def forward_step(iterator: Iterator[dict], model: torch.nn.Module):
    """One micro-batch through one model chunk, as megatron-core's schedules want it."""
    batch = next(iterator)
    output = model(batch["x"], batch["t"], batch["text"], batch.get("y"), batch.get("image"))
    return output, lambda output: loss(output, batch, model)


def loss(output: torch.Tensor, batch: dict, model: torch.nn.Module) -> tuple[torch.Tensor, dict]:
    """Weighted mean squared error in fp32, this rank's tokens' part of the mean over all: summing it over the context
    (and, under sp, tensor) parallel ranks gives the micro-batch's loss."""
    config = parallel.unwrapped(model)
    target = velocity_tokens(batch["target"], config.wan.patch_size)  # [L, B, C*patch]
    error = (output.float() - parallel.local_tokens(target, config.config)).square().mean(-1)  # [L(/tp), B]
    value = (error * batch["weight"]).sum() / (target.shape[0] * target.shape[1])
    return value, {"loss": value.detach().clone()}  # the schedule scales the first one in place


# ---------------------------------------------------------------------------------------------------------- adapters


def adapt(chunks: list[torch.nn.Module], o: TrainOptions, config: WanConfig) -> None:
    """Low-rank adapters, which train; nothing else does."""
    if o.adapter:
        lora.load_adapter(convert.adapter(o.adapter, config)[0], chunks)
    else:
        kind = {"rank": o.lora_rank, "alpha": o.lora_alpha, "dropout": o.lora_dropout, "rslora": o.rslora}
        lora.add(chunks, o.lora_targets.split(","), **kind, seed=o.seed)


def write_adapter(o: TrainOptions, config: WanConfig, wrapped: list[torch.nn.Module]) -> None:
    """The adapters as a folder that peft and diffusers load and, with --merge, released weights with them added."""
    folder = o.export or o.out / "adapter"
    if dist.get_rank() == 0 and not o.export:
        shutil.rmtree(folder, ignore_errors=True)  # of this run when it was shorter
    lora.save_adapter(folder, wrapped, convert.to_diffusers, base=str(o.weights))
    if dist.get_rank() > 0:
        return
    convert.write_pipeline_file(folder)
    print(f"adapter     {folder}", flush=True)
    if o.merge:
        base = release.open_source(*convert.located(o.weights, config))
        merged = release.merged(base, *convert.adapter(folder, config))
        convert.write_released(o.merge, "diffusers", config, merged, o.weights)
        print(f"merged      {o.merge}", flush=True)


# -------------------------------------------------------------------------------------------------------------- data


class Batches:
    """Steps of encoded micro-batches for this rank, from the user's videos."""

    def __init__(self, o: TrainOptions, config: WanConfig, index: data.Index, drops: str = "drops.jsonl"):
        self.o, self.config, self.index, self.drops = o, config, index, o.out / drops
        self.device = device.current()
        self.videos = 2 if o.job == "dpo" else 1  # of a unit of the data, which a pair is
        self.sampler = BucketSampler(
            [row.bucket for row in index.rows[:: self.videos]],
            o.global_batch // self.videos,
            o.micro_batch // self.videos,
            mpu.get_data_parallel_rank(),
            o.dp,
            o.seed,
        )
        self.flow = FlowMatching(o)
        self.encoders = Encoders(o.weights, config, o.precision, o.vae_tiling)
        if o.features:
            self.dataset = features.FeatureDataset(o.features, index)
            self.empty = self._padded(features.empty_text(o.features))
        else:
            encoder = " ".join(features.encoders(o, config).values())
            kind = data.PairDataset if o.job == "dpo" else data.VideoTextDataset
            self.dataset = kind(index, cache_dir=o.cache, encoder=encoder)
            self.empty = self.encoders.text.encode([""])[0]

    def __call__(self, start: int, end: int | None = None) -> Iterator[Step]:
        """Decoded or cached micro-batches of the steps from `start` on, this rank's share of each."""
        group = parallel.sample_group()
        share = (group.rank(), group.size())
        return prefetch(self.dataset, self.sampler, start, end or self.o.steps, self.o.workers, share)

    def prepare(self, loaded: Step) -> list[dict]:
        """A loaded step -> its training batches, whole on every rank of the sample group."""
        if self.o.adapts:
            lora.seed_dropout(self.o.seed, loaded.step)
        group = parallel.sample_group()
        ranks = dist.get_process_group_ranks(group)
        mine = dict(zip(loaded.taken, loaded.micro_batches, strict=True))
        for batch in mine.values():
            if batch["dropped"]:
                note_drops(self.drops, self.dataset.drops(batch["dropped"]), len(self.index.rows), self.o.max_drop)
        shape = (self.o.micro_batch, self.config.out_dim, *latent_grid(self.index.buckets[loaded.bucket]))
        batches = []
        for i in range(self.o.micro_batches):
            latents, text, condition = self._encoded(mine.get(i), shape)
            if group.size() > 1:
                for tensor in (latents, text, *condition.values()):
                    dist.broadcast(tensor, ranks[i % group.size()], group=group)
            if self.videos == 2:  # both videos of a pair are conditioned on the chosen one's frames
                condition = {name: torch.cat([value.chunk(2)[0]] * 2) for name, value in condition.items()}
            slots = [*self.sampler.slots(i)] * self.videos  # the videos of a pair have the same noise and timestep
            batch = self.flow.noised(latents, text, self.empty, loaded.step, slots) | condition
            if i in mine:
                batch |= {"rows": mine[i]["rows"], "captions": mine[i]["captions"]}
            batches.append(batch)
        return batches

    def _encoded(self, batch: dict | None, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """(latents [B, C, F, H, W] fp32, text [B, text_len, D], of image-to-video the condition: y [B, 4 + C, F, H, W]
        and image [B, I, image_dim] fp32); empty to be filled if not this rank's."""
        config, condition = self.config, {}
        if batch is None:
            latents = torch.empty(shape, device=self.device)
            if config.given_frames:
                condition["y"] = latents.new_empty(shape[0], config.in_dim - config.out_dim, *shape[2:])
                condition["image"] = latents.new_empty(shape[0], config.image_rows, config.image_dim)
            return latents, self.empty.new_empty(shape[0], *self.empty.shape), condition
        if batch["latents"] is not None:
            condition = {name: batch[name].to(self.device) for name in (("y", "image") if config.given_frames else ())}
            return batch["latents"].to(self.device), self._padded(batch["text"]), condition
        latents, text, condition = self.encoders.encode(batch["pixels"], batch["captions"])
        for i, key in enumerate(batch["keys"] or []):
            data.store(self.o.cache, key, latents[i], text[i], {name: value[i] for name, value in condition.items()})
        return latents, text, condition

    def _padded(self, text: torch.Tensor) -> torch.Tensor:
        """[..., n, D] of captions with at most n tokens -> [..., text_len, D] on the device."""
        return F.pad(text.to(self.device), (0, 0, 0, self.config.text_len - text.shape[-2]))


def indexed(o: TrainOptions, source: Path, name: str = "index.jsonl", drops: str = "drops.jsonl") -> data.Index:
    """The run's index of a list of videos: made by rank 0 once, then read by all, also after a resume. One that is kept
    of another list, other buckets or another rate, and that no checkpoint was trained on, is made again. drops: where the
    rows left out are listed."""
    path = o.out / name
    if getattr(o, "features", None):
        index = o.features / "index.jsonl"
        if path.is_file() and path.read_bytes() != index.read_bytes():
            raise ValueError(f"{path} is of other data than {index}; fix: --features, or another --out")
        dist.barrier()  # all have looked before one writes
        if dist.get_rank() == 0:
            o.out.mkdir(parents=True, exist_ok=True)
            shutil.copy(index, path)
            print(check_drops(o.features / drops, len(data.Index.load(index).rows), o.max_drop), flush=True)
        return data.Index.load(index)
    if dist.get_rank() == 0 and not _still_holds(path, source, o):
        read, scan = (
            (data.read_pairs, data.scan_pairs) if getattr(o, "job", "") == "dpo" else (data.read_rows, data.scan)
        )
        rows, report = read(source)
        index = scan(rows, data.parse_buckets(o.buckets), o.fps or None, report, decoder=o.decoder)
        o.out.mkdir(parents=True, exist_ok=True)
        report.save(o.out, drops)
        print(report, flush=True)
        report.check(len(index.rows) + sum(report.counts.values()), o.max_drop)
        print(data.fill(index, o.global_batch), flush=True)
        dataclasses.replace(index, list_content=resume.content([source])).save(path)
    dist.barrier()
    return data.Index.load(path)


def _still_holds(path: Path, source: Path, o: TrainOptions) -> bool:
    """Whether the index kept in a run folder is of the list, buckets and rate asked for now; says so if it is not. That a
    run with checkpoints goes on with the same ones `options.run_facts` has checked."""
    if not path.is_file():
        return False
    kept = data.Index.load(path)
    now = (resume.content([source]), data.parse_buckets(o.buckets), o.fps or None, o.decoder)
    if now == (kept.list_content, kept.buckets, kept.fps, kept.decoder):
        return True
    print(f"{path} is of another list, --buckets, --fps or --decoder: scanning again", flush=True)
    return False


# -------------------------------------------------------------------------------------------------------------- samples


def demo_rows(o: TrainOptions) -> list[data.Row]:
    """Real clips never trained on, every digit in every direction."""
    path = o.data.with_name("test.jsonl")
    rows = data.read_pairs(path)[0][::2] if o.job == "dpo" else data.read_rows(path)[0]
    return rows[:DEMO_CAPTIONS]


def to_sample(o: TrainOptions, config: WanConfig, index: data.Index) -> list[images.Request]:
    """What is asked for; else captions, and for image-to-video the first (and last) frames, of videos."""
    if o.sample_prompts:
        return images.read_requests(o.sample_prompts, "--sample-prompts", config.given_frames)
    rows = demo_rows(o) if is_demo(o.data) else index.rows[:: 2 if o.job == "dpo" else 1][:4]
    return [images.Request(row.caption, *[Path(row.path)] * config.given_frames) for row in rows]


def sampled(
    o: TrainOptions, config: WanConfig, chunks, batches: Batches, asked: list[images.Request]
) -> list[np.ndarray]:
    """A video uint8 [F, H, W, 3] for each, on every rank."""
    bucket = batches.index.buckets[0]
    pieces = []
    for chunk in chunks:
        chunk.eval()  # an adapter's dropout
    share = -(-len(asked) // o.dp)  # each data-parallel rank samples its share, all the same number (FSDP gathers)
    mine = [asked[min(mpu.get_data_parallel_rank() * share + i, len(asked) - 1)] for i in range(share)]
    for start in range(0, share, SAMPLE_BATCH):
        some = mine[start : start + SAMPLE_BATCH]
        seeds = [
            checkpoint.stable_seed(o.seed, mpu.get_data_parallel_rank() * share + start + i) for i in range(len(some))
        ]
        latents = sample(
            chunks, o, config, batches.encoders.text.encode([r.prompt for r in some]), batches.empty, latent_grid(bucket), seeds,
            sampler="unipc", shift=o.sample_shift, steps=o.sample_steps, cfg=o.cfg,
            condition=condition_on(batches.encoders.frames, some, bucket, "crop"),
        )  # fmt: skip
        pieces.append(batches.encoders.codec.decode(latents))
    for chunk in chunks:
        chunk.train()
    videos = torch.cat(pieces).to(device.current())  # [share, 3, F, H, W] uint8
    gathered = [torch.empty_like(videos) for _ in range(o.dp)]
    dist.all_gather(gathered, videos, group=mpu.get_data_parallel_group())
    return [v.permute(1, 2, 3, 0).cpu().numpy() for v in torch.cat(gathered)[: len(asked)]]


def finish(o: TrainOptions, config: WanConfig, chunks, batches: Batches, result: dict, before: list) -> None:
    """Sample the trained model and, on the demo data, let the judge score it. before: the demo's samples without
    adapters, if those were trained."""
    asked = to_sample(o, config, batches.index)
    if dist.get_rank() == 0:
        cli.say(f"sampling {len(asked)} videos")
    videos, captions = sampled(o, config, chunks, batches, asked), [request.prompt for request in asked]
    if dist.get_rank() > 0:
        return
    folder = o.out / "samples"
    folder.mkdir(exist_ok=True)
    for i, (video, caption) in enumerate(zip(videos[:8], captions, strict=False)):
        write(video, folder / f"{i:04d}", o.fps or 16, "gif", {"prompt": caption})
    if is_demo(o.data) and not o.sample_prompts:
        report_demo(o, videos, captions, result, before)
    else:
        print(f"run folder  {o.out}\nloss curve  {o.out / 'loss.png'}\nsamples     {folder}", flush=True)


def report_demo(o: TrainOptions, videos: list, captions: list[str], result: dict, before: list) -> None:
    """The judge's score of the samples beside that of real clips, a GIF of both, and the run's one line of result."""
    from .demo import judge

    rows = demo_rows(o)
    real = [read_frames(r.path, range(probe_video(r.path).frames)) for r in rows]
    scores, folder = judge_demo(videos, real, captions), o.out / "samples"
    words = f"result: step {result['steps']}, {in_words(scores)}"
    compare(folder, videos, real, o.fps)
    if before:
        clips = {"samples": videos, "before": before, "real": real}
        blinking = {what: sum(map(judge.blinks, found)) / len(found) for what, found in clips.items()}
        scores.append({"score": "blinking"} | blinking | {"n": len(videos)})
        words += f", blinking {blinking['samples']:.0%} (before {blinking['before']:.0%}, real {blinking['real']:.0%})"
        strip = np.concatenate([np.concatenate(side[:8], axis=2) for side in (before, videos)], axis=1)
        write(strip, folder / "before_above_after_below", o.fps or 16, "gif")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2))
    print(f"run folder  {o.out}\nloss curve  {o.out / 'loss.png'}\nsamples     {folder} (clips above, sampled below)")
    print(words, flush=True)


def command_that_samples(o: TrainOptions, config: WanConfig, checkpoint: Path) -> str:
    """The shell command that samples from what this run made."""
    launcher = f"bash zoo/{HERE.name}/infer_{'i2v' if config.given_frames else 't2v'}.sh"
    made = f"--weights {o.export}" if o.export else f"--checkpoint {checkpoint}"
    if o.adapts:
        made = f"--weights {o.merge}" if o.merge else f"--weights {o.weights} --adapter {o.export or o.out / 'adapter'}"
    given = "".join([" --image PICTURE", " --last-image PICTURE"][: config.given_frames])
    return f"{launcher} {made} --video {o.buckets.split(',')[0]}{given} --prompt TEXT"


# -------------------------------------------------------------------------------------------------------------- main


def main(o: TrainOptions) -> None:
    config = model_config(o)
    index = indexed(o, o.data)
    o = loop.count_epochs(o, len(index.rows))
    chunks = build(o, config)
    convert.fill(chunks, o, config, draw)
    if o.adapts:
        adapt(chunks, o, config)
    wrapped = parallel.wrap(chunks, o, WanBlock)

    def flops(grid: tuple[int, int, int]) -> int:  # the reference's forward is a third of a step
        return config.flops(grid, frozen=o.adapts) + (config.flops(grid) // 3 if o.job == "dpo" else 0)

    def samples(batch: list[dict]) -> tuple[int, int]:
        grid = tuple(batch[0]["x"].shape[2:])
        return config.tokens(grid), flops(grid)

    def sequence_length(batch: list[dict]) -> int:
        """Rows of the pipeline tensor times what megatron-core divides them by."""
        split = o.cp * (o.tp if o.sp else 1)
        return (samples(batch)[0] // split + config.context_rows) * split

    grid = latent_grid(index.buckets[0])
    header = loop.run_header(o, HERE.name, o.job, config.parameters, flops(grid), starts_from(o))
    batches = Batches(o, config, index)
    # What the demo's adapters are to bring, the base lacks.
    blinking = o.adapts and is_demo(o.data) and not o.sample_prompts
    before = sampled(o, config, wrapped, batches, to_sample(o, config, index)) if blinking else []
    step, prepare, margins = forward_step, batches.prepare, None
    if o.job == "dpo":
        reference, margins = preference.reference_model(o, config, wrapped), preference.Margins()
        step = functools.partial(preference.forward_step, o, margins)

        def prepare(loaded: Step) -> list[dict]:
            micro_batches = batches.prepare(loaded)
            return preference.with_reference(o, reference, micro_batches, sequence_length(micro_batches))

    if dist.get_rank() == 0:
        cli.say("first step: loads the encoders and encodes its videos, which takes longer than the steps after it")
    result = loop.train(
        o,
        wrapped,
        step,
        batches,
        prepare,
        sequence_length=sequence_length,
        samples=samples,
        header=header,
        state={"model": dataclasses.asdict(config), "start": run_facts(o, config)},
        ema_decay=o.ema,
        measure=margins,
    )
    finished = result["reason"] == "finished"
    if finished and result["ema"]:  # samples and adapters are of the averaged weights
        with torch.no_grad():
            for name, parameter in checkpoint.trained(wrapped):
                parameter.copy_(result["ema"][name])
    if finished and features.has_encoders(o.weights, config):
        finish(o, config, wrapped, batches, result, before)
    elif finished and dist.get_rank() == 0:
        print(f"note: no samples: {o.weights} has no VAE and text encoder; see infer_t2v.sh", flush=True)
    if finished and o.job == "dpo" and o.validation:
        pairs = Batches(o, config, indexed(o, o.validation, *HELD_OUT), HELD_OUT[1])
        found = preference.held_out(o, pairs, wrapped, reference, sequence_length)
        if dist.get_rank() == 0:
            (o.out / "held-out.json").write_text(json.dumps(found, indent=2))
            print(preference.in_words(found), flush=True)
    if finished and o.adapts:
        write_adapter(o, config, wrapped)
    elif finished and o.export and (saved := loop.last_checkpoint(o, result)) and dist.get_rank() == 0:
        source = release.open_source(saved, convert.table(config, True), ema=bool(o.ema))
        convert.write_released(o.export, "diffusers", config, source, o.weights)
        print(f"exported {o.export}", flush=True)
    usable = not o.from_scratch if o.adapts else o.export or result["checkpoint"]  # a drawn base is kept nowhere
    if finished and usable and dist.get_rank() == 0:
        print(f"try it      {command_that_samples(o, config, result['checkpoint'])}", flush=True)
    elif not finished and dist.get_rank() == 0:
        print(
            f"no samples  stopped at step {result['steps']} ({result['reason']}); the same command goes on", flush=True
        )
    dist.barrier()
