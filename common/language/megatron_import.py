"""Reads Megatron-LM's legacy checkpoints (`--ckpt-format torch`), which Megatron-LM and MindSpeed-LLM write.

    FOLDER/latest_checkpointed_iteration.txt                  names iter_0001000, or release
    FOLDER/iter_0001000/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

TT is the tensor parallel rank. PPP, the pipeline stage, and EEE, the expert parallel rank, are there if there are
several. Each file holds its rank's `model`, or its interleaved chunks `model0`, `model1`, …; every chunk counts its
layers from 0:

    linear_qkv.weight [K/tp * (n+2) * E, D]      for every key head its n query heads, the key head, the value head
    linear_fc1.weight [2 * F/tp, D]              gate above up, on each tensor parallel rank
    experts.weight1 [D, local * 2F], weight2     grouped experts; in memory [local, D, 2F] and [local, F, D]
    word_embeddings, output_layer                with padding rows after the vocabulary, which are left out

`index` finds the slices of every tensor. The recipe says which tensors a model has, and how it names them.

These files are pickles. Only torch's restricted reader opens them, with megatron-core's own list of harmless types; a
file that needs other types is refused. Tensors are memory-mapped, so optimizer states are never read.
"""

import argparse
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from common import weights

if TYPE_CHECKING:
    import torch

