# Sourced by every launcher. Finds the device, makes `.venv` with the pinned packages on first use, reads the topology
# (NPROC devices per node, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, or Slurm's), and defines
#
#     launch JOB [options]     check the options, then run zoo/<this recipe>/JOB.py on every device
#
# ZOO_DEVICE=npu|cuda|cpu overrides detection; ZOO_PYTHON uses that interpreter as it is, without a .venv.
set -euo pipefail

ZOO_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$ZOO_ROOT${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTHONSAFEPATH=1 # never import a folder named common or zoo from the user's working directory
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" PYTHONWARNINGS="${PYTHONWARNINGS:-ignore}"

if [ -z "${ZOO_DEVICE:-}" ]; then
    if [ -e /dev/davinci_manager ] || command -v npu-smi >/dev/null 2>&1; then ZOO_DEVICE=npu
    elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q .; then ZOO_DEVICE=cuda
    else ZOO_DEVICE=cpu; fi
fi
export ZOO_DEVICE

# Install torch first, in the build for the device. As another package's dependency it would bring gigabytes of CUDA to
# a laptop. Only the first cpu route (a CPU wheel that pip finds) has been run; the others are untested.
HAS_TORCH='import torch, sys; sys.exit(not torch.__version__.startswith("2.13."))'
install_torch() {
    local pip="$1 -m pip install --quiet --no-compile"
    if "$1" -c "$HAS_TORCH" 2>/dev/null; then return; fi
    if [ "$ZOO_DEVICE" = cuda ]; then $pip torch==2.13.0; return; fi
    $pip torch==2.13.0+cpu 2>/dev/null ||
        { echo "no CPU build of torch found: installing the default one, which may bring CUDA packages" >&2; $pip torch==2.13.0; }
    if [ "$ZOO_DEVICE" = npu ]; then $pip torch_npu==2.13.0 pyyaml; fi
}

setup() {
    local venv="$ZOO_ROOT/.venv" stamp
    stamp="$ZOO_DEVICE $(cksum <"$ZOO_ROOT/requirements.txt")"
    if [ "$(cat "$venv/.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "setting up $venv (once, about a minute; more where cores are busy)" >&2
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            { echo "error: python3 is missing or too old; expected Python 3.11 or newer" >&2; exit 2; }
        # Keep an image's own torch of the right version; CANN containers have one.
        local site=""
        if python3 -c "$HAS_TORCH" 2>/dev/null; then site=--system-site-packages; fi
        [ -x "$venv/bin/python" ] || python3 -m venv $site "$venv"
        install_torch "$venv/bin/python"
        grep -v '^torch==' "$ZOO_ROOT/requirements.txt" >"$venv/.requirements"
        "$venv/bin/python" -c 'import torch; print("torch==" + torch.__version__)' >"$venv/.constraints"
        "$venv/bin/python" -m pip install --quiet --no-compile -r "$venv/.requirements" -c "$venv/.constraints"
        if [ "$ZOO_DEVICE" != cuda ] && "$venv/bin/python" -m pip list 2>/dev/null | grep -q '^nvidia-'; then
            echo "error: CUDA packages arrived on $ZOO_DEVICE; fix: remove $venv, install a CPU build of torch first" >&2
            exit 2
        fi
        # Compile now, on all cores: where an image forbids Python to write bytecode, each start would compile for 10 s.
        "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" >/dev/null || true  # packages' templates do not compile
        echo "$stamp" >"$venv/.stamp"
    fi
    ZOO_PYTHON="$venv/bin/python"
}
# If torch_npu is installed but CANN is not loaded, a plain `import torch` would fail.
if [ -z "${ASCEND_HOME_PATH:-}" ]; then export TORCH_DEVICE_BACKEND_AUTOLOAD=0; fi
if [ -z "${ZOO_PYTHON:-}" ]; then setup; fi

# The topology is Slurm's in a Slurm step, else one node. NPROC defaults to all accelerators, or to one CPU process.
if [ -n "${SLURM_NNODES:-}" ]; then
    export NNODES="${NNODES:-$SLURM_NNODES}" NODE_RANK="${NODE_RANK:-${SLURM_NODEID:-}}"
    export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
fi
if [ -z "${NPROC:-}" ]; then
    case "$ZOO_DEVICE" in
        npu) NPROC=$(ls -d /dev/davinci[0-9]* 2>/dev/null | wc -l) ;;
        cuda) NPROC=$(nvidia-smi -L | wc -l) ;;
        cpu) NPROC=1 ;;
    esac
fi
export NPROC NNODES="${NNODES:-1}"
if [ "$ZOO_DEVICE" = cpu ]; then # malloc keeps freed memory: returning and faulting it in again takes a sixth of a step
    export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-33554432}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-2000000000}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( $(nproc) > NPROC ? $(nproc) / NPROC : 1 ))}"
fi

ZOO_ARGUMENTS="$([ $# -eq 0 ] || printf ' %q' "$@")" # "$@" is the launcher's: launchers source this without arguments
launch() {
    local recipe launcher="${BASH_SOURCE[1]}"
    recipe="$(basename "$(cd "$(dirname "$launcher")" && pwd)")"
    ZOO_COMMAND="$([ "$NPROC$NNODES" = 11 ] || echo "NPROC=$NPROC ")$([ "$NNODES" = 1 ] || echo "NNODES=$NNODES ")"
    export ZOO_COMMAND+="bash zoo/$recipe/$(basename "$launcher")$ZOO_ARGUMENTS"
    exec "$ZOO_PYTHON" -m common.cli "zoo.$recipe" "$@"
}
