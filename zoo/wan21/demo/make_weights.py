"""Demo weights: a diffusers folder with the classes of a Wan2.1 release, small enough to live in the repository.

    python -m zoo.wan21.demo.make_weights                          # everything, the transformer random
    python -m zoo.wan21.demo.make_weights --transformer EXPORTED   # puts the transformer of a training run there
    python -m zoo.wan21.demo.make_weights --i2v                    # image-to-video; with --transformer as above

writes `zoo/wan21/demo/weights/` {model_index.json, scheduler, text_encoder, tokenizer, transformer, vae} in bf16. With
--i2v it writes `weights-i2v/`: also an image encoder with seeded random weights, and links to the files of `weights/`.
This script trains the VAE on moving digits (train images of `make_data`, never the held-out ones). The text encoder
keeps seeded random weights, which distinguish the captions well enough. The recipe trains the transformer. README.md of
this folder describes the one in the repository and its run.

What differs from the release: the VAE first folds 2x2 pixels into channels (`patch_size` 2, as the Wan2.2 VAE does) and
has one stage less. Its strides are still 4 frames and 8 pixels, and encoding on a CPU is 3.5 times cheaper.
Shapes: B clips, F frames, S height and width, T H W of the latents.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from . import make_data

HERE = Path(__file__).parent
TEXT_LEN = 16  # longest caption: 10 tokens with </s>
WORDS = [
    "a",
    "handwritten",
    "moves",
    "to",
    "the",
    "left",
    "right",
    "up",
    "down",
    "and",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
]
KL_WEIGHT = 1e-4  # per latent value, against a squared error per pixel
PROBE_CLIPS = 256  # clips that latents_mean and latents_std are computed on


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer like T5's: unigram over "▁word" pieces, `</s>` appended, ids 0 1 2 = pad, eos, unk. Each word
    of the captions is one piece. Other text is split into letters, and unknown letters into bytes."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocab += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    vocab += [("▁", -8.0)] + [(letter, -8.0) for letter in letters] + [("▁" + word, -4.0) for word in WORDS]
    backend = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<pad>", "</s>", "<unk>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TEXT_LEN
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return UMT5EncoderModel(config).eval()


def build_transformer(i2v: bool = False) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=32, in_channels=36 if i2v else 16,
        out_channels=16, text_dim=64, freq_dim=256, ffn_dim=512, num_layers=4, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, image_dim=64 if i2v else None,
        added_kv_proj_dim=128 if i2v else None, rope_max_seq_len=1024,
    )  # fmt: skip


def build_image_encoder() -> tuple[CLIPVisionModel, CLIPImageProcessorPil]:
    """Builds a CLIP image encoder with 16 patches of 7x7 pixels and a class token."""
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7
    )
    size = config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPVisionModel(config).eval(), processor


def write_i2v(out: Path, base: Path, seed: int) -> None:
    """Writes the image-to-video folder: the new parts, and relative links to the files of `base` for the others."""
    torch.manual_seed(seed)
    encoder, processor = build_image_encoder()
    parts = WanPipeline.from_pretrained(base, torch_dtype=torch.bfloat16).components
    pipeline = WanImageToVideoPipeline(
        **{name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")},
        image_processor=processor, image_encoder=encoder.bfloat16(), transformer=build_transformer(True).bfloat16(),
    )  # fmt: skip
    shutil.rmtree(out, ignore_errors=True)
    pipeline.save_pretrained(out)
    for text in (out / "model_index.json", out / "image_processor" / "preprocessor_config.json"):
        values = text.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor")  # the released name
        text.write_text(json.dumps(json.loads(values), indent=2) + "\n")
    for part in ("tokenizer", "text_encoder", "vae", "scheduler"):
        shutil.rmtree(out / part)
        (out / part).mkdir()
        for file in (base / part).iterdir():
            (out / part / file.name).symlink_to(os.path.relpath(file, out / part))


def build_vae(latents_mean: list[float], latents_std: list[float]) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True],
        in_channels=12, out_channels=12, patch_size=2, latents_mean=latents_mean, latents_std=latents_std,
    )  # fmt: skip


class Clips:
    """Renders random clips of one split in memory, without end."""

    def __init__(self, train: bool, seed: int) -> None:
        self.images, _ = make_data.digit_images(train)
        self.rng = np.random.default_rng(seed)

    def batch(self, size: int, frames: int = make_data.FRAMES, crop: int = make_data.SIZE) -> Tensor:
        """Returns clips (B, 3, F, S, S) in -1..1. A smaller `crop` is cut around the digit in the middle frame."""
        clips = []
        for _ in range(size):
            image = self.images[self.rng.integers(len(self.images))]
            centers = make_data.path_centers(list(make_data.DIRECTIONS)[self.rng.integers(8)], self.rng)
            start = self.rng.integers(len(centers) - frames + 1)
            margin = make_data.SIZE - crop
            x, y = np.clip(centers[start + frames // 2] - crop / 2, 0, margin).astype(int)
            clip = make_data.render(image, centers[start : start + frames])[:, y : y + crop, x : x + crop]
            clips.append(torch.from_numpy(clip))
        grey = torch.stack(clips).float() / 127.5 - 1  # (B, F, S, S)
        return grey[:, None].expand(-1, 3, -1, -1, -1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns the PSNR in dB over all pixels of clips in -1..1 (peak to peak 2)."""
    return float(10 * torch.log10(4 / (a - b).detach().square().mean()))


