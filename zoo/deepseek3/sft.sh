#!/usr/bin/env bash
# Instruction tuning of Qwen3, all parameters, loss on the assistant's tokens.
#
#   bash zoo/deepseek3/sft.sh                                    tiny model, a task with checkable answers, any laptop
#   NPROC=8 bash zoo/deepseek3/sft.sh --size 8B --weights Qwen3-8B --data chats.jsonl --export my-8B
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job sft "$@"
