#!/usr/bin/env bash
# Convert Qwen3 weights between the released and the sharded layout, bit-exactly; import from Megatron-LM; merge a LoRA.
#
#   bash zoo/deepseek3/convert.sh --weights Qwen3-8B --to sharded --out Qwen3-8B-sharded
#   bash zoo/deepseek3/convert.sh --weights runs/my-run/checkpoints/step-005000 --to released --out my-8B
#   bash zoo/deepseek3/convert.sh --weights Qwen3-8B --adapter my-lora --to released --out my-8B
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch convert "$@"
