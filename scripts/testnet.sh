#!/usr/bin/env bash
# A local network to play with: builds the binary, starts everything, prints a ready-made `buy` command, stops on Ctrl-C.
#   scripts/testnet.sh [PATH] [--seeders N] [--keep DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
cargo build --release
export PATH="$PWD/target/release:$PATH"
exec willcall testnet up "$@"
