#!/usr/bin/env bash
# In a checkout: installs what is missing into .venv, then lets Python run the command that the first word names.
# The commands are in pipeline/__main__.py; `setup`, `test` and `bench` are done here.
set -euo pipefail

root=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
venv=$root/.venv

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

# Help, and whether there is such a command, need no installation.
tell() {
  local python
  python=$(find_python)
  PYTHONPATH=$root "$python" -m pipeline "$@"
}

# A line every five seconds at most instead of hundreds, which are in the log.
show_progress() {
  local line last=$SECONDS
  while IFS= read -r line; do
    if ((SECONDS - last >= 5)) && [[ $line =~ ^\ *(Collecting|Download|Installing|Resolved|Building|uv) ]]; then
      last=$SECONDS
      say "setup: ${line:0:100}"
    fi
  done
}

# Sets `options` to what pip is configured to, as uv's options: uv does not read that. Fails where it has more to say.
uv_options() {
  local line key value word
  local -A known=()
  while IFS= read -r line; do
    [[ $line =~ ^(global|install|:env:)\.([a-z-]+)=\'(.*)\'$ ]] || return 1
    key=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]//\\n/ }
    [[ $value != *[\\\'\"*]* && ${known[$key]:-$value} == "$value" ]] || return 1
    known[$key]=$value
    for word in $value; do
      case $key in
        index-url) options+=(--default-index "$word") ;;
        extra-index-url) options+=(--index "$word") ;;
        find-links) options+=(--find-links "$word") ;;
        constraint) options+=(--constraint "$word") ;;
        cert) export SSL_CERT_FILE=$word ;;
        timeout | default-timeout) export UV_HTTP_TIMEOUT=$word ;;
        config-file | disable-pip-version-check | no-input | progress-bar | root-user-action | require-virtualenv) ;;
        *) return 1 ;;
      esac
    done
  done < <("$venv/bin/python" -m pip config list)
}

# uv works in parallel, in less than half of pip's time. With that strategy all indexes count alike, as for pip.
by_uv() {
  local options=()
  uv_options || return 1
  # Bytecode is written at a module's first import, unless Python is told not to; then it comes with the installation.
  [[ -z ${PYTHONDONTWRITEBYTECODE:-} ]] || options+=(--compile-bytecode)
  "$venv/bin/python" -m pip install -q --only-binary :all: -c "$root/constraints.txt" uv || return 1
  "$venv/bin/uv" pip install --no-config --python "$venv/bin/python" --index-strategy unsafe-best-match \
    "${options[@]}" -c "$root/constraints.txt" -e "$1"
}

by_pip() {
  "$venv/bin/python" -m pip install --disable-pip-version-check -c "$root/constraints.txt" -e "$1"
}

# Installs what .venv lacks: `install` what the commands need, `install dev` also what the tests need.
# The stamp is a checksum of what decides versions, and `dev` where the tests' packages are there too.
install() {
  local extra=${1:-} wanted stamp="" python log=$venv/install.log
  wanted=$(cat "$root/constraints.txt" "$root/pyproject.toml" "$root/setup.py" | sha256sum | cut -d ' ' -f 1)
  [[ ! -f $venv/.installed ]] || stamp=$(<"$venv/.installed")
  if [[ $stamp == "$wanted dev" || $stamp == "$wanted" && ! $extra ]]; then return; fi
  [[ $stamp != *" dev" ]] || extra=dev # which are renewed with the others
  python=$(find_python)
  say "setup: installing pinned dependencies${extra:+ and those of the tests} into $venv (once; about a minute on a fast line)"
  [[ -x $venv/bin/python ]] || "$python" -m venv "$venv"
  local what=$root${extra:+[$extra]}
  if ! { by_uv "$what" || by_pip "$what"; } 2>&1 | tee "$log" | show_progress; then
    grep -v '^WARNING' "$log" | tail -n 15 >&2
    say "error: the installation failed; the whole log is $log"
    exit 1
  fi
  echo "$wanted${extra:+ $extra}" >"$venv/.installed"
  say "setup: done"
}

# Python takes the place of this shell, so that a signal reaches it, and its exit status whoever started the shell.
module() { exec "$venv/bin/python" -m "$@"; }

run_tests() {
  cd "$root"
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/mypy"
  # Several files of tests at a time, see tests/conftest.py; threads of theirs would only wait for each other. The
  # tests are about the CPU, and tests marked gpu are run by hand.
  export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu
  module pytest -m "not gpu" --numprocesses auto --maxprocesses 4 "$@"
}

case ${1:-} in
  "" | -h | --help | help) tell "$@" ;;
  setup) install ;;
  test)
    install dev
    run_tests "${@:2}"
    ;;
  bench)
    install
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} # benchmarks are not installed
    module benchmarks "${@:2}"
    ;;
  *)
    [[ -f $venv/.installed ]] || tell help "$1" >/dev/null # a typing error need not wait for an installation
    install
    module pipeline "$@"
    ;;
esac
