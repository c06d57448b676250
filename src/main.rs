//! The `willcall` binary: flags in, one role or command run, exit code out. Everything else is in the crates beside it.

mod cli;
mod demo;
mod local;
mod memory;

use std::process::ExitCode;

fn main() -> ExitCode {
    memory::keep_freed();
    cli::main()
}
