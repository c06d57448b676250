#!/usr/bin/env bash
# Everything that must hold before a push; CI runs this and nothing else.
#   scripts/check.sh            all of it
#   scripts/check.sh quick      without the release build and the demo
set -euo pipefail
cd "$(dirname "$0")/.."
quick=${1:-}

step() { printf '\n== %s\n' "$*"; }

step "format"
cargo fmt --all --check

step "clippy, warnings denied"
cargo clippy --workspace --all-targets -- -D warnings

step "tests (the README's command)"
# All of them, also after one that fails: a run takes minutes, and its whole answer is wanted.
cargo test --workspace --no-fail-fast

step "documentation, warnings denied"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

if [ "$quick" = quick ]; then
    step "quick: the demo was left out"
    exit 0
fi

step "demo on a release build"
cargo build --release
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
./target/release/willcall demo --json > "$out/album.json"
./scripts/check-demo.sh "$out/album.json"

step "demo with a file of our own"
head -c 3000001 /dev/urandom > "$out/odd size.bin"
./target/release/willcall demo --json "$out/odd size.bin" > "$out/file.json"
./scripts/check-demo.sh "$out/file.json"

step "all good"
