#!/usr/bin/env bash
# The tests, on the CPU of any machine:
#
#   bash tests/run.sh                       all of them
#   bash tests/run.sh tests/test_cli.py -x  whatever pytest understands
#   bash tests/run.sh --changed [COMMIT]    those that a change touches, since COMMIT or not committed yet
set -euo pipefail
export ZOO_DEVICE=cpu
# Two files run at a time: idle threads of OpenMP would spin. A process that compiles starts no others for it.
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
unset PYTHONDONTWRITEBYTECODE # else each process that a test starts compiles anew what it imports of this tree
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
cd "$ZOO_ROOT"
# A CPU build of torch brings no triton; the tests interpret the kernels.
"$ZOO_PYTHON" -c 'import triton' 2>/dev/null ||
    "$ZOO_PYTHON" -m pip install --quiet --no-compile --no-deps triton==3.7.1 ||
    echo "triton 3.7.1 could not be installed: the kernels' tests will be skipped" >&2
# So are packages that a job asks for only when it is used, if this is our own .venv; none of its pins may change.
if [ "$ZOO_PYTHON" = "$ZOO_ROOT/.venv/bin/python" ] && ! "$ZOO_PYTHON" -c 'import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, ("lm_eval", "pyarrow"))))'; then
    echo "installing tests/requirements.txt into .venv (once, about a minute)" >&2
    "$ZOO_PYTHON" -m pip list --format=freeze >.venv/.kept
    "$ZOO_PYTHON" -m pip install --quiet -r tests/requirements.txt -c .venv/.kept ||
        echo "tests/requirements.txt could not be installed: tests of lm-eval and parquet will be skipped" >&2
fi
if [ "${1:-}" = --changed ]; then
    files="$(PYTHONPATH="$PYTHONPATH:tests" "$ZOO_PYTHON" tests/changed.py "${2:-HEAD}")"
    [ -n "$files" ] || { echo "no test is touched"; exit 0; }
    printf 'touched: %s\n' $files
    set -- -n 2 --dist loadfile $files
fi
# Two files at a time, as a test waits for its processes a third of the time; those that take longest first.
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder tests/test_npu_library.py tests/test_wan21_layouts.py tests
exec "$ZOO_PYTHON" -m pytest "$@"
