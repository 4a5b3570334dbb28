#!/usr/bin/env bash
# From a fresh clone to figures and verdicts. Finds or makes the environment, then hands over to `python -m influence_kit`.
set -euo pipefail

usage() {
  cat <<'TEXT'
./run_all.sh [run] [--profile smoke|laptop|real|gpu|hub] [--only CHAPTER…] [--seeds SEED…] [--plan] [--force STAGE|all]
             [--jobs N] [--without-real-text] [--update-expected] [-p NAME=VALUE] [--verify]
    Train, fit, score, execute the chapters, write the figures and print the verdicts. Without --profile: laptop, or the
    profile that is for the chapters of --only where laptop is not (12: real).
    What ships writes figures/<profile>/; other seeds, parameters or profiles write figures/runs/<name>/.
./run_all.sh stages [the same, without -p]   the stages alone, without notebooks
./run_all.sh lab [CHAPTER] [jupyter's own]   JupyterLab on the notebooks, with this environment and cache
./run_all.sh test [pytest's options]         the test suite
./run_all.sh doctor                          make the environment; say what this machine has and lacks

The active Python is used if it has the versions of constraints.txt; else .conda/ (where conda, mamba or micromamba is
found) or .venv/ is made beside this script, once. What is computed is kept in .cache/influence_kit, or in the folder
that INFLUENCE_KIT_CACHE names; a run that was stopped goes on from there.
Exit codes: 0 done, 1 a stage or chapter failed, 2 something for you to mend, 130 Ctrl-C, 137 killed or out of memory.
TEXT
}

fail() { printf 'error: %s\n' "$1" >&2; exit 2; }

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" >/dev/null && pwd -P)
export INFLUENCE_KIT_CWD="$PWD"  # paths that are given start from there
cd -- "$here"
case "${1-}" in
  -h | --help | help) usage; exit 0 ;;
  run | stages | lab | test | doctor) ;;
  *) set -- run "$@" ;;
esac
# A misspelt profile should not cost an installation first.
before=
[ "$1" = test ] || for word in "$@"; do
  case "$before $word" in
    "--profile "*.y*ml | *" --profile="*.y*ml) ;;
    "--profile "* | *" --profile="*)
      [ -f "influence_kit/findings/profiles/${word#--profile=}.yaml" ] ||
        fail "profile '${word#--profile=}' is not known: choose one of $(basename -s .yaml influence_kit/findings/profiles/*.yaml | tr '\n' ' ')or give the path of a YAML file" ;;
  esac
  before=$word
done
# The checkout's own package wins over any installed copy; sets of strings come in the same order in every run.
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" PYTHONHASHSEED=0

log=.cache/install.log
stamp() { { cat constraints.txt pyproject.toml; printf '%s\n' "$here"; } | cksum; }
pinned() { "$1" -m influence_kit.runner.doctor --pins >/dev/null 2>&1; }
stamped() { [ -x "$1/bin/python" ] && [ "$(cat "$1/.stamp" 2>/dev/null)" = "$(stamp)" ] && "$1/bin/python" -c '' 2>/dev/null; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1; }

suitable() {  # a Python to make .venv with; 3.11 first, since the pinned versions were tested on it
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && suits "$candidate"; then command -v "$candidate"; return; fi
  done
  return 1
}

existing() {  # an environment that needs no work
  for candidate in python python3; do
    if command -v "$candidate" >/dev/null && pinned "$candidate"; then command -v "$candidate"; return; fi
  done
  for folder in .conda .venv; do
    if stamped "$folder"; then printf '%s\n' "$here/$folder/bin/python"; return; fi
  done
  return 1
}

with_pip() {  # torch by itself first: it is the largest, and whichever build of the pinned version is found will do
  torch=$(grep '^torch==' constraints.txt)
  "$1" -m pip install --disable-pip-version-check -c constraints.txt "$torch" >>"$log" 2>&1 &&
    "$1" -m pip install --disable-pip-version-check -c constraints.txt -e '.[notebooks,test]' >>"$log" 2>&1
}

with_conda() {
  tool=$1
  echo "making .conda/ with $tool from environment.yml (once; some minutes, 2 to 8 GB; log: $log)" >&2
  rm -rf .conda
  export CONDA_ALWAYS_YES=true MAMBA_ALWAYS_YES=true
  case "$tool" in
    micromamba) "$tool" create -y -p "$here/.conda" -f environment.yml >>"$log" 2>&1 ;;
    *) "$tool" env create -p "$here/.conda" -f environment.yml >>"$log" 2>&1 ;;
  esac && [ -x .conda/bin/python ] && stamp >.conda/.stamp
}

with_venv() {
  base=$(suitable) || fail "no Python 3.11, 3.12 or 3.13 found (python3 is $(python3 -V 2>&1 || true)): install one, then run again"
  # Packages that were being copied when an installation was killed look installed: begin again from nothing.
  if [ -e .venv/.installing ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then rm -rf .venv; fi
  echo "installing the versions of constraints.txt into .venv/ (once; some minutes, 2 to 8 GB; log: $log)" >&2
  if [ ! -d .venv ] && ! "$base" -m venv .venv >>"$log" 2>&1; then
    rm -rf .venv
    fail "$base -m venv failed (log: $log): on Debian or Ubuntu install python3-venv, then run again"
  fi
  rm -f .venv/.stamp
  : >.venv/.installing
  if ! with_pip .venv/bin/python; then
    rm -f .venv/.installing
    cause=$(grep -m 1 -E '^ERROR|No space left' "$log" || true)
    fail "pip could not install the pinned packages (${cause:-see the log}): check the network or PIP_INDEX_URL and the free disk, then run again; log: $here/$log"
  fi
  rm -f .venv/.installing
  stamp >.venv/.stamp
}

make_environment() {
  mkdir -p .cache
  if command -v flock >/dev/null; then  # two runs must not install at once
    exec 9>.cache/install.lock
    flock -n 9 || { echo "another installation is under way; waiting for it" >&2; flock 9; }
  fi
  if ! existing >/dev/null; then
    : >"$log"
    conda=$(command -v micromamba || command -v mamba || command -v conda || true)
    if [ -z "$conda" ] || ! with_conda "${conda##*/}"; then
      [ -z "$conda" ] || echo "$conda could not make it (log: $log); trying .venv/" >&2
      with_venv
    fi
  fi
  exec 9>&- || true
}

if [ "$1" = doctor ]; then  # what it has to say matters most where the environment cannot be made
  shift
  existing >/dev/null || (make_environment) || true
  python=$(existing || suitable) || fail "no Python 3.11, 3.12 or 3.13 found: install one, then run again"
  exec "$python" -m influence_kit.runner.doctor "$@"
fi
python=$(existing) || { make_environment; python=$(existing); } || fail "the environment is still not the one of constraints.txt (log: $log): delete .venv and .conda, then run again"
exec "$python" -m influence_kit "$@"
