//! What this client acknowledged, remembered across runs: an acknowledgement must be a superset of the one before it,
//! and a seeder that lost its copy gets it back.

use std::io;
use std::path::PathBuf;

use delivery::AckStore;
use protocol::codec::{self, Wire};
use protocol::receipt::{Ack, DeliveryId};
use protocol::{PeerId, Signed};

use crate::home::{At, FileError, Home, make_private_dir, read_file, replace_file};

/// Seeders whose acknowledgements are looked for in one delivery: four times as many as one fetch talks to.
const MOST: usize = 1024;

/// One file a seeder, in a folder of one delivery. They are not flushed: what a power cut takes, the seeder still has.
pub(super) struct AckFiles {
    dir: PathBuf,
}

impl AckFiles {
    pub(super) fn of(home: &Home, delivery: DeliveryId) -> Self {
        AckFiles { dir: home.delivery_dir(&delivery.transaction).join(format!("acks-{}", delivery.delivery)) }
    }

    /// Those to whom one was saved.
    pub(super) fn seeders(&self) -> Result<Vec<PeerId>, FileError> {
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.at("list the folder", &self.dir)?,
        };
        // What a killed process left half written has another name.
        let named = |name: std::ffi::OsString| name.to_str().and_then(|name| name.parse().ok());
        Ok(entries.filter_map(|entry| named(entry.ok()?.file_name())).take(MOST).collect())
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

    fn all(&self) -> Vec<Signed<Ack>> {
        let seeders = self.seeders().unwrap_or_else(|error| {
            tracing::warn!(%error, "what was acknowledged before is not known");
            Vec::new()
        });
        seeders.iter().filter_map(|seeder| self.load(seeder)).collect()
    }
}
