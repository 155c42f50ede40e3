"""Reads Megatron-LM's legacy checkpoints (`--ckpt-format torch`), which Megatron-LM and MindSpeed-LLM write in training.

    FOLDER/latest_checkpointed_iteration.txt                  names iter_0001000, or release
    FOLDER/iter_0001000/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt

TT tensor parallel rank, PPP pipeline stage and EEE expert parallel rank where there are several. Each file holds the
`model` of its rank, or `model0`, `model1`, … of its interleaved chunks, layers counted from 0 in every chunk:

    linear_qkv.weight [K/tp * (n+2) * E, D]      for every key head its n query heads, the key head, the value head
    linear_fc1.weight [2 * F/tp, D]              gate above up, on each tensor parallel rank
    experts.weight1 [D, local * 2F], weight2     the grouped experts' memory, [local, D, 2F] and [local, F, D]
    word_embeddings, output_layer                rows padded beyond the vocabulary, which are left out

`index` finds the slices of every tensor. Which tensors a model has, and what its own names are, the recipe says.

These files are pickles. Only torch's restricted reader opens them, with megatron-core's own list of harmless types;
whatever asks for more is refused. Tensors are memory-mapped: optimizer states are never read.
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
FUSED = {  # Transformer Engine keeps a norm inside the linear behind it
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
SPLIT = {"linear_qkv": 0, "linear_fc1": 0, "word_embeddings": 0, "output_layer": 0, "linear_proj": 1, "linear_fc2": 1}


def is_checkpoint(folder: Path) -> bool:
    return (folder / TRACKER).is_file() or any(folder.glob("mp_rank_*"))


def files(folder: Path) -> dict[tuple[int, ...], Path]:
    """The file of every rank, by the numbers in its folder's name.

    Raises:
        ValueError: none, or of a newer format.
    """
    if (folder / TRACKER).is_file():
        iteration = (folder / TRACKER).read_text().strip()
        folder /= f"iter_{int(iteration):07d}" if iteration.isdecimal() else iteration
    found = {tuple(map(int, re.findall(r"\d+", p.parent.name))): p for p in sorted(folder.glob(f"mp_rank_*/{FILE}"))}
    if len({len(rank) for rank in found}) != 1:
        newer = " (it is of the format torch_dist)" if (folder / ".metadata").is_file() else ""
        raise ValueError(
            f"{folder} holds no legacy Megatron-LM checkpoint{newer}; expected mp_rank_TT[_PPP][_EEE]/{FILE} for every "
            "rank; fix: --weights, or let Megatron-LM write it with --ckpt-format torch"
        )
    return found


def _read(path: Path) -> dict:
    import torch
    from megatron.core.safe_globals import SAFE_GLOBALS

    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        said = re.search(
            r"[Uu]nsupported (?:global: )?(?:GLOBAL \S+|operand \d+)|Can only .*|mmap can only .*", str(error)
        )
        raise ValueError(
            f"{path} is a pickle that torch's restricted reader refuses: {said[0] if said else error}; expected tensors, "
            "plain values and megatron-core's own types, of pickle protocol 2; fix: strip it where you trust it (README)"
        ) from None


def _chunks(loaded: dict) -> list[dict]:
    names = [key for key in loaded if re.fullmatch(r"model\d*", str(key))]
    return [loaded[name] for name in sorted(names, key=lambda name: int(name[5:] or 0))]


def _layers(chunk: dict) -> list[int]:
    """A chunk's own numbers of its layers: without gaps, but where MindSpeed-LLM left one out (noop)."""
    return sorted({int(key.split(".")[2]) for key in chunk if key.startswith("decoder.layers.")})


