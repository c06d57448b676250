#!/usr/bin/env bash
# What publishing costs beside its parts: BLAKE3 and AES-256-GCM of the same file on one thread, and cp with fsync, in one
# run, in turns. On a disk, since durability is a part of it.
#   scripts/bench-publish.sh [--size 1GiB] [--runs 5] [--dir DIR] [--json FILE]
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet
cargo build --release --quiet -p willcall-protocol --example primitives
exec env PYTHONDONTWRITEBYTECODE=1 python3 scripts/bench/publish.py "$@"
