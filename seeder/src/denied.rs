//! The operator's own deny list: contents that this seeder has nothing to do with, whatever the manager says. They are not
//! served, not copied here, and what is here of them goes. To a client it looks as if they had never been here.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Mutex, PoisonError, RwLock};

use protocol::api::SeederReport;
use protocol::{ContentId, Digest};
use store::{Db, Mark, StoreError};

use crate::tables::DENIED;

/// Most entries made by command: an operator who denies more than that means all.
pub(crate) const MAX_DENIED: usize = 100_000;

/// The list: of the configuration, which only its file changes, and of the commands.
pub(crate) struct Denied {
    db: Db,
    configured: BTreeSet<ContentId>,
    added: RwLock<BTreeSet<ContentId>>,
}

/// Why the list was not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DenyError {
    #[error("{MAX_DENIED} contents are denied already")]
    Full,
    #[error("this content is denied in config.toml; change it there and start the seeder again")]
    Configured,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl Denied {
    /// Blocks for the reading.
    pub(crate) fn load(db: &Db, configured: &[ContentId]) -> Result<Denied, StoreError> {
        let added = db.read(|txn| DENIED.range(txn, .., MAX_DENIED))?;
        let added = added.into_iter().map(|(id, _)| id).collect();
        Ok(Denied { db: db.clone(), configured: configured.iter().copied().collect(), added: RwLock::new(added) })
    }

    pub(crate) fn contains(&self, id: &ContentId) -> bool {
        self.configured.contains(id) || self.added.read().unwrap_or_else(PoisonError::into_inner).contains(id)
    }

    /// In the configuration, and by command.
    pub(crate) fn list(&self) -> (Vec<ContentId>, Vec<ContentId>) {
        let added = self.added.read().unwrap_or_else(PoisonError::into_inner);
        (self.configured.iter().copied().collect(), added.iter().copied().collect())
    }

    /// Denies a content from now on. It is on disk when this returns.
    pub(crate) async fn add(&self, id: ContentId) -> Result<(), DenyError> {
        if self.added.read().unwrap_or_else(PoisonError::into_inner).len() >= MAX_DENIED {
            return Err(DenyError::Full);
        }
        self.db.write(move |txn| DENIED.put(txn, &id, &Mark)).await?;
        self.added.write().unwrap_or_else(PoisonError::into_inner).insert(id);
        Ok(())
    }

    /// Takes a content off the list again. False where it was not on it.
    pub(crate) async fn remove(&self, id: ContentId) -> Result<bool, DenyError> {
        if self.configured.contains(&id) {
            return Err(DenyError::Configured);
        }
        let was = self.db.write(move |txn| DENIED.delete(txn, &id)).await?;
        self.added.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        Ok(was)
    }
}

/// What was ordered here and is not taken because of the list, as each report says: the manager orders it elsewhere. By the
/// digest of the signed manifest, which the list does not know. The oldest go first; what is ordered again is known again.
#[derive(Debug, Default)]
pub(crate) struct Unwanted(Mutex<VecDeque<(Digest, ContentId)>>);

impl Unwanted {
    /// True where it was not known: the manager is to be told.
    pub(crate) fn add(&self, manifest: Digest, content: ContentId) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.iter().any(|(other, _)| *other == manifest) {
            return false;
        }
        while known.len() >= SeederReport::MAX_UNWANTED {
            known.pop_front();
        }
        known.push_back((manifest, content));
        true
    }

    /// Those that are denied still; the others are forgotten.
    pub(crate) fn still(&self, denied: impl Fn(&ContentId) -> bool) -> Vec<Digest> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(_, content)| denied(content));
        known.iter().map(|(manifest, _)| *manifest).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_wanted_is_bounded_and_forgotten_when_it_is_denied_no_more() {
        let unwanted = Unwanted::default();
        let manifest = |n: usize| Digest::of("unwanted", &[&n.to_be_bytes()]);
        let content = |n: usize| ContentId::from_bytes((n as u128).to_be_bytes());
        for n in 0..=SeederReport::MAX_UNWANTED {
            assert!(unwanted.add(manifest(n), content(n)));
        }
        assert!(!unwanted.add(manifest(1), content(1)), "the manager was told");
        let said = unwanted.still(|_| true);
        assert_eq!(said.len(), SeederReport::MAX_UNWANTED);
        assert!(!said.contains(&manifest(0)) && said.contains(&manifest(SeederReport::MAX_UNWANTED)));
        assert_eq!(unwanted.still(|id| *id == content(5)), [manifest(5)]);
        assert!(unwanted.add(manifest(1), content(1)));
    }
}
