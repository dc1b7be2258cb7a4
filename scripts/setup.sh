#!/usr/bin/env bash
# Make the project's environment, .venv, from the pinned packages in requirements/torch.txt and requirements/cpu.txt. Safe
# to interrupt and to repeat: .venv/.installed is written last, and without it, or with other pins in it, the environment
# starts empty.
set -euo pipefail
cd "$(dirname "$0")/.."

find_python() {
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
        then
            echo "$candidate"
            return
        fi
    done
    echo "set-up: no Python 3.11, 3.12 or 3.13 with venv was found on the PATH as python3 or python3.1x" >&2
    return 1
}

install_packages() {
    local python torch=requirements/torch.txt
    python=$(find_python)
    "$python" -m venv --clear .venv
    if ! .venv/bin/pip install --quiet --no-deps -r "$torch"; then
        echo "set-up: pip finds no $(grep '^torch==' "$torch") here; taking it from PyTorch's own index of CPU builds"
        .venv/bin/pip install --quiet --no-deps --index-url https://download.pytorch.org/whl/cpu -r "$torch"
    fi
    .venv/bin/pip install --quiet --no-deps --require-hashes -r requirements/cpu.txt
}

if ! cat requirements/torch.txt requirements/cpu.txt | cmp --silent - .venv/.installed; then
    echo "set-up: installing into .venv (minutes the first time)"
    install_packages
fi
.venv/bin/pip install --quiet --no-deps --no-build-isolation --editable .
cat requirements/torch.txt requirements/cpu.txt > .venv/.installed
