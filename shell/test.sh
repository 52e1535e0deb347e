#!/usr/bin/env bash
# The tests: sets up .venv (first time only), then ruff and pytest. Arguments go to pytest.
#
#   bash shell/test.sh                        # everything but the tests marked slow, about 10 minutes on 2 cores
#   bash shell/test.sh -k clip                # some of it
#   bash shell/test.sh -m slow                # the slow ones;  -m '' for all
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
set_up
cd "$root"

style=0
"$python" -m ruff check . || style=$?
"$python" -m ruff format --check --quiet . || { style=$?; echo "run: .venv/bin/ruff format ."; }
tests=0
OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist loadfile "$@" || tests=$?
[ "$style" -eq 0 ] || printf 'error: ruff found something, see above\n' >&2
[ "$tests" -eq 0 ] || exit "$tests"
exit "$style"
