#!/usr/bin/env bash
# Generate text with Qwen3: one answer, printed token by token, or the answers to a file of prompts.
#
#   bash zoo/deepseek3/generate.sh --weights Qwen3-8B --prompt "Why is the sky blue?"
#   NPROC=4 bash zoo/deepseek3/generate.sh --tp 4 --weights Qwen3-32B --prompts questions.txt --out answers.jsonl
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch infer "$@"
