# shellcheck shell=bash
# Sets `root`, the checkout, and `python`, a Python that has what the project needs. Source it:
#
#     source examples/setup.sh run      to run the project
#     source examples/setup.sh tests    to test it as well
#
# If the active Python (or the one that PYTHON names) has everything, it is used as it is; nothing is installed into it.
# Otherwise .venv in the checkout is created, or updated, from requirements.txt.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}

# tell CODE ARGUMENT…: prints what the Python code prints, for $(…). If a request to stop ends the script meanwhile,
# nobody reads this any more: then Python dies of SIGPIPE, instead of printing a traceback.
tell() {
    "$python" -c "import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)
$1" "${@:2}"
}

# first_python: prints the path of the Python that PYTHON names, or of the first that is new enough, the active first.
first_python() {
    local candidate candidates=(python3 python python3.14 python3.13 python3.12 python3.11 python3.10)
    if [ -n "${PYTHON-}" ]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.version_info < (3, 10) and sys.exit(1); print(sys.executable)' 2>/dev/null; then
            return
        fi
    done
    if [ -n "${PYTHON-}" ]; then fail "PYTHON is '$PYTHON', which is no Python 3.10 or newer"; fi
    fail "Python 3.10 or newer is needed and none was found; install it, or give its path: PYTHON=/path/to/python3"
}

# is_complete PURPOSE: whether `python` has the packages of setup.py's REQUIRED, and those of the tests.
is_complete() {
    "$python" - "$1" 2>/dev/null <<'PYTHON_CODE'
import sys
from importlib.metadata import version
from importlib.util import find_spec

needed = ["torch", "numpy", "safetensors", "tensorboard", "tqdm", "matplotlib", "tomli"]
if sys.version_info >= (3, 11):
    needed.remove("tomli")
if sys.argv[1] == "tests":
    needed += ["pytest", "pytest_timeout", "xdist", "hypothesis", "ruff", "mypy", "pybind11", "setuptools", "orjson",
               "isal", "nltk", "h5py", "lmdb", "pyarrow", "zstandard", "transformers", "peft", "triton",
               "sklearn", "scipy", "gemmi", "sphinx", "myst_parser", "furo", "ipykernel", "nbclient", "nbformat"]
    if sys.platform != "linux":
        needed.remove("triton")
complete = all(find_spec(name) for name in needed)
sys.exit(not (complete and tuple(map(int, version("torch").split(".")[:2])) >= (2, 11)))
PYTHON_CODE
}

# lock: waits until no other setup works on this checkout. The lock is released when this process ends, for any reason.
lock() {
    exec 9>"$root/.setup.lock"
    "$python" - <<'PYTHON_CODE'
import fcntl

try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("setup: waiting for another setup of this checkout", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass  # a file system without locks
PYTHON_CODE
}

# make_environment PURPOSE: sets `python` to that of .venv, after installing the requirements and the project there.
make_environment() {
    local base=$python unfinished="$root/.venv/setup-unfinished"
    python="$root/.venv/bin/python"
    if [ -e "$unfinished" ] || { [ -e "$root/.venv" ] && ! "$python" -c '' 2>/dev/null; }; then
        echo "setup: .venv is unfinished or broken; starting it afresh"
        rm -rf "$root/.venv"
    fi
    if ! "$python" -c 'import pip' 2>/dev/null; then
        "$base" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$base has no module venv; install it (Debian, Ubuntu: apt install python3-venv) and run this again"
        echo "setup: making a virtual environment in $root/.venv"
        mkdir -p "$root/.venv"
        touch "$unfinished"
        "$base" -m venv "$root/.venv" || fail "$base could not make a virtual environment (see above)"
    fi
    install requirements.txt -r "$root/requirements.txt"
    install setup.py --use-pep517 --no-build-isolation --no-deps -e "$root"
    if [ "$1" = tests ]; then install tests/requirements.txt -r "$root/tests/requirements.txt"; fi
    rm -f "$unfinished"
}

# install FILE PIP-ARGUMENTS: runs pip, unless FILE is the same as at the last successful install.
install() {
    local file=$1 installed="$root/.venv/installed-${1//\//-}" quiet=-qq
    shift
    if [ -e "$installed" ] && [ "$(<"$root/$file")" = "$(<"$installed")" ]; then return; fi
    if [ -t 1 ]; then quiet=--progress-bar=on; fi
    echo "setup: installing what $file asks for into .venv"
    "$python" -m pip install "$quiet" --disable-pip-version-check "$@" ||
        fail "$file could not be installed (see above); run this again, or activate a Python that has what it lists"
    cp "$root/$file" "$installed"
}

# build_helpers: compiles the helpers beside their sources if one is missing or outdated; prints why if it cannot.
build_helpers() {
    local suffix why
    suffix=$(tell 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    if are_built "$suffix"; then return; fi
    if ! command -v "${CXX:-c++}" >/dev/null; then
        why="no C++ compiler"
    elif ! "$python" -c 'import pybind11, setuptools' 2>/dev/null; then
        why="no pybind11"
    else
        echo "setup: building the C++ helpers (a minute)"
        (cd "$root" && "$python" setup.py --quiet build_ext --inplace) >"$root/.setup.log" 2>&1 || true
        if are_built "$suffix"; then
            echo "setup: built the C++ helpers"
            return
        fi
        why="see .setup.log"
    fi
    echo "setup: no C++ helpers ($why); their Python twins do the same work, more slowly"
}

# are_built SUFFIX: whether each helper exists and is newer than its sources.
are_built() {
    local made
    for made in data/rows/_packing:data/rows/packing.cpp kernels/pointwise/_pointwise:kernels/pointwise/pointwise.cpp \
        kernels/attention/_packed_attention:kernels/attention/packed_attention{.cpp,.h,_blocks.inc,_kernels.inc}; do
        if ! [ "$root/megatron/${made%:*}$1" -nt "$root/megatron/${made#*:}" ]; then return 1; fi
    done
}

python=$(first_python) || exit
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# How long a waiting thread spins before it yields its core (GNU OpenMP). With the default, ten times this, threads slow
# each other down a hundredfold beside other work; without spinning, an idle machine is slower by half.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-30000}
# Makes glibc request huge pages. Activations are new memory at each step; in pages of 4 KB, first touching it takes a
# tenth of a small model's step. With another C library, or where Linux grants no huge pages, this has no effect.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
if [ -w "$root" ]; then
    lock
    is_complete "$1" || make_environment "$1"
    build_helpers
    exec 9>&-
else
    is_complete "$1" || fail "$python lacks packages of requirements.txt, and $root cannot be written to"
fi
