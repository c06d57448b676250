//! Durable tables for every role: redb behind one writer thread with group commit, so that "stored before it is
//! acknowledged" costs one disk flush for many callers and no role needs to know how.
//!
//! ```no_run
//! # use willcall_store as store; // other crates of the workspace know it by this name
//! use store::{Db, Options, StoreError, Table};
//! # #[derive(bincode::Encode, bincode::Decode)]
//! # struct Receipt { chunks: u64 }
//! # protocol::wire!(Receipt => 64);
//! const RECEIPTS: Table<(protocol::PeerId, u64), Receipt> = Table::new("receipts");
//!
//! # async fn example(peer: protocol::PeerId) -> Result<(), Box<dyn std::error::Error>> {
//! let db = Db::open("seeder.redb", Options::new(1))?;
//! db.write(move |txn| RECEIPTS.put(txn, &(peer, 7), &Receipt { chunks: 3 })).await?; // on disk from here on
//! let receipts = db.read(|txn| RECEIPTS.prefix(txn, &peer, 100))?;
//! # Ok(()) }
//! ```

mod backup;
mod beside;
mod db;
mod disk;
mod error;
mod key;
mod step;
mod table;
mod transaction;
mod writer;

pub use backup::BackupError;
pub use beside::{RestoreError, Restored, restore};
pub use db::{Db, Options, Stats, is_absent};
pub use error::{OpenError, StoreError};
pub use key::{FixedKey, KeyBytes, KeyLike, PrefixOf};
pub use step::{CRASH_FILE, Step};
pub use table::{Mark, Record, Table, Txn};
pub use transaction::{ReadTransaction, WriteTransaction};
