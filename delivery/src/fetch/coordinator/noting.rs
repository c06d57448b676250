//! What is stored is noted as such once it is durable, and once it is on paper whom it came from.

use std::collections::BTreeMap;

use protocol::ChunkSet;
use tokio::time::Instant;

use super::super::session::{Command, SessionId};
use super::Coordinator;

impl Coordinator {
    pub(super) fn sync_if_due(&mut self) {
        let Some(content) = self.content.clone() else { return };
        if let Some((_, chunks)) = self.remembering.take_if(|(streams, _)| streams.is_empty()) {
            self.syncing = Some(tokio::task::spawn_blocking(move || content.sync_only(&chunks)));
            return;
        }
        let limits = &self.job.limits;
        let due = self.unsynced > 0 && (self.found || self.synced_at.elapsed() >= limits.sync_every);
        let busy = self.syncing.is_some() || self.remembering.is_some();
        if !busy && (due || self.unsynced >= limits.sync_bytes) && self.remember() {
            (self.unsynced, self.found) = (0, false);
            self.synced_at = Instant::now();
        }
    }

    /// Asks every stream to have on paper what it acknowledged. A chunk that is noted as stored is never fetched again, so
    /// a client that is killed must not have noted one of which it no longer knows whom to pay for it. False when a
    /// stream cannot be asked now.
    pub(super) fn remember(&mut self) -> bool {
        let Some(content) = &self.content else { return false };
        let all = ChunkSet::from_range(0..content.manifest().chunks());
        let chunks = all.difference(self.scheduler.missing());
        let welcomed = || self.handles.iter().filter(|(_, handle)| handle.welcome.is_some());
        // All of them or none: the others would acknowledge and save again and again until the last one has room.
        if welcomed().any(|(_, handle)| handle.commands.capacity() == 0) {
            return false;
        }
        let mut streams = BTreeMap::new();
        for (peer, handle) in welcomed() {
            // One whose task has just ended has everything on paper already.
            if handle.commands.try_send(Command::Remember).is_ok() {
                streams.insert(*peer, handle.number);
            }
        }
        self.remembering = Some((streams, chunks));
        true
    }

    /// A stream has on paper what it acknowledged, or has ended, which comes to the same.
    pub(super) fn remembered(&mut self, id: SessionId) {
        if let Some((streams, _)) = &mut self.remembering
            && streams.get(&id.peer) == Some(&id.number)
        {
            streams.remove(&id.peer);
        }
    }
}
