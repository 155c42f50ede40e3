#!/usr/bin/env bash
# The tests, on the CPU of any machine:
#
#   bash tests/run.sh                       all of them
#   bash tests/run.sh tests/test_cli.py -x  whatever pytest understands
set -euo pipefail
export ZOO_DEVICE=cpu
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
cd "$ZOO_ROOT"
exec "$ZOO_PYTHON" -m pytest "$@"
