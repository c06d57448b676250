//! Before anything is asked for, the content has a place on the disk, and what is there already is known.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use protocol::fetching::{Crowd, Loss, Scheduler};
use protocol::manifest::Manifest;
use protocol::{ChunkSet, PeerId, Signed};

use super::super::progress::LineMeter;
use super::Coordinator;
use crate::clock::running_ms;
use crate::content_store::Content;

/// A content that chunks can be written to.
pub(super) struct Placed {
    pub(super) content: Arc<Content>,
    /// Chunks that were found there and not noted.
    pub(super) adopted: ChunkSet,
}

impl Coordinator {
    /// So many bytes were here and not noted.
    pub(super) fn adopted(&mut self, bytes: u64) {
        self.adopted_bytes += bytes;
        self.unsynced += bytes;
        self.found |= bytes > 0;
        self.job.adopted.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn create(&mut self, (signed, manifest): (Signed<Manifest>, Manifest)) {
        if self.content.is_some() || self.creating.is_some() {
            return;
        }
        // Nothing can be there yet.
        self.shared.to_look_for(&ChunkSet::from_range(0..manifest.chunks()));
        let store = self.job.store.clone();
        let creating = tokio::task::spawn_blocking(move || {
            Ok(Placed { content: store.create(&signed, &manifest)?, adopted: ChunkSet::new() })
        });
        self.creating = Some(creating);
    }

    /// Before anything is asked for: a client that was killed holds more than it noted. What it acknowledged, to whomever,
    /// is not fetched from somebody else, and acknowledged to them as well, while it lies on the disk.
    pub(super) fn look_through(&mut self, content: Arc<Content>) {
        self.contents.send_replace(Some(Arc::clone(&content)));
        let shared = Arc::clone(&self.shared);
        self.creating = Some(tokio::task::spawn_blocking(move || {
            let mut claims = ChunkSet::new();
            for ack in shared.acks.all() {
                if let Ok(claimed) = ack.peek()
                    && shared.is_ours(&ack, &claimed.seeder)
                {
                    claims = claims.union(&claimed.chunks);
                }
            }
            // All of them, also where a stream looks already: nothing is planned before this has ended.
            shared.to_look_for(&claims);
            let adopted = content.adopt_while(&claims, &|| !shared.cancel.is_cancelled())?;
            Ok(Placed { content, adopted })
        }));
    }

    /// From here on chunks can be planned.
    pub(super) fn attach(&mut self, content: Arc<Content>) {
        let now = running_ms();
        let manifest = content.manifest();
        let all = ChunkSet::from_range(0..manifest.chunks());
        self.wanted = self.job.only.as_ref().map_or_else(|| all.clone(), |only| only.intersection(&all));
        let have = content.have().union(&all.difference(&self.wanted));
        let config = self.job.limits.scheduler.clone();
        self.scheduler = Scheduler::new(manifest.chunks(), manifest.chunk_size, &have, config);
        self.crowd = Crowd::new(manifest.chunk_size);
        self.line = LineMeter::new(manifest.chunk_size);
        for peer in self.book.open() {
            self.scheduler.add_source(peer, now);
        }
        // Those with a stream are not to be connected again.
        let due: Vec<PeerId> = self.scheduler.due_connections(now);
        for peer in due {
            match self.handles.get(&peer).map(|handle| handle.welcome.clone()) {
                Some(Some((held, budget))) => self.scheduler.connected(&peer, held, budget, now),
                Some(None) => {}
                None => self.scheduler.lost(&peer, Loss::ComeBack(0), now, 0),
            }
        }
        // Streams may know it already.
        self.contents.send_replace(Some(Arc::clone(&content)));
        self.content = Some(content);
        self.progressed_at = now;
    }
}
