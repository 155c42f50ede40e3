#!/usr/bin/env bash
# Low-rank adapters (LoRA) for Qwen3, in PEFT's folder format, loss on the assistant's tokens.
#
#   bash zoo/deepseek3/lora.sh                                   tiny model learns a second task, any laptop
#   NPROC=8 bash zoo/deepseek3/lora.sh --size 8B --weights Qwen3-8B --data chats.jsonl --export my-adapter
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job lora "$@"
