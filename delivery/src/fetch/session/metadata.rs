//! The manifest and the chaining values come over the same streams as the chunks, from whichever seeder is there; each is
//! checked before it is used, so it does not matter which.

use protocol::deliver::ClientMessage;
use protocol::manifest::{Manifest, Segment};
use protocol::trust::KeyPurpose;
use protocol::{Refusal, RefusalCode, Signed};
use tokio::time::Instant;

use super::super::end::EndReason;
use super::{Conversation, Shared, What, blocking};
use crate::clock::now_ms;
use crate::content_store::{SegmentError, WriteError};

/// Segments asked for and not yet here, at most: a seeder refuses more than 64.
const ASKED_META: usize = 32;

impl Conversation {
    /// Sees to it that the chaining values of this segment are here before the chunks; false when that must wait.
    pub(super) async fn prepare(&mut self, segment: u32) -> Result<bool, EndReason> {
        if self.segments.contains(&segment) || self.asked.contains(&Some(segment)) {
            return Ok(true);
        }
        let Some(content) = self.content.clone() else { return Ok(false) };
        let here = blocking(move || content.segment(segment)).await??.is_some();
        if here {
            self.segments.insert(segment);
            return Ok(true);
        }
        if self.asked.len() >= ASKED_META {
            return Ok(false);
        }
        self.ask(Some(segment)).await?;
        Ok(true)
    }

    pub(super) async fn ask(&mut self, segment: Option<u32>) -> Result<(), EndReason> {
        if self.asked.is_empty() {
            self.asked_at = Instant::now();
        }
        self.asked.insert(segment);
        self.say(&ClientMessage::Meta { segment }).await
    }

    fn answered(&mut self, segment: Option<u32>) -> Result<(), EndReason> {
        self.asked_at = Instant::now();
        match self.asked.remove(&segment) {
            true => Ok(()),
            false => Err(EndReason::Violation("metadata that were not asked for".to_owned())),
        }
    }

    pub(super) async fn manifest(&mut self, signed: Signed<Manifest>) -> Result<(), EndReason> {
        self.answered(None)?;
        let Shared { trust, revoked, terms, .. } = &*self.shared;
        if signed.digest() != terms.manifest {
            let code = RefusalCode::Malformed;
            return Err(EndReason::BadMeta(Refusal::new(code, "its manifest is not the one that was sold")));
        }
        let opened = trust.open(&signed, KeyPurpose::Catalogue, |manifest| manifest.published_at, now_ms());
        let manifest = opened.map_err(EndReason::Manifest)?;
        manifest.check(terms.network).map_err(EndReason::Manifest)?;
        if revoked.has_content(&manifest.content) {
            let code = RefusalCode::Revoked;
            return Err(EndReason::Manifest(Refusal::new(code, "this content was taken down")));
        }
        self.report(What::Manifest(Box::new((signed, manifest)))).await
    }

    pub(super) async fn segment(&mut self, index: u32, segment: Segment) -> Result<(), EndReason> {
        self.answered(Some(index))?;
        let Some(content) = self.content.clone() else { return Ok(()) };
        // Awaited: the chunks that it is for are next on the stream.
        blocking(move || content.put_segment(index, segment)).await?.map_err(|error| match error {
            SegmentError::Refused(refusal) => EndReason::BadMeta(refusal),
            SegmentError::Removed => EndReason::Disk(WriteError::Removed),
            SegmentError::File(error) => error.into(),
        })?;
        self.segments.insert(index);
        Ok(())
    }
}
