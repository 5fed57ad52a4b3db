#!/usr/bin/env bash
# The native kernel's tests as an ARM machine runs them, with NEON, under qemu's user mode: a cross compiler's library,
# Debian's Python and PyPI's packages for ARM, all in build/arm. Slow: it says what is right, not how fast.
# Needs a Debian or Ubuntu with qemu-user, g++-aarch64-linux-gnu and cmake; no root.
set -euo pipefail
cd "$(dirname "$0")/.."
here=$PWD/build/arm pip=${VENV:-.venv}/bin/pip
for command in qemu-aarch64 aarch64-linux-gnu-g++ cmake apt-get dpkg-deb; do
  command -v "$command" >/dev/null || { echo "make arm needs $command; on Debian: apt install qemu-user g++-aarch64-linux-gnu cmake" >&2; exit 1; }
done

cmake -S src/regard/kernels/native -B "$here/native" -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 >/dev/null
cmake --build "$here/native"

if [ ! -e "$here/complete" ]; then
  mkdir -p "$here"/{root,lists/partial,archives/partial}
  : >"$here/status"  # as a machine with nothing on it, so that all that is needed is named
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User="$(id -un)"
    -o Dir::State="$here" -o Dir::State::status="$here/status" -o Dir::State::lists="$here/lists"
    -o Dir::Cache="$here" -o Dir::Cache::archives="$here/archives" -o Debug::NoLocking=1)
  "${apt[@]}" update
  "${apt[@]}" install --yes --download-only --no-install-recommends python3 libstdc++6 libgomp1
  for package in "$here"/archives/*.deb; do dpkg-deb -x "$package" "$here/root"; done
fi
arm() {
  qemu-aarch64 -L "$here/root" -E PYTHONPATH="$here/site:$PWD/src:$PWD/tests" -E OMP_NUM_THREADS=1 \
    -E REGARD_NATIVE="$here/native/_native.so" "$here/root/usr/bin/python3" "$@"
}
if [ ! -e "$here/complete" ]; then
  target=(--quiet --target "$here/site" --upgrade --implementation cp --only-binary=:all: --platform any
    --python-version "$(arm -c 'import platform; print(platform.python_version())')"
    --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64)
  "$pip" install "${target[@]}" --no-deps "torch==2.9.*"  # later ones for ARM want CUDA
  "$pip" install "${target[@]}" filelock fsspec hypothesis jinja2 networkx numpy pytest sympy transformers typing-extensions wrapt xarray
  touch "$here/complete"
fi
arm -c 'from regard.kernels import native; print(native.why_not() or native.describe())'
# What an older torch warns of is no fault here; one test starts another process, which would not be emulated.
arm -m pytest --noconftest -p no:cacheprovider -o filterwarnings=default tests/kernels/test_native.py \
  --deselect tests/kernels/test_native.py::test_info_says_which_path_and_why
