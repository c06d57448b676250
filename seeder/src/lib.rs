//! A seeder: keeps ciphertext of others, hands it to exactly those whose tickets say so, and brings the receipts home.
//! It trusts nobody it meets: clients are checked against the manager's signature, the manager's documents against the
//! network's root key, and its own disk against the chunks' hashes.
//!
//! Four concerns, four parts: admission (who is served), serving (what is sent, under which account), the outbox (what
//! was delivered), and replication (what is kept).

// What `status` says is one JSON literal with many fields.
#![recursion_limit = "256"]

mod accounts;
mod acquaintance;
mod admission;
mod announcing;
mod catching_up;
mod chunks;
mod clock;
mod config;
mod context;
mod control;
mod counts;
mod denied;
mod drain;
mod garbage;
mod gossip;
mod heads;
mod init;
mod manager;
mod network;
mod outbox;
mod post;
mod public;
mod reach;
mod replication;
mod room;
mod scrub;
mod serving;
mod start;
mod statements;
mod sync;
mod tables;
mod upkeep;

pub use config::{Config, ConfigError, check_upload};
pub use init::{InitError, InitOptions, InitReport, init, init_with};
pub use start::{Running, StartError, start, start_sharing};
