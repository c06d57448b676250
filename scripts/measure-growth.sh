#!/usr/bin/env bash
# What grows with what: cost per sale, per delivered GiB, per receipt and per seeder, each at three sizes, on this machine.
# Writes docs/growth.json and draws docs/growth.svg from it; docs/scale.md says what they mean.
#   scripts/measure-growth.sh [--parts store,seeders,gossip,delivery] [--json FILE] [--work DIR] [--quick]
# A part that is not named keeps its figures. The whole takes about an hour on two cores, most of it a store with a million
# transactions; --quick leaves the largest size of each out. Needs 40 GB in the work folder (default: a temporary one).
set -euo pipefail
cd "$(dirname "$0")/.."
exec env PYTHONDONTWRITEBYTECODE=1 python3 scripts/bench/growth.py "$@"
