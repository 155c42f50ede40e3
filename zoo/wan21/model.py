"""Wan2.1 text- and image-to-video diffusion transformer, on megatron-core.

Paper: Wan: Open and Advanced Large-Scale Video Generative Models, arXiv:2503.20314.
Reference implementations: Wan-Video/Wan2.1 @ 9737cba9 `wan/modules/model.py` (Apache-2.0) and
`diffusers.WanTransformer3DModel` 0.42.1 (Apache-2.0). Parameter names are those of the original checkpoint.

What is unusual:
- The RMSNorm of queries and keys spans all heads, so tensor-parallel ranks all-reduce its sum of squares.
- Text embeddings are cut to their true length and padded with zeros to `text_len` *before* the text MLP, and every
  padded position is attended to: there is no mask.
- All blocks share one time embedding: each block adds its own learnt `modulation` [1, 6, D] to the same 6 rows.
- The norm before cross-attention (`norm3`) is affine, and cross-attention has no gate. The other two norms of a block
  have no parameters.
- Rotary embedding over (frame, row, column) with the head dimension split 44/42/42 (of 128), interleaved pairs.
- Image-to-video gets the given frames twice: as 20 more input channels (which frames are given, and their latents), and
  as CLIP features with their own keys and values, whose attention is added to the text's before the output linear.

Parallelism (tokens are the first dimension of every activation):
- Tensor parallelism splits heads and FFN columns. Under sequence parallelism, activations between these regions hold
  L/tp tokens.
- Context parallelism splits the tokens for the whole network. Only self-attention communicates.
- A pipeline stage sends one tensor: its tokens, then the 6 modulation rows, the time embedding row, the text rows and
  the image rows. So the schedule also sends the gradients of these rows back.

Shape legend: B batch, C latent channels, F H W latent frames, rows, columns, L tokens of this rank, D hidden,
N heads of this rank, E head dim, T text tokens, I image features (0, 257 or 514) of width image_dim.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import nn

from common import device, ops, parallel
from common.recompute import recomputed

from .config import WanConfig


class WanSelfAttention(nn.Module):
    def __init__(self, config: WanConfig, mc: TransformerConfig):
        super().__init__()
        self.config, self.mc = config, mc
        self.q = parallel.ColumnLinear(config.dim, config.dim, mc)
        self.k = parallel.ColumnLinear(config.dim, config.dim, mc)
        self.v = parallel.ColumnLinear(config.dim, config.dim, mc)
        self.o = parallel.RowLinear(config.dim, config.dim, mc)
        self.norm_q = ShardedRMSNorm(config, mc)
        self.norm_k = ShardedRMSNorm(config, mc)
        self.attend = parallel.context_parallel_attention  # accelerate.py may replace it by sparse attention

    def forward(self, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """x [L(/tp), B, D], rope [L, 1, 1, E/2, 2] -> [L(/tp), B, D]."""
        E = self.config.head_dim
        x, q = parallel.enter_with(self.q, x, self.mc)  # [L, B, D], [L, B, D/tp]
        q = recomputed(self.norm_and_rotate, q, self.norm_q, rope)  # [L, B, N, E]
        k = recomputed(self.norm_and_rotate, self.k(x), self.norm_k, rope)
        v = self.v(x).unflatten(2, (-1, E))
        x = self.attend(q, k, v)  # [L, B, N, E]
        return self.o(x.flatten(2))

    def norm_and_rotate(self, x: torch.Tensor, norm: nn.Module, rope: torch.Tensor) -> torch.Tensor:
        """[L, B, D/tp] -> [L, B, N, E]."""
        return ops.rotary_interleaved(norm(x).unflatten(2, (-1, self.config.head_dim)), rope)


class WanCrossAttention(nn.Module):
    def __init__(self, config: WanConfig, mc: TransformerConfig):
        super().__init__()
        self.config, self.mc = config, mc
        self.q = parallel.ColumnLinear(config.dim, config.dim, mc)
        self.k = parallel.ColumnLinear(config.dim, config.dim, mc)
        self.v = parallel.ColumnLinear(config.dim, config.dim, mc)
        self.o = parallel.RowLinear(config.dim, config.dim, mc)
        self.norm_q = ShardedRMSNorm(config, mc)
        self.norm_k = ShardedRMSNorm(config, mc)
        if config.image_dim is not None:
            self.k_img = parallel.ColumnLinear(config.dim, config.dim, mc)
            self.v_img = parallel.ColumnLinear(config.dim, config.dim, mc)
            self.norm_k_img = ShardedRMSNorm(config, mc)

    def forward(self, x: torch.Tensor, text: torch.Tensor, image: torch.Tensor | None) -> torch.Tensor:
        """x [L(/tp), B, D], text [T, B, D], image [I, B, D] (both in the tensor-parallel region) -> [L(/tp), B, D]."""
        E = self.config.head_dim
        _, q = parallel.enter_with(self.q, x, self.mc)  # [L, B, D/tp]
        q = recomputed(self.norm_q, q).unflatten(2, (-1, E))  # [L, B, N, E]
        k = recomputed(self.norm_k, self.k(text)).unflatten(2, (-1, E))  # [T, B, N, E]
        v = self.v(text).unflatten(2, (-1, E))
        y = ops.attention(q, k, v)  # [L, B, N, E]
        if image is not None:
            k = recomputed(self.norm_k_img, self.k_img(image)).unflatten(2, (-1, E))  # [I, B, N, E]
            v = self.v_img(image).unflatten(2, (-1, E))
            y = y + ops.attention(q, k, v)
        return self.o(y.flatten(2))


class ShardedRMSNorm(nn.Module):
    """RMSNorm over the full width D, of which this rank holds D/tp."""

    def __init__(self, config: WanConfig, mc: TransformerConfig):
        super().__init__()
        self.eps, self.tp = config.eps, mc.tensor_model_parallel_size
        self.weight = nn.Parameter(torch.empty(config.dim // self.tp, dtype=mc.params_dtype))
        parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D/tp] -> [..., D/tp]."""
        return ops.rms_norm(x, self.weight, self.eps, self.tp)


