//! The `willcall` binary: flags in, one role or command run, exit code out. Everything else is in the crates beside it.

mod cli;
mod demo;
mod local;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
