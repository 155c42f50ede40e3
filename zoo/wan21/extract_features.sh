#!/usr/bin/env bash
# Compute latents and text embeddings of your videos once, for training with --features DIR. A second run continues it.
#
#   bash zoo/wan21/extract_features.sh                       the demo's clips, with the demo's VAE and text encoder
#   NPROC=8 bash zoo/wan21/extract_features.sh --weights Wan2.1-T2V-14B-Diffusers --data my.jsonl --out features
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch extract "$@"
