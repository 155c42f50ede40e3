#!/usr/bin/env bash
# Generate text with DeepSeek-V3: one answer, printed token by token, or the answers to a file of prompts.
#
#   bash zoo/deepseek3/generate.sh --weights DeepSeek-V3 --prompt "Why is the sky blue?"
#   NPROC=8 NNODES=4 bash zoo/deepseek3/generate.sh --layout 671B-generate --weights DeepSeek-V3 --prompts questions.txt --out answers.jsonl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch infer "$@"