FILE, TRACKER = "model_optim_rng.pt", "latest_checkpointed_iteration.txt"
EMBEDDING, NORM, HEAD = "embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"
EXPERT = "mlp.experts.local_experts.{}.linear_{}.weight"
FUSED = {  # Transformer Engine keeps a norm inside the linear after it
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
SPLIT = {"linear_qkv": 0, "linear_fc1": 0, "word_embeddings": 0, "output_layer": 0, "linear_proj": 1, "linear_fc2": 1}


def is_checkpoint(folder: Path) -> bool:
    return (folder / TRACKER).is_file() or any(folder.glob("mp_rank_*"))


def files(folder: Path) -> dict[tuple[int, ...], Path]:
    """Returns the file of every rank, by the numbers in its folder's name.

    Raises:
        ValueError: there is no such file, or the checkpoint has a newer format.
    """
    if (folder / TRACKER).is_file():
        iteration = (folder / TRACKER).read_text().strip()
        folder /= f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
    paths = {tuple(map(int, re.findall(r"\d+", p.parent.name))): p for p in sorted(folder.glob(f"mp_rank_*/{FILE}"))}
    if len({len(rank) for rank in paths}) != 1:
        newer = " (it is of the format torch_dist)" if (folder / ".metadata").is_file() else ""
        raise ValueError(
            f"{folder} holds no legacy Megatron-LM checkpoint{newer}; expected mp_rank_TT[_PPP][_EEE]/{FILE} for every "
            "rank; fix: --weights, or let Megatron-LM write it with --ckpt-format torch"
        )
    return paths


def _read(path: Path) -> dict:
    import torch
    from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        why = re.search(
            r"[Uu]nsupported (?:global: )?(?:GLOBAL \S+|operand \d+)|Can only .*|mmap can only .*", str(error)
        )
        raise ValueError(
            f"{path} is a pickle that torch's restricted reader refuses: {why[0] if why else error}; expected tensors, "
            "plain values and megatron-core's own types, of pickle protocol 2; fix: strip it where you trust it (README)"
        ) from None


def _chunks(loaded: dict) -> list[dict]:
    names = [key for key in loaded if re.fullmatch(r"model\d*", str(key))]
    return [loaded[name] for name in sorted(names, key=lambda name: int(name[5:] or 0))]


def _layers(chunk: dict) -> list[int]:
    """Returns a chunk's own layer numbers. They have gaps only where MindSpeed-LLM left a layer out (noop)."""
    return sorted({int(key.split(".")[2]) for key in chunk if key.startswith("decoder.layers.")})


def _canonical(chunk: dict, D: int, width: int) -> Iterator[tuple[str, "torch.Tensor"]]:
    """Yields a chunk's tensors, named with separate norms and separate experts. width: columns of an expert here."""
    for key, value in chunk.items():
        stem, name = re.fullmatch(r"(decoder\.layers\.\d+\.|)(.+)", key).groups()
        if name.endswith("_extra_state"):  # Transformer Engine's fp8 scales
            continue
        if grouped := re.fullmatch(r"mlp\.experts\.linear_(fc[12])\.weight(\d+)", name):
            name = EXPERT.format(grouped[2], grouped[1])
        if name == "mlp.experts.weight1" and value.numel() % (D * 2 * width) == 0:
            value = value.view(-1, D, 2 * width)
            yield from ((stem + EXPERT.format(e, "fc1"), value[e].t()) for e in range(len(value)))
        elif name == "mlp.experts.weight2" and value.numel() % (D * width) == 0:
            value = value.view(-1, width, D)
            yield from ((stem + EXPERT.format(e, "fc2"), value[e].t()) for e in range(len(value)))
        else:
            yield stem + FUSED.get(name, name), value


def _expert_parallel(args, chunk: dict, tp: int, width: int, folder: Path) -> int:
    """Returns the number of ranks over which an expert's columns are split: 1 or tp."""
    keys = [key for key in chunk if re.search(r"experts\..*linear_fc1\.weight", key)]
    if tp == 1 or not any("experts" in key for key in chunk):
        return tp
    if keys:
        return 1 if chunk[keys[0]].shape[0] == 2 * width else tp
    if not hasattr(args, "expert_tensor_parallel_size") and not hasattr(args, "moe_tp_extend_ep"):
        raise ValueError(
            f"{folder} has grouped experts and no args that say how {tp} tensor parallel ranks share them; expected "
            "expert_tensor_parallel_size; fix: keep `args` in its files"
        )
    return 1 if getattr(args, "moe_tp_extend_ep", False) else getattr(args, "expert_tensor_parallel_size", None) or tp


def index(folder: Path, config, expected: dict[str, tuple[int, ...]], args: dict) -> dict[str, list["torch.Tensor"]]:
    """Returns every tensor's memory-mapped slices over tensor parallel ranks, by the tensor's key in a model of one
    rank with separate experts.

    Args:
        config: has hidden_size, vocab_size, tie_word_embeddings, num_experts (0: dense) and moe_intermediate_size.
        expected: whole shapes by these keys.
        args: the values that Megatron-LM's arguments must have, by their names, if the files hold them.

    Raises:
        ValueError: a file is refused; tensors are missing, extra or misshaped; or the args are those of another model.
    """
    import torch

    loaded = {rank: _read(path) for rank, path in files(folder).items()}
    if any(not _chunks(values) for values in loaded.values()):
        raise ValueError(f"{folder} has files without `model` or `model0`; fix: --weights")
    if all(len(rank) == 2 for rank in loaded) and all(EMBEDDING in _chunks(values)[0] for values in loaded.values()):
        loaded = {(tp, 0, ep): values for (tp, ep), values in loaded.items()}  # no pipeline: the second number is EEE
    loaded = {(*rank, 0, 0)[:3]: values for rank, values in loaded.items()}
    saved_args = next(iter(loaded.values())).get("args") or argparse.Namespace()
    for name, wanted in args.items():
        if getattr(saved_args, name, None) not in (None, wanted):
            raise ValueError(f"{folder} has {name}={getattr(saved_args, name)}; expected {wanted}; fix: --size")

    tp, pp = (1 + max(rank[i] for rank in loaded) for i in (0, 1))
    missing = {(t, p) for t in range(tp) for p in range(pp)} - {rank[:2] for rank in loaded}
    if missing:
        raise ValueError(f"{folder} lacks the files of (tensor, pipeline) ranks {sorted(missing)}; fix: --weights")
    stages = {p: _chunks(next(values for rank, values in sorted(loaded.items()) if rank[1] == p)) for p in range(pp)}
    order = [(p, v) for v in range(len(stages[0])) for p in range(pp)]
    if NORM not in stages[pp - 1][-1]:
        raise ValueError(
            f"{folder}: no final norm at the end of its last stage; expected stages in Megatron-LM's order (not "
            "DualPipe-V's); fix: convert it to released with the tool that wrote it"
        )
    places = [(p, v, local) for p, v in order for local in _layers(stages[p][v])]
    layer_number = {place: i for i, place in enumerate(places)}  # in the whole model

    tensors = {key: tensor for chunks in stages.values() for chunk in chunks for key, tensor in chunk.items()}
    etp = _expert_parallel(saved_args, tensors, tp, config.moe_intermediate_size, folder)
    width = config.moe_intermediate_size // etp
    by_key: dict[str, dict[int, torch.Tensor]] = {}
    owners = sorted({(ep, t) for t, _, ep in loaded})
    for (t, p, ep), values in sorted(loaded.items(), key=lambda item: item[0][::-1]):
        for v, chunk in enumerate(_chunks(values)):
            named = dict(_canonical(chunk, config.hidden_size, max(width, 1)))
            local = len({key.split(".")[6] for key in named if ".local_experts." in key})
            # Unsplit experts: each file has its own (MindSpeed-LLM's moe_tp_extend_ep), or each expert parallel rank.
            per_file = etp == 1 and local * len(owners) == config.num_experts
            first_expert = local * (owners.index((ep, t)) if per_file else ep)
            for key, tensor in named.items():
                parts = key.split(".")
                if key.startswith("decoder.layers."):
                    parts[2] = str(layer_number.get((p, v, int(parts[2])), f"{parts[2]} of rank {t}"))
                if ".local_experts." in key:
                    parts[6] = str(first_expert + int(parts[6]))
                unsplit = _split(key) is None or ".local_experts." in key and etp == 1
                by_key.setdefault(".".join(parts), {}).setdefault(0 if unsplit else t, tensor)
    slices = {key: [by_rank[t] for t in sorted(by_rank)] for key, by_rank in by_key.items()}
    _check(slices, config, expected, folder)
    return slices


def _split(key: str) -> int | None:
    """Returns the dimension that tensor parallelism splits, or None."""
    return next((dim for part, dim in SPLIT.items() if part in key), None)


def _check(slices: dict, config, expected: dict, folder: Path) -> None:
    import torch

    head, embedding = slices.get(HEAD), slices.get(EMBEDDING)
    if config.tie_word_embeddings and head:  # the last pipeline stage has a copy
        if len(head) != len(embedding or ()) or not all(map(torch.equal, head, embedding)):
            raise ValueError(
                f"{folder}: output_layer differs from the embedding it is tied to; fix: --size or --weights"
            )
        del slices[HEAD]
    dtypes = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # as safetensors calls them
    entries = {}
    for key, parts in slices.items():
        shape, dim = list(parts[0].shape), _split(key)
        if dim is not None and len(shape) > dim:
            shape[dim] = sum(part.shape[dim] for part in parts)
        if key in (EMBEDDING, HEAD):
            shape[0] = min(shape[0], config.vocab_size)
        dtype = dtypes.get(parts[0].dtype, str(parts[0].dtype))
        entries[key] = SimpleNamespace(shape=tuple(shape), dtype=dtype)
    weights.check(entries, expected, folder)


def whole(slices: list["torch.Tensor"], key: str) -> "torch.Tensor":
    """Joins the slices of a tensor. linear_fc1 becomes [2, F, D], which separates gate and up."""
    import torch

    if "linear_fc1" in key:
        return torch.cat([part.view(2, -1, part.shape[-1]) for part in slices], 1)
    return torch.cat(slices, _split(key) or 0)


def query_key_value(slices: list["torch.Tensor"], part: str, n: int, E: int) -> "torch.Tensor":
    """Returns the q, k or v rows [heads * E, D] of linear_qkv, which has n query heads per key head."""
    import torch

    rows = {"q": slice(0, n), "k": slice(n, n + 1), "v": slice(n + 1, n + 2)}[part]
    return torch.cat([t.view(-1, n + 2, E, t.shape[-1])[:, rows].reshape(-1, t.shape[-1]) for t in slices])
