#!/usr/bin/env bash
# The one door: sets up what is missing, then runs the command that the first word names.
set -euo pipefail

root=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
venv=$root/.venv

usage() {
  cat <<'TEXT'
usage: ./launch.sh COMMAND [options]        `./launch.sh COMMAND --help` explains one

  setup      install the pinned dependencies into .venv (every other command does it when needed)
  demo       photos -> shards -> train -> evaluate -> export -> predict, in minutes on two cores (--quick: 2 minutes)
  test       ruff, mypy and pytest; further words go to pytest
  doctor     check machine, installation, configurations and data, and say what would happen
  prep       scenes | masks | shard | merge | features | audit | verify: make data sets, shards and the feature cache, and look
             for what is wrong with them
  slurm      submit to a SLURM cluster: ./launch.sh slurm RECIPE --nodes N --gpus-per-node G [options of train] [--dry-run]
             or ./launch.sh slurm prep --parts N [options of prep shard] [--dry-run]
  train      train a recipe: ./launch.sh train demo [--config_file ACCELERATE.yaml] [--epochs N] [--dry-run] [--room.key VALUE]
  evaluate   score a run on splits it never saw, and write its report
  early-exit find out on the validation split when a run's model may stop looking at further views
  export     write the best weights as a Hugging Face folder
  predict    probabilities for files, folders and globs
  bench      measure beside other tools in the same run: ./launch.sh bench prep [--quick]

exit status: 0 done, 2 a mistake in what was asked for, 3 an audit found something, 75 stopped and resumable, 1 anything else
TEXT
}

say() { echo "$*" >&2; }

find_python() {
  for candidate in python3 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  say "error: Python 3.11 or 3.12 is needed and none was found on PATH; install one, for instance with your package manager or pyenv"
  exit 2
}

# A line every five seconds instead of pip's hundreds, which are in the log.
show_pip() {
  local line packages=0 last=$SECONDS
  while IFS= read -r line; do
    case $line in
      *Collecting\ *) packages=$((packages + 1)) ;;
      Installing\ collected*) say "setup: $packages packages found, unpacking" ;;
    esac
    if ((SECONDS - last >= 5)) && [[ $line == *Collecting\ * ]]; then
      last=$SECONDS
      say "setup: $packages packages found, now ${line#*Collecting }"
    fi
  done
}

setup() {
  local wanted
  wanted=$(cat "$root/constraints.txt" "$root/pyproject.toml" | sha256sum)
  if [[ -f $venv/.installed && $(<"$venv/.installed") == "$wanted" ]]; then return; fi
  local python
  python=$(find_python)
  say "setup: installing pinned dependencies into $venv (once; about a minute on a fast line)"
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  local log=$venv/install.log
  if ! "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" -e "$root[dev]" 2>&1 |
    tee "$log" | show_pip; then
    grep -v '^WARNING' "$log" | tail -n 15 >&2
    say "error: the installation failed; the whole log is $log"
    exit 1
  fi
  echo "$wanted" >"$venv/.installed"
  say "setup: done"
}

# Python takes the place of this shell, so that a signal reaches it, and its exit status whoever started the shell.
module() { exec "$venv/bin/python" -m "$@"; }

# One step of the demo: says the command, which anyone may type, and runs it. A signal is handed on to the step.
step() {
  local title=$1 status
  shift
  end_if_asked # between two steps
  say ""
  say "== $title: ./launch.sh $*"
  (dispatch "$@" >/dev/null) &
  child=$!
  while true; do
    status=0
    wait "$child" || status=$?
    kill -0 "$child" 2>/dev/null || break # or else a signal ended the waiting, not the step
  done
  end_if_asked # though the step may have ended just before
  return "$status"
}

end_if_asked() {
  if [[ $asked ]]; then
    say "stopped: ./launch.sh demo resumes here"
    exit 75
  fi
}

hand_on() {
  asked=1
  [[ -z $child ]] || kill -s "$1" "$child" 2>/dev/null || true
}

demo() {
  local images=2400 run=runs/demo short=()
  case ${1:-} in
    "") ;;
    --quick) images=320 run=runs/demo-quick short=(--epochs 1) ;;
    --help | -h | *)
      say "usage: ./launch.sh demo [--quick]"
      say "Makes procedural street scenes, shards them, trains the complete model and a baseline on the embedded"
      say "backbone, evaluates on cities it never saw, exports and predicts. Run it again to resume where it stopped."
      say "--quick takes under two minutes and shows the road, not the quality."
      [[ $1 == --help || $1 == -h ]] && return 0 || return 2
      ;;
  esac
  local signal child="" asked=""
  for signal in INT TERM HUP USR2; do
    # shellcheck disable=SC2064 # which signal it is, is known now
    trap "hand_on $signal" "$signal"
  done
  set -m # or else a step would ignore Ctrl-C, as all background jobs of a script do
  local on=(--shards "$run/shards" --data.features "$run/features" "${short[@]}")
  step "photos" prep scenes --out "$run/scenes" --images "$images" --difficulty 0.2 --seed 1
  step "shards" prep shard --source "$run/scenes" --out "$run/shards"
  step "audit" prep audit --shards "$run/shards" --accept description
  step "features" prep features --recipe demo --shards "$run/shards" --out "$run/features"
  step "baseline" train demo_baseline --run "$run/baseline" "${on[@]}"
  step "baseline's score" evaluate --run "$run/baseline"
  step "model" train demo --run "$run" "${on[@]}"
  step "evaluation" evaluate --run "$run" --baseline "$run/baseline"
  step "export" export --run "$run"
  step "prediction" predict --model "$run/model" --input "$run/scenes/images/*0.jpg" --output "$run/answers.csv"
  say ""
  module pipeline.evaluation.report.headline --run "$run"
}

run_tests() {
  cd "$root"
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/mypy"
  # Two files of tests at a time, see tests/conftest.py; threads of theirs would only wait for each other. The tests
  # are about the CPU, and tests marked gpu are run by hand.
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
  module pytest -m "not gpu" --numprocesses auto --maxprocesses 4 "$@"
}

dispatch() {
  local command=$1
  shift
  case $command in
    setup) ;;
    demo) demo "$@" ;;
    test) run_tests "$@" ;;
    prep)
      if [[ ${1:-} == features ]]; then
        module pipeline.launch.launcher prep "$@" # on every GPU, as training is
      else
        module data_prep "$@"
      fi
      ;;
    train) module pipeline.launch.launcher "$@" ;;
    slurm)
      if [[ ${1:-} == prep ]]; then
        module data_prep.shards.slurm "${@:2}"
      else
        module pipeline.launch.slurm_train "$@"
      fi
      ;;
    bench)
      export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # benchmarks are not installed
      module benchmarks "$@"
      ;;
    doctor | evaluate | early-exit | export | predict) module "pipeline.${command/-/_}" "$@" ;;
  esac
}

case ${1:-} in
  "" | -h | --help | help) usage ;;
  setup | demo | test | prep | slurm | train | doctor | evaluate | early-exit | export | predict | bench)
    setup # not `setup && ...`, in which a failure inside would be passed over
    dispatch "$@"
    ;;
  *)
    say "error: unknown command '$1'; ./launch.sh --help lists them"
    exit 2
    ;;
esac