class WanBlock(nn.Module):
    def __init__(self, config: WanConfig, mc: TransformerConfig):
        super().__init__()
        self.config, self.mc = config, mc
        self.modulation = nn.Parameter(torch.empty(1, 6, config.dim, dtype=mc.params_dtype))
        self.self_attn = WanSelfAttention(config, mc)
        self.norm3 = nn.LayerNorm(config.dim, config.eps, dtype=mc.params_dtype)
        self.cross_attn = WanCrossAttention(config, mc)
        self.ffn = nn.ModuleDict(
            {
                "0": parallel.ColumnLinear(config.dim, config.ffn_dim, mc),
                "2": parallel.RowLinear(config.ffn_dim, config.dim, mc),
            }
        )
        parallel.mark_replicated([self.modulation, self.norm3.weight, self.norm3.bias], mc)

    def forward(
        self,
        x: torch.Tensor,
        modulation: torch.Tensor,
        text: torch.Tensor,
        image: torch.Tensor | None,
        rope: torch.Tensor,
    ) -> torch.Tensor:
        """x [L(/tp), B, D], modulation [6, B, D], text [T, B, D], image [I, B, D], rope [L, 1, 1, E/2, 2] ->
        [L(/tp), B, D]."""
        eps = self.config.eps
        rows = modulation.float() + self.modulation.float().transpose(0, 1)  # [6, B, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(0)

        y = self.self_attn(recomputed(ops.layer_norm_modulate, x, scale1, shift1, eps), rope)
        x = recomputed(ops.gate_residual, x, y, gate1)

        y = recomputed(ops.layer_norm, x, self.norm3.weight, self.norm3.bias, eps)
        x = x + self.cross_attn(y, text, image)

        y = recomputed(ops.layer_norm_modulate, x, scale2, shift2, eps)
        _, y = parallel.enter_with(self.ffn["0"], y, self.mc)  # [L, B, F/tp]
        y = self.ffn["2"](recomputed(ops.gelu_tanh, y))
        return ops.gate_residual(x, y, gate2)


