//! A client that forgets what it acknowledged cannot give a superset of it, and a seeder that lost its copy in a crash
//! can be given it back: so acknowledgements are remembered across streams and restarts.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use protocol::receipt::Ack;
use protocol::{PeerId, Signed};

/// Remembers the newest acknowledgement to each seeder of one delivery. Both methods may block: they are called on
/// blocking threads. Losing some costs a seeder's window, nothing else.
pub trait AckStore: Send + Sync {
    /// The newest acknowledgement given to `seeder`.
    fn load(&self, seeder: &PeerId) -> Option<Signed<Ack>>;

    /// Remembers a newer one.
    fn save(&self, seeder: &PeerId, ack: &Signed<Ack>);
}

/// Remembers as long as the process lives. It holds one acknowledgement of at most 4 KiB for each seeder tried.
#[derive(Debug, Default)]
pub struct AckMemory {
    acks: Mutex<BTreeMap<PeerId, Signed<Ack>>>,
}

impl AckStore for AckMemory {
    fn load(&self, seeder: &PeerId) -> Option<Signed<Ack>> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner).get(seeder).cloned()
    }

    fn save(&self, seeder: &PeerId, ack: &Signed<Ack>) {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner).insert(*seeder, ack.clone());
    }
}
