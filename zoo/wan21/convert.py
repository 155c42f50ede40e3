"""Name map between the two released layouts of Wan2.1, and conversion to and from sharded checkpoints.

Our parameter names and shapes are the original checkpoint's; diffusers renames them (and swaps norm2 and norm3) but
changes no tensor, so every conversion is a rename and bit-exact.
"""

import re

# original name -> diffusers name; `N` stands for a block index.
TABLE = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "blocks.N.modulation": "blocks.N.scale_shift_table",
    "blocks.N.norm3": "blocks.N.norm2",
    "blocks.N.ffn.0": "blocks.N.ffn.net.0.proj",
    "blocks.N.ffn.2": "blocks.N.ffn.net.2",
    **{
        f"blocks.N.{ours}.{part}": f"blocks.N.{theirs}.{new}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, new in {
            "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
        }.items()
    },
}  # fmt: skip


def to_diffusers(name: str) -> str:
    """'blocks.3.self_attn.q.weight' -> 'blocks.3.attn1.to_q.weight'. KeyError: not a name of this model."""
    module, _, leaf = name.rpartition(".") if not name.endswith("modulation") else (name, "", "")
    index = re.search(r"\.(\d+)\.", module) if module.startswith("blocks.") else None
    pattern = re.sub(r"^blocks\.\d+\.", "blocks.N.", module)
    new = TABLE[pattern].replace("N", index.group(1)) if index else TABLE[pattern]
    return f"{new}.{leaf}" if leaf else new
