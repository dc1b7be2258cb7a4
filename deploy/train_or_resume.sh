#!/usr/bin/env bash
# Train into a run folder, or go on with the run that is there already: for jobs that are started again after a node is
# lost. The rest of the line is for `es-engine train` alone; a run goes on with its own config.
#   train_or_resume.sh RUN_DIR CONFIG [--set KEY=VALUE ...]
set -euo pipefail
run=${1:?the run folder is missing}
config=${2:?the config is missing}
shift 2

if [ -e "$run/config.yaml" ]; then
    exec es-engine resume "$run"
fi
exec es-engine train "$config" --run-dir "$run" "$@"
