#!/usr/bin/env bash
# The tests, on the CPU of any machine:
#
#   bash tests/run.sh                       all of them
#   bash tests/run.sh tests/test_cli.py -x  whatever pytest understands
set -euo pipefail
export ZOO_DEVICE=cpu
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
cd "$ZOO_ROOT"
# A CPU build of torch brings no triton; the tests interpret the kernels.
"$ZOO_PYTHON" -c 'import triton' 2>/dev/null ||
    "$ZOO_PYTHON" -m pip install --quiet --no-compile --no-deps triton==3.7.1 ||
    echo "triton 3.7.1 could not be installed: the kernels' tests will be skipped" >&2
# Two files at a time, as a test waits for its processes a third of the time; those that take longest first.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder tests/test_npu_library.py tests/test_wan21_layouts.py tests
exec "$ZOO_PYTHON" -m pytest "$@"
