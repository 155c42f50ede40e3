#!/usr/bin/env bash
# Instruction tuning of DeepSeek-V3, all parameters, loss on the assistant's tokens.
#
#   bash zoo/deepseek3/sft.sh                                    tiny model, a task with checkable answers, any laptop
#   NPROC=8 NNODES=64 bash zoo/deepseek3/sft.sh --layout 671B-sft --weights DeepSeek-V3 --data chats.jsonl --export my-V3
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job sft "$@"