def train_vae(vae: AutoencoderKLWan, steps: int, batch: int, seed: int) -> None:
    """Trains on the squared error of decoded posterior samples plus a KL term. The first four fifths of the steps use
    short crops around the digit, because most of a clip is black; the last fifth uses whole frames. Ink weighs four
    times as much as background: otherwise training stays at all-black output for long."""
    clips = Clips(train=True, seed=seed)
    with torch.no_grad():  # by default the posterior is as wide as the prior, and its noise hides the signal
        vae.quant_conv.weight[16:] = 0
        vae.quant_conv.bias[16:] = -5
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(1, steps + 1):
        # The causal cache has three cases: first, second and later chunk. 5 frames use two of them, 9 frames all.
        on_crops = step <= steps * 4 // 5
        x = clips.batch(batch, frames=5 if on_crops else 9, crop=32 if on_crops else make_data.SIZE)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = (reconstruction - x).square()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (error * (1 + 3 * (x > -0.9))).mean() + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps:
            quality, spent = psnr(reconstruction, x), time.time() - start
            print(f"vae step {step} loss {loss:.4f} kl {kl:.3f} psnr {quality:.2f} {spent:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--i2v", action="store_true", help="the image-to-video folder")
    parser.add_argument("--out", type=Path, help="(default weights, with --i2v weights-i2v)")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--transformer", type=Path, help="folder exported by a training run; only its transformer is taken"
    )
    args = parser.parse_args()
    args.out = args.out or HERE / ("weights-i2v" if args.i2v else "weights")
    if args.transformer:
        trained = load_file(args.transformer / "transformer" / "diffusion_pytorch_model.safetensors")
        model = build_transformer(args.i2v).bfloat16()
        model.load_state_dict(trained, strict=True)
        model.save_pretrained(args.out / "transformer")
        return
    if args.i2v:
        write_i2v(args.out, HERE / "weights", args.seed)
        return

    torch.manual_seed(args.seed)
    vae = build_vae([0.0] * 16, [1.0] * 16)
    train_vae(vae, args.vae_steps, args.batch, args.seed)
    vae = vae.bfloat16().float().eval()  # measure the weights as they are stored
    with torch.no_grad():
        latents = torch.cat([vae.encode(c).latent_dist.mode() for c in Clips(True, 1).batch(PROBE_CLIPS).split(16)])
        held_out = Clips(False, 2).batch(64)
        reconstruction = torch.cat([vae.decode(vae.encode(c).latent_dist.mode()).sample for c in held_out.split(16)])
    quality = psnr(reconstruction, held_out)
    per_channel = latents.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=per_channel.mean(1).tolist(), latents_std=per_channel.std(1).tolist())
    print("latents std", [round(s, 3) for s in vae.config.latents_std])
    tokenizer = build_tokenizer()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    torch.manual_seed(args.seed)
    pipeline = WanPipeline(
        tokenizer=tokenizer, text_encoder=build_text_encoder(len(tokenizer)), vae=vae, scheduler=scheduler,
        transformer=build_transformer(),
    )  # fmt: skip
    for part in (pipeline.vae, pipeline.transformer, pipeline.text_encoder):
        part.bfloat16()
    shutil.rmtree(args.out, ignore_errors=True)
    pipeline.save_pretrained(args.out)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file())
    print(f"PSNR of held-out clips {quality:.2f} dB; {size / 2**20:.2f} MiB in {args.out}")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
