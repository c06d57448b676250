//! The designated client: it receives tickets, fetches what they are for from many seeders, and ends with files that are
//! known to be the ones that were sold. A library for commands: each starts a node, works, and stops; the goods and
//! everything needed to check them stay usable when manager and merchant are gone.

mod device;
mod epochs;
mod evidence;
mod fetch;
mod home;
mod in_place;
mod inbox;
mod layout;
mod library;
mod link;
mod merge;
mod networks;
mod place;
mod plain;
mod public;
mod running;
mod settings;
mod shop;
mod status;
mod unpack;
mod verify;

pub use device::{MoveChoice, MoveItem, Moves, move_purchases};
pub use evidence::{EvidenceError, Gathered, evidence};
pub use fetch::{
    FetchError, FetchOptions, FetchOutcome, FetchPhase, FetchProgress, LeaseView, Target, TargetError, Waiting, fetch,
    read_ticket_file,
};
pub use home::{FileError, Home, HomeError};
pub use inbox::{Inbox, InboxError, InboxItem, inbox};
pub use library::{DeliveryState, LibraryError, Trouble};
pub use link::{LinkOptions, ManagerError, TrustError};
pub use place::PlaceError;
pub use plain::PlainError;
pub use running::{AskError, DownloadLimits, LimitChange, limit, progress_of};
pub use settings::{Settings, SettingsError, check_rate};
pub use shop::{BuyRequest, Offer, Purchase, ShopError, buy, handed_over, is_unencrypted, products};
pub use status::{DeliveryStatus, status};
pub use unpack::UnpackError;
pub use verify::{FileReport, FileState, VerifyError, VerifyReport, VerifyTarget, verify};

#[cfg(test)]
mod tests;
