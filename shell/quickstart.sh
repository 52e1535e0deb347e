#!/usr/bin/env bash
# From a bare machine to a scored classifier: sets up .venv (first time only), then runs a script.
#
#   bash shell/quickstart.sh                                 # datadream.py on the built-in real digits
#   bash shell/quickstart.sh --shots 1 --seed 3              # flags go to datadream.py
#   bash shell/quickstart.sh datadream.py --preset pets      # another script or preset
#
# Needs Python >= 3.11 with venv, and a package index. Writes only here: the script runs in the checkout, so its run
# folder is made there and relative paths among the flags start there.
set -euo pipefail
SECONDS=0
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

script=datadream.py
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    script=$1
    shift
fi
script=${script##*/}
script=${script%.py}.py
if [ ! -f "$root/$script" ]; then
    scripts=$(cd "$root" && printf ' %s' *.py)
    fail "no script $script here; there are:$scripts"
fi

set_up
cd "$root"
ready=$SECONDS
printf '[run] python %s\n' "$script $*"
# A job of its own, and signals passed on by hand: the script gets its chance to end cleanly whoever is sent the signal.
set -m
"$python" "$script" "$@" </dev/null &
job=$!
set +m
trap 'kill -INT "$job" 2>/dev/null' INT
trap 'kill -TERM "$job" 2>/dev/null' TERM HUP
code=0
wait "$job" || code=$?
while kill -0 "$job" 2>/dev/null; do  # a trapped signal ended the wait, not the job
    code=0
    wait "$job" || code=$?
done
if [ "$code" -eq 0 ]; then
    printf '[done] %d s in all: set-up %d s, %s %d s\n' "$SECONDS" "$ready" "$script" "$((SECONDS - ready))"
else
    printf '[stopped] %s ended with exit code %d after %d s\n' "$script" "$code" "$((SECONDS - ready))" >&2
fi
exit "$code"
