#!/usr/bin/env bash
# Makes .venv, installs the pinned requirements and this package into it, then runs a command there.
# Written for bash 3.2 (macOS) and later.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: ./setup.sh [--data NAME]... [COMMAND [ARGUMENT...]]

Makes the environment .venv beside this script, installs micronet there, then runs COMMAND inside it.
Once that is done, a call goes straight to COMMAND. A broken or interrupted install is mended.

  --data NAME   also fetch a data set (cifar10, cifar100) before COMMAND
  -h, --help    show this text

PYTHON=PATH chooses the Python (3.11 or newer) to build with. pip's own configuration (proxy, mirror) holds.

Examples:
  ./setup.sh                                       install only
  ./setup.sh micronet fit recipes/quickstart.py    install where needed, then train the first network
  ./setup.sh --data cifar100 micronet fit recipes/wrn_cifar100.py
  ./setup.sh pytest                                run the tests
EOF
}

say() { printf 'setup.sh: %s\n' "$*" >&2; }

die() {
    say "$@"
    exit 1
}

script_folder=${BASH_SOURCE[0]%/*}
[[ $script_folder != "${BASH_SOURCE[0]}" ]] || script_folder=.
root=$(cd "$script_folder" && pwd -P)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/.micronet-installed # what was asked for; there only while the install is complete
manifest=$venv/.micronet-files  # what that install left in bin/ and site-packages/, one level deep

# --- which Python -----------------------------------------------------------------------------------------------------

# Prints "VERSION INTERPRETER", the interpreter behind any pyenv shim or venv; "VERSION" alone where venv is missing.
# Any Python since 2.6 can read it. Fails where $1 does not run: a pyenv shim may be on PATH and have no version behind.
probe() {
    "$1" -c '
import sys
words = ["%d.%d.%d" % sys.version_info[:3]]
try:
    import ensurepip, venv
    words.append(getattr(sys, "_base_executable", None) or sys.executable)
except ImportError:
    pass
print(" ".join(words))' 2>/dev/null
}

new_enough() { # VERSION
    local major minor
    IFS=. read -r major minor _ <<<"$1"
    ((major > 3 || (major == 3 && minor >= 11)))
}

# Sets base_python and base_version to the first Python that will do, $PYTHON alone where it is set; or says what it
# found instead, and exits.
find_python() {
    local candidates candidate answer found=""
    if [[ -n ${PYTHON:-} ]]; then
        candidates=$PYTHON
    else
        candidates=$(type -ap python3.11 python3.12 python3.13 python3 || true)
    fi
    while IFS= read -r candidate; do
        if ! answer=$(probe "$candidate"); then
            [[ -z ${PYTHON:-} ]] || found="  $candidate, which does not run as Python"
            continue
        fi
        found+=${found:+$'\n'}
        base_version=${answer%% *}
        base_python=${answer#* }
        if ! new_enough "$base_version"; then
            found+="  $candidate is Python $base_version"
        elif [[ $base_python == "$answer" ]]; then
            found+="  $candidate is Python $base_version, without its venv module"
            found+=" (on Debian and Ubuntu: apt install python${base_version%.*}-venv)"
        else
            return 0
        fi
    done <<<"$candidates"
    say "micronet needs Python 3.11 or newer. Found${found:+ only}:"
    printf '%s\n' "${found:-  nothing on PATH that runs}" >&2
    die "install one (from your system, pyenv or conda), or name it: PYTHON=/path/to/python3.12 ./setup.sh"
}

# --- is the install complete ------------------------------------------------------------------------------------------

# Sets version to that of .venv's Python; fails where it doesn't run. -S: 10 ms instead of 25.
venv_version() {
    version=$("$python" -I -S -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
}

wanted() { # the stamp's text: another folder, Python, set of pins or packaging makes it another one
    printf '%s\n' "$root" "$version"
    cat "$root/requirements.txt" "$root/pyproject.toml"
}

complete() {
    local name
    venv_version || return 1
    [[ -z ${PYTHON:-} || $version == "$base_version" ]] || return 1
    [[ -f $stamp && -f $manifest && $(<"$stamp") == "$(wanted)" ]] || return 1
    while IFS= read -r name; do
        [[ -e $venv/$name ]] || return 1
    done <"$manifest"
}

# --- install ----------------------------------------------------------------------------------------------------------

venv_usable() { # a virtual environment that was made in this very folder, with a pip that starts
    venv_version || return 1
    new_enough "$version" || return 1
    [[ -z ${PYTHON:-} || $version == "$base_version" ]] || return 1
    grep -Fq " $venv" <(grep '^command = ' "$venv/pyvenv.cfg") || return 1
    [[ -d $venv/lib/python${version%.*}/site-packages ]] || return 1
    "$python" -I -m pip --version >/dev/null 2>&1
}

# A pip that was killed can leave a package that looks installed and lacks files. Forgetting it makes pip put it back.
forget_torn_packages() {
    "$python" -I - <<'EOF'
import csv, os, pathlib, shutil, sysconfig

site = pathlib.Path(sysconfig.get_path("purelib"))


def whole(info):
    """Whether a package's every file is there, of its recorded size; pip writes INSTALLER after all of them."""
    if not all((info / name).is_file() for name in ("METADATA", "INSTALLER", "RECORD")):
        return False
    with open(info / "RECORD", encoding="utf-8", newline="") as rows:
        files = [(row[0], row[2]) for row in csv.reader(rows) if row and not row[0].endswith(".pyc")]
    try:
        return all(os.stat(site / name).st_size == int(size) if size else (site / name).exists() for name, size in files)
    except OSError:
        return False


for left in site.glob("~*"):  # where pip keeps what it replaces, until it is done
    shutil.rmtree(left) if left.is_dir() else left.unlink()
for info in site.glob("*.dist-info"):
    if not info.name.startswith("pip-") and not whole(info):
        print(f"setup.sh: mending {info.name.removesuffix('.dist-info')}, which lacks files", flush=True)
        shutil.rmtree(info)
EOF
}

# While pip works: how long it has been at it, what is in place, and its last line. On a terminal one line that is drawn
# anew each second; elsewhere (a log, CI) a line after 1, 2, 4 and 8 seconds and every 16 from then on.
progress() { # LOG
    local start=$SECONDS next=1 passed line
    while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
        passed=$((SECONDS - start))
        [[ -t 2 ]] || ((passed >= next)) || continue
        next=$((passed < 8 ? passed * 2 : passed + 16))
        set -- "$1" "$venv/lib/python${version%.*}/site-packages"/*.dist-info
        line=$(printf '%d:%02d, %d packages in place; %s' $((passed / 60)) $((passed % 60)) $(($# - 1)) \
            "$(tail -n 1 "$1" 2>/dev/null)")
        if [[ -t 2 ]]; then
            printf '\r\033[K%.79s' "$line" >&2
        else
            say "${line:0:120}"
        fi
    done
}

# pip install ARGUMENT...: progress is shown while it works; what went wrong is shown in full.
pip_install() {
    local log=$venv/.micronet-pip.log watch failed=0
    : >"$log"
    progress "$log" 9>&- & # without the lock, which must end with pip
    watch=$!
    # -I: a PYTHONPATH must not pass for packages that are installed.
    "$python" -I -m pip install --disable-pip-version-check --progress-bar off "$@" >"$log" 2>&1 || failed=$?
    kill "$watch" 2>/dev/null || true
    wait "$watch" 2>/dev/null || true
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
    if ((!failed)); then
        rm -f "$log"
        return 0
    fi
    # Progress and warnings about places that hold no such package are no errors.
    grep -vE '^ *(Collecting|Downloading|Using cached|Requirement already|Looking in|Obtaining|Processing) |^WARNING: Location ' \
        "$log" >&2 || true
    die "pip failed, its own words are above; check the network, pip's configuration (pip config list)" \
        "and the disk's free space, then run ./setup.sh again: it goes on from here"
}

install() {
    local log=$venv/.micronet-pip.log line
    # -I: a PYTHONPATH must not pass for packages that are installed.
    if "$python" -I -m pip install --disable-pip-version-check --progress-bar off "$@" 2>&1 | tee "$log" |
        while IFS= read -r line; do
            [[ ! -t 2 ]] || printf '\r\033[K%.79s' "$line" >&2
        done; then
        [[ ! -t 2 ]] || printf '\r\033[K' >&2
        rm -f "$log"
        return 0
    fi
    [[ ! -t 2 ]] || printf '\r\033[K' >&2
    # Progress and warnings about places that hold no such package are no errors.
    grep -vE '^ *(Collecting|Downloading|Using cached|Requirement already|Looking in|Obtaining|Processing) |^WARNING: Location ' \
        "$log" >&2 || true
    die "pip failed, its own words are above; check the network, pip's configuration (pip config list)" \
        "and the disk's free space, then run ./setup.sh again: it goes on from here"
}

install() {
    if ! venv_usable; then
        [[ -n ${base_python:-} ]] || find_python
        [[ ! -e $venv ]] || say "rebuilding .venv: it is broken, was moved, or was made by another Python"
        say "making .venv with Python $base_version ($base_python)"
        rm -rf "$venv"
        "$base_python" -m venv "$venv" >&2 || die "$base_python could not make .venv; its own words are above"
        venv_version || die "$python does not run"
    fi
    rm -f "$stamp" # before the first change: an install that stops anywhere below is none
    forget_torn_packages >&2
    say "installing $(grep -c '==' "$root/requirements.txt" || true) packages into .venv:" \
        "a few minutes the first time, up to 7 GB with torch's CUDA libraries"
    pip_install -r "$root/requirements.txt"
    # The build backend is among the pins, so this one asks no index for anything.
    pip_install --no-deps --no-build-isolation -e "$root"
    (cd "$venv" && printf '%s\n' bin/* "lib/python${version%.*}/site-packages"/*) | grep -v __pycache__ >"$manifest"
    wanted >"$stamp.part"
    mv "$stamp.part" "$stamp"
}

# --- main -------------------------------------------------------------------------------------------------------------

data_sets=()
while (($#)); do
    case $1 in
        -h | --help)
            usage
            exit
            ;;
        --data)
            [[ -n ${2:-} && $2 != -* ]] || die "--data needs a name: cifar10 or cifar100"
            data_sets+=("$2")
            shift 2
            ;;
        --data=?*)
            data_sets+=("${1#--data=}")
            shift
            ;;
        --)
            shift
            break
            ;;
        -*) die "unknown option $1; ./setup.sh --help lists them" ;;
        *) break ;;
    esac
done

[[ -z ${PYTHON:-} ]] || find_python
if ! complete; then
    # One call at a time installs. The lock is on a file that is there anyway; pip inherits it, so that even a pip whose
    # setup.sh was killed is waited for. Without flock (macOS), two first calls at once are not kept apart.
    exec 9<>"$root/requirements.txt"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "waiting for another setup.sh"
        flock 9 || true # a file system without locks
    fi
    complete || install
    exec 9>&-
fi

for name in ${data_sets[@]+"${data_sets[@]}"}; do
    "$venv/bin/micronet" data fetch "$name"
done

if ((! $#)); then
    printf '%s\n' \
        "micronet is installed in .venv (Python $version). Next:" \
        "  ./setup.sh micronet fit recipes/quickstart.py   train and score a first network" \
        "  source .venv/bin/activate                       or work inside the environment; then: micronet --help"
    exit
fi

export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
unset PYTHONHOME
exec "$@"
