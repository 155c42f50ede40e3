#!/usr/bin/env bash
# Start a recipe as a copy of the nearest one, renamed, with empty records and every status unverified. Makes no .venv.
#
#   bash zoo/new.sh mine --from wan21
set -euo pipefail
export PYTHONSAFEPATH=1 PYTHONPATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${ZOO_PYTHON:-$PYTHONPATH/.venv/bin/python}"
[ -n "${ZOO_PYTHON:-}" ] || [ -x "$python" ] || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: $python is missing or too old; expected Python 3.11 or newer" >&2; exit 2; }
exec "$python" -m zoo.new "$@"