class WanImageEmbedding(nn.Module):
    """Maps CLIP features to the rows that cross-attention reads. A positional embedding distinguishes two images."""

    def __init__(self, config: WanConfig, dtype: torch.dtype):
        super().__init__()
        Im, D = config.image_dim, config.dim
        if config.first_last:
            self.emb_pos = nn.Parameter(torch.empty(1, config.image_rows, Im, dtype=dtype))
        self.proj = nn.ModuleDict(
            {
                "0": nn.LayerNorm(Im, dtype=dtype),
                "1": nn.Linear(Im, Im, dtype=dtype),
                "3": nn.Linear(Im, D, dtype=dtype),
                "4": nn.LayerNorm(D, dtype=dtype),
            }
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """[B, I, image_dim] -> [I, B, D]."""
        x = image + self.emb_pos if hasattr(self, "emb_pos") else image
        first, last = self.proj["0"], self.proj["4"]
        x = ops.layer_norm(x.transpose(0, 1), first.weight, first.bias, first.eps)  # [I, B, image_dim]
        x = self.proj["3"](F.gelu(self.proj["1"](x)))  # [I, B, D]
        return ops.layer_norm(x, last.weight, last.bias, last.eps)


class WanDiT(MegatronModule):
    """One model chunk of a pipeline stage. `layers` are the global indices of its blocks.

    A `first` chunk embeds the input. A `last` chunk has the output head. Blocks are named by their global index, so
    that names in checkpoints do not depend on the pipeline layout.
    """

    model_type = ModelType.encoder_or_decoder  # read by megatron-core's schedules

    def __init__(
        self,
        config: WanConfig,
        mc: TransformerConfig,
        layers: range,
        first: bool,
        last: bool,
        recompute: str,
        offload: bool,
    ):
        super().__init__(mc)
        self.wan, self.first, self.last, self.recompute, self.offload = config, first, last, recompute, offload
        D, dtype = config.dim, mc.params_dtype
        if first:
            self.patch_embedding = nn.Conv3d(config.in_dim, D, config.patch_size, config.patch_size, dtype=dtype)
            self.text_embedding = _mlp(config.text_dim, D, D, nn.GELU("tanh"), dtype)
            if config.image_dim is not None:
                self.img_emb = WanImageEmbedding(config, dtype)
            self.time_embedding = _mlp(config.freq_dim, D, D, nn.SiLU(), dtype)
            self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D, dtype=dtype))
            shared = [self.patch_embedding, self.time_embedding, self.time_projection]
            parallel.mark_replicated((p for module in shared for p in module.parameters()), mc)
        self.blocks = nn.ModuleDict({str(i): WanBlock(config, mc) for i in layers})
        if last:
            self.head = nn.ParameterDict({"modulation": torch.empty(1, 2, D, dtype=dtype)})
            self.head["head"] = nn.Linear(D, config.out_dim * math.prod(config.patch_size), dtype=dtype)
            parallel.mark_replicated(self.head.parameters(), mc)
        self._input: torch.Tensor | None = None

    def set_input_tensor(self, tensor) -> None:
        """Called by the pipeline schedule with what the previous stage sent, or None."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        y: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Takes latents [B, C, F, H, W], t [B] in [0, 1000] and text [B, T, text_dim], zero-padded. Image-to-video also
        takes y [B, 4 + C, F, H, W] (mask and latents of the given frames) and image [B, I, image_dim] (their CLIP
        features).

        Returns on the last pipeline stage the predicted velocity of this rank's tokens [L(/tp), B, C*patch] (see
        `unpatchify`). Other stages return the tensor to send, [L(/tp) + 7 + T + I, B, D].
        """
        dtype, (_, _, *grid) = self.config.params_dtype, latents.shape
        assert (y is None) == (image is None) == (self.wan.image_dim is None), f"{self.wan.task} with y or image"
        if self.first:
            latents = latents if y is None else torch.cat((latents, y), dim=1)  # 16 + 20 channels
            x = parallel.local_tokens(patchify(latents, self.wan.patch_size), self.config).to(dtype)
            x = F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)  # [L(/tp), B, D]
            temb = self.time_embedding(sinusoid(t, self.wan.freq_dim).to(dtype))  # [B, D]
            modulation = self.time_projection(temb).unflatten(1, (6, -1)).transpose(0, 1)  # [6, B, D]
            text = self.text_embedding(text.transpose(0, 1).to(dtype))  # [T, B, D]
            temb = temb.unsqueeze(0)  # [1, B, D]
            image = text[:0] if image is None else self.img_emb(image.to(dtype))  # [I, B, D]
        else:
            context = (6, 1, text.shape[1], 0 if image is None else image.shape[1])
            x, modulation, temb, text, image = self._input.split([self._input.shape[0] - sum(context), *context])
        rope = rotary_table(grid, self.wan, latents.device)  # [F*H*W, 1, 1, E/2, 2]
        rope = rope.chunk(self.config.context_parallel_size)[parallel.mpu.get_context_parallel_rank()]

        # All blocks read the same rows: copied once, their gradient takes one all-reduce instead of one per block.
        keys = parallel.copy_to_tensor_model_parallel_region(text)
        image_keys = None if self.wan.image_dim is None else parallel.copy_to_tensor_model_parallel_region(image)
        for block in self.blocks.values():
            x = parallel.with_recomputation(block, self.recompute, self.offload)(x, modulation, keys, image_keys, rope)

        if not self.last:
            return torch.cat((x, modulation, temb, text, image))
        shift, scale = (self.head["modulation"].float().transpose(0, 1) + temb.float()).unbind(0)  # [B, D] each
        return self.head["head"](ops.layer_norm_modulate(x, scale, shift, self.wan.eps))  # [L(/tp), B, C*patch]


def _mlp(inputs: int, hidden: int, outputs: int, activation: nn.Module, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden, dtype=dtype), activation, nn.Linear(hidden, outputs, dtype=dtype))


