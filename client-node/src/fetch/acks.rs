//! What this client acknowledged, remembered across runs: an acknowledgement must be a superset of the one before it,
//! and a seeder that lost its copy gets it back.

use std::path::PathBuf;

use delivery::AckStore;
use protocol::codec::{self, Wire};
use protocol::receipt::{Ack, DeliveryId};
use protocol::{PeerId, Signed};

use crate::home::{Home, make_private_dir, read_file, replace_file};

/// One file a seeder, in a folder of one delivery. They are not flushed: what a power cut takes, the seeder still has.
pub(super) struct AckFiles {
    dir: PathBuf,
}

impl AckFiles {
    pub(super) fn of(home: &Home, delivery: DeliveryId) -> Self {
        AckFiles { dir: home.delivery_dir(&delivery.transaction).join(format!("acks-{}", delivery.delivery)) }
    }
}

impl AckStore for AckFiles {
    fn load(&self, seeder: &PeerId) -> Option<Signed<Ack>> {
        let path = self.dir.join(seeder.to_string());
        match read_file(&path, <Signed<Ack>>::MAX) {
            Ok(bytes) => bytes.and_then(|bytes| codec::decode(&bytes).ok()),
            Err(error) => {
                tracing::warn!(%error, "acknowledgement not read");
                None
            }
        }
    }

    fn save(&self, seeder: &PeerId, ack: &Signed<Ack>) {
        let saved = make_private_dir(&self.dir)
            .and_then(|()| replace_file(&self.dir.join(seeder.to_string()), &codec::encode(ack), false));
        if let Err(error) = saved {
            tracing::warn!(%error, "acknowledgement not remembered");
        }
    }
}
