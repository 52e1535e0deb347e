# Sourced by quickstart.sh and test.sh, run by nobody: makes .venv in the checkout and installs requirements.txt into it.
#
# Does nothing when .venv already holds exactly these requirements (a copy of the file lies in .venv as the mark), so
# an interrupted installation is taken up again. Touches the checkout and the package caches of the user, nothing else.
#
#   CLEANSYNTH_PYTHON       interpreter to make .venv with (default: the first of python3.13, 3.12, 3.11, python3 that fits)
#   CLEANSYNTH_TORCH_INDEX  package index (or folder of wheels) with CPU builds of torch and torchvision, to spare a Linux
#                           machine without GPU the CUDA libraries

root=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
python="$venv/bin/python"
UV_VERSION=0.13.8

say() { printf '[set-up] %s\n' "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

fits() { [ "$("$1" -c 'import sys, venv, ensurepip; print(sys.version_info >= (3, 11))' 2>/dev/null)" = True ]; }

find_python() {
    if [ -n "${CLEANSYNTH_PYTHON:-}" ]; then
        fits "$CLEANSYNTH_PYTHON" || fail "CLEANSYNTH_PYTHON=$CLEANSYNTH_PYTHON is no Python >= 3.11 with venv and ensurepip"
        printf '%s' "$CLEANSYNTH_PYTHON"
        return
    fi
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3 python; do
        if fits "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    fail "no Python >= 3.11 with venv and ensurepip on the PATH: install one (Debian and Ubuntu: python3-venv), or set CLEANSYNTH_PYTHON"
}

# The mark: what .venv has to hold. Compared whole, so there is no hash tool to depend on.
wanted() { cat "$root/requirements.txt" && printf '# torch from: %s\n' "${CLEANSYNTH_TORCH_INDEX:-the same index}"; }

make_venv() {
    # After a kill a package can look complete and not be: begin afresh, the downloads are in uv's cache. (uv's
    # --reinstall would download everything again.)
    if [ ! -e "$venv/cleansynth-unfinished" ] && [ -x "$python" ] && "$python" -c '' 2>/dev/null; then
        fits "$python" || fail "$venv has $("$python" -V 2>&1), wanted is >= 3.11 with ensurepip: remove that folder and run this again"
    else
        local base
        base=$(find_python) || exit 2
        say "making .venv with $("$base" -V 2>&1)"
        "$base" -m venv --clear "$venv" || fail "python -m venv failed in $root: is there space, and may you write there?"
    fi
    # a venv made by another tool, or by a killed call of this one, may lack pip
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null || fail "no pip in $venv: remove that folder and run this again"
}

# uv does not read pip's configuration: hand over index, extra indexes, wheel folders, certificate and proxy.
# Lines NAME=VALUE; a variable that the user has set for uv stays as it is.
uv_settings() {
    "$python" - <<'PYTHON'
import ast, os, subprocess, sys

listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
found = {}
for section in ("global", "install", ":env:"):  # the later one wins, as in pip
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        if name.startswith(section + "."):
            found[name[len(section) + 1 :].replace("_", "-")] = ast.literal_eval(value)

def local(place):
    return place.removeprefix("file://") if place.startswith("file://") else place if "://" not in place else ""

def there(places):  # pip passes over local folders that are gone, uv stops
    return [p for p in places.split() if not local(p) or os.path.exists(os.path.expanduser(local(p)))]

settings = {}
if "index-url" in found:
    settings["UV_DEFAULT_INDEX"] = found["index-url"]
if extra := there(found.get("extra-index-url", "")):
    settings["UV_INDEX"] = " ".join(extra)
    settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # what pip does: the best version of all indexes
if links := there(found.get("find-links", "")):
    settings["UV_FIND_LINKS"] = ",".join(os.path.expanduser(p) for p in links)
if "no-index" in found and found["no-index"].lower() in ("1", "true", "yes", "on"):
    settings["UV_NO_INDEX"] = "1"
if hosts := found.get("trusted-host", "").split():
    settings["UV_INSECURE_HOST"] = " ".join(hosts)
if "cert" in found:
    settings["SSL_CERT_FILE"] = found["cert"]
if "proxy" in found:
    settings["HTTPS_PROXY"] = settings["HTTP_PROXY"] = found["proxy"]
settings["UV_HTTP_TIMEOUT"] = str(max(120, int(float(found.get("default-timeout", found.get("timeout", 0))))))

same = {"UV_DEFAULT_INDEX": "UV_INDEX_URL", "UV_INDEX": "UV_EXTRA_INDEX_URL"}
for name, value in settings.items():
    if not {name, name.lower(), same.get(name)} & set(os.environ):
        print(f"{name}={value}")
PYTHON
}

install() (
    settings=$(uv_settings) || exit 1
    while IFS= read -r setting; do
        export "${setting?}"
    done <<<"$settings"
    requirements="$root/requirements.txt"

    if ! "$venv/bin/uv" --version >/dev/null 2>&1; then
        "$python" -m pip install -qq --disable-pip-version-check "uv==$UV_VERSION" || exit 1
    fi
    uv=("$venv/bin/uv" pip install --python "$python")
    : >"$venv/cleansynth-unfinished"
    if [ -n "${CLEANSYNTH_TORCH_INDEX:-}" ]; then
        torch=()
        while IFS= read -r line; do torch+=("${line%% *}"); done < <(grep -E '^torch(vision)?==' "$requirements")
        if [ -d "$CLEANSYNTH_TORCH_INDEX" ]; then from=(--no-index --find-links "$CLEANSYNTH_TORCH_INDEX"); else from=(--default-index "$CLEANSYNTH_TORCH_INDEX"); fi
        UV_INDEX='' UV_FIND_LINKS='' "${uv[@]}" --reinstall-package torch --reinstall-package torchvision --quiet --no-deps "${from[@]}" "${torch[@]}" || exit 1
        grep -vE '^(torch|torchvision|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' "$requirements" >"$venv/requirements-no-torch.txt"
        requirements="$venv/requirements-no-torch.txt"
    elif [ -f "$venv/requirements-no-torch.txt" ]; then  # back from CPU builds: 2.15.0+cpu would count as 2.15.0
        uv+=(--reinstall-package torch --reinstall-package torchvision)
        rm "$venv/requirements-no-torch.txt"
    fi
    if [ -t 2 ]; then
        "${uv[@]}" -r "$requirements" || exit 1
    else  # no progress bars in a log file; what is downloaded, without the list of 120 packages at the end
        "${uv[@]}" -r "$requirements" 2>&1 | sed '/^ [-+~] /d' || exit 1
    fi
    rm "$venv/cleansynth-unfinished"
)

set_up() {
    # Packages are compiled when they are first imported. Containers often forbid to keep that: 25 s more at every start.
    unset PYTHONDONTWRITEBYTECODE
    if [ -x "$python" ] && wanted | cmp -s - "$venv/cleansynth-requirements.txt"; then
        return
    fi
    local start=$SECONDS
    if [ -f "$venv/cleansynth-requirements.txt" ]; then
        say "requirements.txt has changed: bringing .venv up to date"
    elif [ "$(uname -s)" = Linux ] && [ -z "${CLEANSYNTH_TORCH_INDEX:-}" ]; then
        say "installing the pinned packages into .venv: 5.6 GB, most of it CUDA libraries; 1 to 10 minutes, as fast as your network and disk"
        if ! command -v nvidia-smi >/dev/null 2>&1; then
            say "no NVIDIA GPU seen: CLEANSYNTH_TORCH_INDEX=<index with CPU builds of torch> would spare most of that"
        fi
    else
        say "installing the pinned packages into .venv: about 1.5 GB; 1 to 5 minutes, as fast as your network and disk"
    fi
    make_venv
    rm -f "$venv/cleansynth-requirements.txt"
    install || fail "the installation did not end (see above): check network, package index and disk space, then run the same command again; it goes on where it stopped"
    wanted >"$venv/cleansynth-requirements.txt.new" && mv "$venv/cleansynth-requirements.txt.new" "$venv/cleansynth-requirements.txt"
    say "done in $((SECONDS - start)) s; the next call has nothing to install"
}
