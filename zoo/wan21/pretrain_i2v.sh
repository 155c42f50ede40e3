#!/usr/bin/env bash
# Pretrain Wan2.1 image-to-video: from the first frame, or (size 14B-flf2v) from the first and the last.
#
#   bash zoo/wan21/pretrain_i2v.sh                           tiny model on the demo clips, two idle cores, about 5 minutes
#   bash zoo/wan21/pretrain_i2v.sh --weights Wan2.1-I2V-14B-480P-Diffusers --data my.jsonl --layout 14B-i2v-cp2
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job pretrain --task i2v "$@"
