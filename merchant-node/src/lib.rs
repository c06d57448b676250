//! The storefront. A merchant sells over HTTP, takes the money through a payment provider, and turns each sale into a
//! ticket with the manager's help; this crate exists so that a shop needs nothing but one process and one folder.
//!
//! Reading order: `running` (what is started, in which order), `http` (steps 1 to 3), `orders` (the state machine of
//! a sale, steps 4 to 8), `payments` (how money is held, taken and given back), `link` (talking to the manager).

mod backup;
mod clock;
mod config;
mod control;
mod evidence;
mod http;
mod init;
mod link;
mod orders;
mod payments;
mod recovery;
mod running;
mod shop;
mod tables;

pub use backup::{RestoreBackupError, restore_backup};
pub use config::{Config, ConfigError};
pub use init::{InitError, InitOptions, InitReport, init};
pub use orders::{OrderId, Stage};
pub use payments::{
    AuthorisationId, CodeError, IssueError, PaymentError, PaymentFuture, PaymentProvider, Prepaid, VoucherCode,
    VoucherInfo,
};
pub use running::{Running, StartError, start, start_with};