def _canonical(chunk: dict, D: int, width: int) -> Iterator[tuple[str, "torch.Tensor"]]:
    """A chunk's tensors under the names of separate norms and separate experts; width: columns of an expert here."""
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
    """Ranks over which one expert's columns are split: 1 or tp."""
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
    """Every tensor's slices over tensor parallel, by its key in a model of one rank with separate experts, mapped.

    Args:
        config: has hidden_size, vocab_size, tie_word_embeddings, num_experts (0: dense) and moe_intermediate_size.
        expected: whole shapes by these keys.
        args: what Megatron-LM's arguments must be, by their names, where the files say them.

    Raises:
        ValueError: files that are refused, missing, extra or misshaped tensors, args of another model.
    """
    import torch

    loaded = {rank: _read(path) for rank, path in files(folder).items()}
    if any(not _chunks(values) for values in loaded.values()):
        raise ValueError(f"{folder} has files without `model` or `model0`; fix: --weights")
    if all(len(rank) == 2 for rank in loaded) and all(EMBEDDING in _chunks(values)[0] for values in loaded.values()):
        loaded = {(tp, 0, ep): values for (tp, ep), values in loaded.items()}  # no pipeline: the second number is EEE
    loaded = {(*rank, 0, 0)[:3]: values for rank, values in loaded.items()}
    said = next(iter(loaded.values())).get("args") or argparse.Namespace()
    for name, wanted in args.items():
        if getattr(said, name, None) not in (None, wanted):
            raise ValueError(f"{folder} has {name}={getattr(said, name)}; expected {wanted}; fix: --size")

    tp, pp = (1 + max(rank[i] for rank in loaded) for i in (0, 1))
    lost = {(t, p) for t in range(tp) for p in range(pp)} - {rank[:2] for rank in loaded}
    if lost:
        raise ValueError(f"{folder} lacks the files of (tensor, pipeline) ranks {sorted(lost)}; fix: --weights")
    stages = {p: _chunks(next(values for rank, values in sorted(loaded.items()) if rank[1] == p)) for p in range(pp)}
    order = [(p, v) for v in range(len(stages[0])) for p in range(pp)]
    if NORM not in stages[pp - 1][-1]:
        raise ValueError(
            f"{folder}: no final norm at the end of its last stage; expected stages in Megatron-LM's order (not "
            "DualPipe-V's); fix: convert it to released with the tool that wrote it"
        )
    places = [(p, v, local) for p, v in order for local in _layers(stages[p][v])]
    number = {place: i for i, place in enumerate(places)}  # of a layer in the whole model

    every = {key: tensor for chunks in stages.values() for chunk in chunks for key, tensor in chunk.items()}
    etp = _expert_parallel(said, every, tp, config.moe_intermediate_size, folder)
    width = config.moe_intermediate_size // etp
    found: dict[str, dict[int, torch.Tensor]] = {}
    owners = sorted({(ep, t) for t, _, ep in loaded})
    for (t, p, ep), values in sorted(loaded.items(), key=lambda item: item[0][::-1]):
        for v, chunk in enumerate(_chunks(values)):
            named = dict(_canonical(chunk, config.hidden_size, max(width, 1)))
            local = len({key.split(".")[6] for key in named if ".local_experts." in key})
            # Whole experts: each file has its own (MindSpeed-LLM's moe_tp_extend_ep), or each expert parallel rank has.
            apart = etp == 1 and local * len(owners) == config.num_experts
            before = local * (owners.index((ep, t)) if apart else ep)
            for key, tensor in named.items():
                parts = key.split(".")
                if key.startswith("decoder.layers."):
                    parts[2] = str(number.get((p, v, int(parts[2])), f"{parts[2]} of rank {t}"))
                if ".local_experts." in key:
                    parts[6] = str(before + int(parts[6]))
                whole = _split(key) is None or ".local_experts." in key and etp == 1
                found.setdefault(".".join(parts), {}).setdefault(0 if whole else t, tensor)
    slices = {key: [by_rank[t] for t in sorted(by_rank)] for key, by_rank in found.items()}
    _check(slices, config, expected, folder)
    return slices


def _split(key: str) -> int | None:
    """The dimension that tensor parallel splits."""
    return next((dim for part, dim in SPLIT.items() if part in key), None)


def _check(slices: dict, config, expected: dict, folder: Path) -> None:
    import torch

    head, embedding = slices.get(HEAD), slices.get(EMBEDDING)
    if config.tie_word_embeddings and head:  # on the last pipeline stage
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
    """The slices of a tensor put together; of linear_fc1 gate and up apart, [2, F, D]."""
    import torch

    if "linear_fc1" in key:
        return torch.cat([part.view(2, -1, part.shape[-1]) for part in slices], 1)
    return torch.cat(slices, _split(key) or 0)


def query_key_value(slices: list["torch.Tensor"], part: str, n: int, E: int) -> "torch.Tensor":
    """The q, k or v rows of linear_qkv with n query heads per key head, [heads * E, D]."""
    import torch

    rows = {"q": slice(0, n), "k": slice(n, n + 1), "v": slice(n + 1, n + 2)}[part]
    return torch.cat([t.view(-1, n + 2, E, t.shape[-1])[:, rows].reshape(-1, t.shape[-1]) for t in slices])
