#!/usr/bin/env bash
# Convert DeepSeek-V3 weights between the released and the sharded layout, bit-exactly; merge a LoRA.
#
#   bash zoo/deepseek3/convert.sh --weights DeepSeek-V3 --to sharded --out DeepSeek-V3-sharded
#   bash zoo/deepseek3/convert.sh --weights runs/my-run/checkpoints/step-005000 --to released --out my-V3
#   bash zoo/deepseek3/convert.sh --weights DeepSeek-V3 --adapter my-lora --to released --out my-V3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch convert "$@"
