//! The `willcall` binary: flags in, one role or command run, exit code out.
fn main() {}
