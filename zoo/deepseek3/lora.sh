#!/usr/bin/env bash
# Low-rank adapters (LoRA) for DeepSeek-V3, in PEFT's folder format, loss on the assistant's tokens.
#
#   bash zoo/deepseek3/lora.sh                                   tiny model learns a second task, any laptop
#   NPROC=8 NNODES=8 bash zoo/deepseek3/lora.sh --layout 671B-lora --weights DeepSeek-V3 --data chats.jsonl --export my-adapter
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job lora "$@"
