#!/usr/bin/env bash
# Preference optimisation (Diffusion-DPO) of Wan2.1 text-to-video on pairs of videos with one caption. The reference is
# the starting model. Trains adapters, or with --full every parameter, which takes a frozen copy of the model.
#
#   bash zoo/wan21/dpo_t2v.sh                                the demo's tiny model learns to prefer blinking, any laptop
#   NPROC=8 bash zoo/wan21/dpo_t2v.sh --size 14B --weights Wan2.1-T2V-14B-Diffusers --data pairs.jsonl --lr 1e-5
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../common/env.sh"
launch train --job dpo --task t2v "$@"
