//! Tests of whole commands: products that are really published, tickets that are really signed, and, where it takes
//! one, a manager and seeders on real sockets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "tests fail by panicking"
)]

mod again;
mod beginning;
mod clocks;
mod fetching;
mod in_place;
mod library;
mod moving;
mod network;
mod other_sales;
mod owed;
mod parts;
mod revoked;
mod shopping;
mod unpacking;
mod verifying;
mod voided;
mod world;
