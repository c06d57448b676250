//! The program as operators and buyers have it, under bad luck and bad will: every test runs the real binary, every
//! node a process of its own, on loopback with ports that the system chooses or on a network of its own (`reach`). One
//! test program, so that it links once.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests fail by panicking, print what they counted, and say on standard error what they leave out"
)]

mod accounts;
mod backups;
mod crash_matrix;
mod crashes;
mod demo;
mod disks;
mod garbage;
mod gift;
mod goods;
mod load;
mod mistakes;
mod products;
mod proofs;
mod reach;
mod slow;
mod stolen_catalogue;
mod stolen_key;
mod support;
mod taken_back;
mod trust;
