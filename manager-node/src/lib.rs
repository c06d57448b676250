//! The content manager: it knows what is on sale, who may sell and serve it, which tickets are out and who is owed what.
//! Everything that it says to others is signed with a key of the network; everything that it promises is on disk first.

mod archive;
mod audit;
mod audit_fetch;
mod backup;
mod catalogue;
mod clocks;
mod config;
mod context;
mod control;
mod demand;
mod enrol;
mod evidence;
mod handover;
mod in_process;
mod init;
mod key_change;
mod keys;
mod ledger;
mod mesh;
mod newer_keys;
mod news;
mod placement;
mod pricing;
mod publish;
mod reach;
mod receipts;
mod recovery;
mod registry;
mod restore;
mod revocations;
mod rotate;
mod sales;
mod sources;
mod standing;
mod start;
mod statements;
mod tables;
mod transactions;
mod workers;

pub use archive::{OpenError as ArchiveError, SegmentError};
pub use audit::{
    AuditError, AuditReport, HeadsError, HeadsReport, RestoreEntry, SeenHead, Standing, read_heads, verify_audit,
};
pub use backup::{RestoreBackupError, restore_backup};
pub use config::{Config, ConfigError};
pub use enrol::InviteError;
pub use init::{InitError, InitOptions, InitReport, init};
pub use keys::KeysError;
pub use publish::pack::PackingError;
pub use publish::scan::ScanError;
pub use publish::{OriginState, PublishError, PublishProgress, PublishRequest, Published};
pub use restore::{RestoreError, mark_restored};
pub use rotate::{OldKey, RotateError, RotateReport, rotate, sign_handover, sign_key_set};
pub use start::{Running, StartError, start};
