//! A client that forgets what it acknowledged cannot give a superset of it, and a seeder that lost its copy in a crash
//! can be given it back: so acknowledgements are remembered across streams and restarts.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use protocol::receipt::Ack;
use protocol::{PeerId, Signed};

/// Remembers the newest acknowledgement to each seeder of one delivery. The methods may block: they are called on
/// blocking threads. One is saved before it is sent, so that a client that is killed knows what it acknowledged; losing
/// some costs a seeder's window, and chunks that are acknowledged to another seeder once more.
pub trait AckStore: Send + Sync {
    /// The newest acknowledgement given to `seeder`.
    fn load(&self, seeder: &PeerId) -> Option<Signed<Ack>>;

    /// Remembers a newer one.
    fn save(&self, seeder: &PeerId, ack: &Signed<Ack>);

    /// The newest to every seeder.
    fn all(&self) -> Vec<Signed<Ack>>;
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

    fn all(&self) -> Vec<Signed<Ack>> {
        self.acks.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
