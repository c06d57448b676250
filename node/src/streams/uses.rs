//! What a connection is used for, counted by the streams themselves, so that one on which goods flow is not closed for the
//! sake of another.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Protocol;

/// Open streams of one connection. Clones count the same ones.
#[derive(Clone, Debug, Default)]
pub(super) struct Uses(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    goods: AtomicUsize,
    others: AtomicUsize,
}

/// The most that a connection is used for; the least comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Use {
    Idle,
    Talk,
    Goods,
}

impl Uses {
    /// Counts a stream until it is dropped.
    pub(super) fn begin(&self, protocol: Protocol) -> InUse {
        let in_use = InUse { uses: self.clone(), bulk: protocol.is_bulk() };
        in_use.count().fetch_add(1, Ordering::Relaxed);
        in_use
    }

    pub(super) fn now(&self) -> Use {
        match (self.0.goods.load(Ordering::Relaxed), self.0.others.load(Ordering::Relaxed)) {
            (0, 0) => Use::Idle,
            (0, _) => Use::Talk,
            _ => Use::Goods,
        }
    }
}

/// One open stream.
#[derive(Debug)]
pub(super) struct InUse {
    uses: Uses,
    bulk: bool,
}

impl InUse {
    fn count(&self) -> &AtomicUsize {
        if self.bulk { &self.uses.0.goods } else { &self.uses.0.others }
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.count().fetch_sub(1, Ordering::Relaxed);
    }
}
