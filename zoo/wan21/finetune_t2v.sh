#!/usr/bin/env bash
# Finetune a released Wan2.1 text-to-video transformer on your videos (every parameter).
#
#   bash zoo/wan21/finetune_t2v.sh                           the demo's trained tiny model, on the demo clips
#   bash zoo/wan21/finetune_t2v.sh --weights Wan2.1-T2V-1.3B-Diffusers --data my.jsonl --lr 1e-5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job finetune --task t2v "$@"
