//! Streams for goods that wait because only a relay leads to their peer so far: the two nodes are about to dial each
//! other. They wait for a short while, and then learn why nothing comes of it.

use std::collections::HashMap;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use libp2p::PeerId;

use super::open::Want;

/// Two nodes that can dial each other do so within a few round trips, and twice again should the first go wrong.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Default)]
pub(super) struct Parked {
    // Each entry holds at least one want, so the permits of the wants bound the table.
    wants: HashMap<PeerId, Vec<Want>>,
    patience: FuturesUnordered<BoxFuture<'static, PeerId>>,
}

impl Parked {
    pub(super) fn add(&mut self, peer: PeerId, want: Want) {
        let waiting = self.wants.entry(peer).or_default();
        if waiting.is_empty() {
            self.patience.push(tokio::time::sleep(PATIENCE).map(move |()| peer).boxed());
        }
        waiting.retain(|want| !want.is_cancelled());
        waiting.push(want);
    }

    pub(super) fn take(&mut self, peer: &PeerId) -> Vec<Want> {
        self.wants.remove(peer).unwrap_or_default()
    }

    /// The next peer for which it was waited long enough.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<PeerId> {
        while let Poll::Ready(Some(peer)) = self.patience.poll_next_unpin(cx) {
            if self.wants.contains_key(&peer) {
                return Poll::Ready(peer);
            }
        }
        Poll::Pending
    }
}
