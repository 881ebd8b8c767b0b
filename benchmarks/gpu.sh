#!/usr/bin/env bash
# Every benchmark that a GPU changes, one after the other: under 9 minutes on one H100 or H200 with 16 cores.
# Options go to each of them: `benchmarks/gpu.sh --out FOLDER`. Needs neither network nor weights.
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."

python=.venv/bin/python
[[ -x $python ]] || python=python3
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "error: there is no GPU here; these benchmarks are about one" >&2
  exit 2
}
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader >&2
for name in features views pruning; do
  started=$SECONDS
  "$python" -m "benchmarks.$name" "$@"
  echo "$name: $((SECONDS - started)) s" >&2
done
