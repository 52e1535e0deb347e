# Sourced by the launchers, run by slurm.sbatch once on each node: one process per GPU of this machine, by torchrun.
#
#   launch [TORCHRUN OPTIONS] SCRIPT FLAGS...      options: another rendezvous than --standalone
#   NPROC=2 bash shell/<launcher>.sh FLAGS...      another number of processes than this machine has GPUs
#   at_most=3 launch SCRIPT FLAGS...               in a launcher whose run has no work for more processes
#
# Script and .venv are those of this checkout, whatever the current directory; without .venv the PATH is asked for
# torchrun. Relative paths and the run folder start in the current directory, as with plain python.

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

processes() {
    local n=${NPROC:-}
    if [ -n "$n" ]; then
        [[ $n =~ ^[1-9][0-9]{0,3}$ ]] || fail "NPROC=$n: give the number of processes, 1 or more"
    else
        if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
            n=$(tr , '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
        else
            n=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
        fi
        [ "$n" -ge 1 ] || n=1
        [ "$n" -le "${at_most:-$n}" ] || n=$at_most
    fi
    printf '%s' "$n"
}

launch() {
    local options=() script n torchrun=$root/.venv/bin/torchrun
    while [[ ${1:-} == -* ]]; do options+=("$1"); shift; done
    [ ${#options[@]} -gt 0 ] || options=(--standalone)
    script=$root/$(basename "${1:-}")
    [ -f "$script" ] || fail "no script '${1:-}' in $root; give datadream.py or another one, then its flags"
    n=$(processes) || exit
    [ -x "$torchrun" ] || torchrun=$(command -v torchrun) ||
        fail "no .venv in $root and no torchrun on the PATH; run first: bash $root/shell/quickstart.sh"
    shift
    printf '[run] torchrun %s %s\n' "--nproc-per-node=$n ${script##*/}" "$*" >&2
    exec "$torchrun" "${options[@]}" "--nproc-per-node=$n" "$script" "$@"
}

[ "${BASH_SOURCE[0]}" != "$0" ] || launch "$@"
