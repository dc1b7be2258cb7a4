#!/usr/bin/env bash
# Make an environment for GPUs in a new folder: install_cuda.sh FOLDER. It holds the packages of requirements/cuda.txt,
# which are for Python 3.12; where that is not called python3.12, PYTHON says what is.
set -euo pipefail
target=$(realpath -m "${1:?usage: install_cuda.sh FOLDER}")
cd "$(dirname "$0")/.."

"${PYTHON:-python3.12}" -m venv "$target"
"$target/bin/pip" install --no-cache-dir --no-deps --require-hashes -r requirements/cuda.txt
"$target/bin/pip" install --no-cache-dir --no-deps --no-build-isolation .
