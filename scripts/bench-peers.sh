#!/usr/bin/env bash
# Willcall beside nginx + curl, libtorrent, sendme and a raw libp2p stream: one run, interleaved, over loopback, from a
# file to a file, with both sides' CPU seconds and peak memory. What is not installed is reported as absent.
# Then many clients at once from one seeder.
#   scripts/bench-peers.sh [--size 1GiB] [--runs 9] [--json FILE] [--disk DIR] [--only NAME,…] [--crowd 8]
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release --quiet
cargo build --release --quiet -p willcall-node --example raw_stream
exec env PYTHONDONTWRITEBYTECODE=1 python3 scripts/bench/peers.py "$@"
