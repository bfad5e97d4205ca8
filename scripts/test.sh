#!/usr/bin/env bash
# Everything that must hold before a change lands: ruff, pyright, pytest. Makes its own .venv.
# Further arguments go to pytest, e.g.: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
extra=test
source scripts/environment.sh
case "$*" in *slow* | *browser*)
    # Playwright drives the system's Chromium; without one, tests of the page skip and say so.
    command -v chromium chromium-browser google-chrome >/dev/null ||
        { apt-get update -q && apt-get install -qy chromium; } ||
        echo "note: Chromium could not be installed; tests marked browser will be skipped." >&2
    ;;
esac
ruff check .
ruff format --check .
pyright
# Two processes of one thread each: threads that wait for each other cost more than they gain here.
export OMP_NUM_THREADS=1
pytest -n 2 --dist loadfile "$@"
