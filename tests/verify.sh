#!/usr/bin/env bash
# The ladder a recipe climbs before it is called done. Stops at the first level that fails and says what to do.
#
#   bash tests/verify.sh wan21
#   bash tests/verify.sh mine               a copy of it under another name
set -euo pipefail
name="${1:?usage: bash tests/verify.sh RECIPE}"
export ZOO_DEVICE=cpu ZOO_RECIPE="$name"
source "$(dirname "${BASH_SOURCE[0]}")/../common/env.sh"
cd "$ZOO_ROOT"
[ -f "zoo/$name/config.py" ] || { echo "error: zoo/$name/config.py is missing; recipes: $(cd zoo && echo */)" >&2; exit 2; }

levels=(L0 L1 L2 L3 L4)
proves=("files, imports, README, commands" "published parameter counts, FLOPs" "oracle parity, round trips, data"
    "parallel layouts" "steps, resume, dry runs")
advice=("make the folder keep the contract of the README's \"Add a model\""
    "compare config.py and convert.py with the released config.json and key list"
    "compare model.py with the reference stage by stage, from the input on"
    "look at the collectives of the layout named above: model.py, then common/parallel.py"
    "run the launcher named above by hand, with --steps 10")

# The same proofs for every recipe, over its case.py, and what is unlike every other model.
proofs=(tests/test_conformance.py tests/test_models.py)
for own in "zoo/$name"/test_*.py; do [ ! -f "$own" ] || proofs+=("$own"); done

log="$(mktemp)"
trap 'rm -f "$log"' EXIT
card=""
for i in "${!levels[@]}"; do
    start=$SECONDS code=0
    "$ZOO_PYTHON" -m pytest "${proofs[@]}" -x -m "${levels[i]}" --durations=0 --durations-min=60 >"$log" 2>&1 || code=$?
    count="$(grep -oE '[0-9]+ (passed|failed|error|skipped).* in ' "$log" | tail -n 1 | sed 's/ in $//' || true)"
    [ "$code" = 0 ] && verdict=passed || verdict=FAILED
    card+="$(printf '%-3s %-34s %-7s %5ds  %s' "${levels[i]}" "${proves[i]}" "$verdict" $((SECONDS - start)) "${count:-no tests}")"$'\n'
    if [ "$code" != 0 ]; then
        tail -n 40 "$log"
        printf '\n%s: %s\n%s\nnext: %s\n' "$name" "stopped at ${levels[i]}" "$card" "${advice[i]}"
        exit "$code"
    fi
done
printf '%s: done on CPU; a device run and its record (perf.sh) come next\n%s' "$name" "$card"
