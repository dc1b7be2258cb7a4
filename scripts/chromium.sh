#!/usr/bin/env bash
# Install Chromium for the tests of the report's page, where it is missing and can be had; they are skipped without it.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && exit
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "chromium: it is not installed, and only root can install it, with apt-get; its tests will be skipped" >&2
    exit
fi
if ! { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y chromium; } >/dev/null; then
    echo "chromium: apt-get could not install it; its tests will be skipped" >&2
fi
