#!/usr/bin/env bash
# Finetune a released Wan2.1 image-to-video transformer on your videos (every parameter).
#
#   bash zoo/wan21/finetune_i2v.sh                           the demo's trained tiny model, on the demo clips
#   bash zoo/wan21/finetune_i2v.sh --weights Wan2.1-I2V-14B-480P-Diffusers --data my.jsonl --lr 1e-5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job finetune --task i2v "$@"
