#!/usr/bin/env bash
# Preference optimisation (Diffusion-DPO) of Wan2.1 image-to-video on pairs of videos with one caption. The reference is
# the starting model. Trains adapters, or with --full every parameter, which takes a frozen copy of the model.
#
#   bash zoo/wan21/dpo_i2v.sh                                the demo's tiny model learns to prefer blinking, any laptop
#   NPROC=8 bash zoo/wan21/dpo_i2v.sh --size 14B-i2v --weights Wan2.1-I2V-14B-480P-Diffusers --data pairs.jsonl --lr 1e-5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job dpo --task i2v "$@"