def patchify(x: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """[B, C, F, H, W] -> [L, B, C*pt*ph*pw]. Tokens are in (frame, row, column) order, the entries of a patch in the
    order of the convolution's weight."""
    B, C, F_, H, W = x.shape
    pt, ph, pw = patch
    x = x.reshape(B, C, F_ // pt, pt, H // ph, ph, W // pw, pw)
    return x.permute(2, 4, 6, 0, 1, 3, 5, 7).flatten(4).flatten(0, 2)


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> torch.Tensor:
    """Head output [L, B, pt*ph*pw*C] (channels last, as released) -> [B, C, F, H, W]; grid: (F, H, W) of the result."""
    (F_, H, W), (pt, ph, pw) = grid, patch
    x = tokens.unflatten(2, (pt, ph, pw, -1)).unflatten(0, (F_ // pt, H // ph, W // pw))
    return x.permute(3, 7, 0, 4, 1, 5, 2, 6).reshape(tokens.shape[1], -1, F_, H, W)


def velocity_tokens(v: torch.Tensor, patch: tuple[int, int, int]) -> torch.Tensor:
    """[B, C, F, H, W] -> [L, B, pt*ph*pw*C], in the order of the head's output. The inverse of `unpatchify`."""
    return patchify(v, patch).unflatten(2, (v.shape[1], -1)).transpose(2, 3).flatten(2)


def sinusoid(t: torch.Tensor, width: int) -> torch.Tensor:
    """Embeds timesteps [B] -> [B, width] fp32: cosines, then sines, of t / 10000^(i / (width/2))."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


_ROPE_CACHE: dict = {}


def rotary_table(grid: list[int], config: WanConfig, device: torch.device) -> torch.Tensor:
    """Returns (cos, sin) of every token's angles, [tokens, 1, 1, E/2, 2] fp32. grid: (F, H, W) of the latents.

    Rows and columns take 2*(E//6) of the head dimension each, frames take the rest. Angles are computed in float64.
    """
    key = (*grid, config.head_dim, device)
    if key not in _ROPE_CACHE:
        sizes = [n // p for n, p in zip(grid, config.patch_size, strict=True)]
        side = 2 * (config.head_dim // 6)
        angles = []
        for axis, (n, width) in enumerate(zip(sizes, (config.head_dim - 2 * side, side, side), strict=True)):
            inverse = 1e4 ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
            view = [1, 1, 1, -1]
            view[axis] = n
            angles.append(torch.outer(torch.arange(n, dtype=torch.float64), inverse).view(view).expand(*sizes, -1))
        angles = torch.cat(angles, dim=-1).flatten(0, 2)[:, None, None]  # [L, 1, 1, E/2]
        if len(_ROPE_CACHE) > 64:  # bounds the memory if grids vary
            _ROPE_CACHE.clear()
        _ROPE_CACHE[key] = torch.stack((angles.cos(), angles.sin()), dim=-1).float().to(device)
    return _ROPE_CACHE[key]


# ---------------------------------------------------------------------------------------------- this rank's part


def build(o, config: WanConfig, where: torch.device | None = None) -> list[WanDiT]:
    """Builds this rank's model chunks, unwrapped, with uninitialised parameters on this rank's device or on `where`."""
    mc = parallel.megatron_config(o, hidden=config.dim, heads=config.num_heads, layers=config.num_layers)
    chunks = []
    with where or device.current():
        for i in range(o.vpp):
            stage = None if o.vpp == 1 else i
            first = parallel.mpu.is_pipeline_first_stage(ignore_virtual=stage is None, vp_stage=stage)
            last = parallel.mpu.is_pipeline_last_stage(ignore_virtual=stage is None, vp_stage=stage)
            layers = parallel.stage_layers(o, config.num_layers, i)
            chunks.append(WanDiT(config, mc, layers, first, last, o.recompute, o.offload_activations))
            chunks[-1].vp_stage = stage
    return chunks


def draw(name: str, whole: torch.Tensor, generator: torch.Generator) -> None:
    """Fills a whole parameter with the original code's initial values: Xavier-uniform for linears; normal with standard
    deviation 0.02 for the text and time MLPs, D^-0.5 for modulation; 1 for norms; 0 for biases, head, image
    positions."""
    if name.endswith("modulation"):
        whole.normal_(std=whole.shape[-1] ** -0.5, generator=generator)
    elif name.startswith("head.") or name.endswith((".bias", "emb_pos")):
        whole.zero_()
    elif whole.dim() == 1:  # the weights of norms
        whole.fill_(1.0)
    elif name.startswith(("text_embedding", "time_embedding")):
        whole.normal_(std=0.02, generator=generator)
    else:
        torch.nn.init.xavier_uniform_(whole.flatten(1), generator=generator)
