#!/usr/bin/env bash
# From a fresh clone to a report: environment, assets, one co-training run on ML-100K.
# Further arguments override settings, e.g.: bash scripts/quickstart.sh --seed 1
set -euo pipefail
cd "$(dirname "$0")/.."
extra=""
source scripts/environment.sh
# --quiet: after an error, no traceback of the launcher below the message.
accelerate launch --quiet scripts/train_online.py --config scripts/recipes/quickstart.yaml "$@"
