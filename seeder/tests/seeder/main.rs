//! A seeder over real sockets, between a manager that is played by the test and clients that say whatever a test wants
//! them to: what a seeder does with an honest, a broken and a hostile peer only shows with the whole of it in place.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "tests fail by panicking, and print what they counted"
)]

// The name that the rest of the workspace gives this crate.
extern crate willcall_seeder as seeder;

mod admission;
mod announcing;
mod client;
mod contact;
mod copies;
mod hostile;
mod leaving;
mod limits;
mod manager;
mod receipts;
mod trust;
mod window;
mod world;
