//! A whole Willcall network from counts, for tests and for play: every role with its real node, files and sockets, and
//! the peers that try to cheat them.
//!
//! Everything runs in this process, so that a test can look into each node, stop it at a chosen moment and start it
//! again; nothing goes past the sockets, files and HTTP that separate processes use.

pub mod adversary;
mod books;
mod client;
mod faults;
mod goods;
mod line;
mod network;
mod nodes;
mod plan;
pub mod scenario;
mod wait;

pub use books::Books;
pub use client::{Client, Fetch};
pub use faults::corrupt;
pub use goods::{Goods, identical};
pub use line::Line;
pub use network::{Network, NetworkError, Terms};
pub use nodes::{Manager, Merchant, Seeder};
pub use plan::Plan;
pub use wait::{LIMIT, Late, until};
