#!/usr/bin/env bash
# Measurements that need a GPU, in two calls of under eight minutes each on one H100 or H200 with 16 cores:
#   benchmarks/gpu.sh 1 OUT    every path once; extraction, prediction, experts
#   benchmarks/gpu.sh 2 OUT    training; compilation as a whole
# OUT gets HARDWARE-gpu-CALL.jsonl, a line for each number as soon as it is known, and gpu-CALL.log. `--dry` after OUT
# rehearses a call on the CPU in one to three minutes. Needs neither network nor weights: what cannot be installed there,
# this project among it, is taken from wheels in .whl/.
set -euo pipefail
(($# >= 2)) || {
  echo "usage: benchmarks/gpu.sh 1|2 OUT [--dry]" >&2
  exit 2
}
call=$1 out=$(realpath -m "$2")
shift 2
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
mkdir -p "$out"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTHONPATH=$PWD # this code is measured, also in processes that start elsewhere

python=.venv/bin/python
[[ -x $python ]] || python=python3
if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl >&2
  PYTHONPATH+=:$site
fi
# Messages go to the log as well; stdout has only the path of the results.
"$python" -m benchmarks gpu --call "$call" --out "$out" "$@" 2> >(tee "$out/gpu-$call.log" >&2)
