#!/usr/bin/env bash
# Convert weights between the original Wan-AI layout, the diffusers layout and sharded checkpoints, bit-exactly.
#
#   bash zoo/wan21/convert.sh --weights Wan2.1-T2V-14B --to diffusers --out Wan2.1-T2V-14B-Diffusers
#   NPROC=8 bash zoo/wan21/convert.sh --weights Wan2.1-T2V-14B-Diffusers --to sharded --out ckpt --tp 8
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch convert "$@"
