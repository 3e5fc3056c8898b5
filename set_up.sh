#!/bin/sh
# Makes .venv with the tested versions in constraints.txt. make calls this script, and calls it
# again only if constraints.txt or this file has changed. As root it installs system packages with
# apt; otherwise it prints which are missing.
set -eu
cd "$(dirname "$0")"
supported="3.14 3.13 3.12 3.11"
venv=.venv

# A command on PATH need not be an interpreter: pyenv installs commands that only print an error.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
is_supported() { case " $supported " in *" $(version_of "$1") "*) return 0 ;; *) return 1 ;; esac }

has_venv() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ]; then  # the interpreter of an existing .venv, else python3, else the newest
    ! has_venv || python=$venv/bin/python
    for candidate in python3 $(printf 'python%s ' $supported); do
        is_supported "$python" || python=$candidate
    done
fi
if ! is_supported "$python"; then
    python=${PYTHON:-python3}
    found=$("$python" --version 2>&1) && found="is $found" || found="does not run"
    echo "error: $python $found;" \
        "rsb_ffcv needs Python 3.11, 3.12, 3.13 or 3.14 (set PYTHON=...)" >&2
    exit 2
fi
echo "setting up with $python ($("$python" --version))"

# ffcv builds against libturbojpeg and OpenCV. It only calls cv::resize of OpenCV, which two small
# packages contain; libopencv-dev would install 249 packages and 841 MB.
packages="build-essential pkg-config libturbojpeg0-dev libopencv-core-dev libopencv-imgproc-dev"
debian=python$(version_of "$python")
"$python" -c 'import ensurepip, venv' 2>/dev/null || packages="$packages $debian-venv"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$include/Python.h" ] || packages="$packages $debian-dev"
missing=
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
        missing="$missing $package"
done
if [ -n "$missing" ]; then
    if ! command -v apt-get >/dev/null; then
        echo "error: missing packages:$missing (Debian names)" >&2
        echo "  install them, or use conda with environment.yml" >&2; exit 2
    elif [ "$(id -u)" != 0 ]; then
        echo "error: missing packages:$missing; install them with" >&2
        echo "  sudo apt-get install --no-install-recommends$missing" >&2; exit 2
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing
fi

has_venv && [ "$(version_of "$venv/bin/python")" = "$(version_of "$python")" ] || {
    rm -rf "$venv"
    "$python" -m venv "$venv"
}
pip="$venv/bin/python -m pip --disable-pip-version-check"
# ffcv is installed last and without its dependencies: it requires opencv-python, which needs
# display libraries. constraints.txt has the headless build of the same module, and everything else
# that ffcv imports.
grep -v '^ffcv==' constraints.txt > "$venv/requirements.txt"
$pip install -q -r "$venv/requirements.txt"

# Debian's pkg-config file of OpenCV is in libopencv-dev and lists every module. This one lists what
# ffcv uses.
shim=$(mktemp -d)  # outside the checkout, because ffcv's set-up splits paths at spaces
trap 'rm -rf "$shim"' EXIT
mkdir -p "$shim/opencv2"
printf '#include <opencv2/core.hpp>\n#include <opencv2/imgproc.hpp>\n' > "$shim/opencv2/opencv.hpp"
{
    printf 'Name: opencv4\nDescription: core and imgproc\nVersion: 4\n'
    printf 'Cflags: -I%s -I/usr/include/opencv4\n' "$shim"
    printf 'Libs: -lopencv_imgproc -lopencv_core\n'
} > "$shim/opencv4.pc"
PKG_CONFIG_PATH="$shim" $pip install -q --no-deps "$(grep '^ffcv==' constraints.txt)"
"$venv/bin/python" -c 'import ffcv, torchvision, timm, fastargs'
touch "$venv/.ready"
