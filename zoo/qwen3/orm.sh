#!/usr/bin/env bash
# Outcome reward model on Qwen3: one score for an answer, from pairs of answers.
#
#   bash zoo/qwen3/orm.sh                                    tiny model ranks sorted digits above unsorted, any laptop
#   NPROC=8 bash zoo/qwen3/orm.sh --size 8B --weights Qwen3-8B --data pairs.jsonl --export my-orm
#   bash zoo/qwen3/orm.sh --weights my-orm --score answers.jsonl --out scores
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job orm "$@"
