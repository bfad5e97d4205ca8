#!/usr/bin/env bash
# Everything that must hold before a change lands: ruff, pyright, pytest. Makes its own .venv.
# Further arguments go to pytest, e.g.: bash scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
extra=test
source scripts/environment.sh
ruff check .
ruff format --check .
pyright
pytest "$@"
