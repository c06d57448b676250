//! What the manager is told at the end of a download, and asked for: the client's word that all of it came, the key that was
//! held back for it, and another delivery when the last one is over.

use std::sync::Arc;
use std::time::Duration;

use delivery::Content;
use protocol::cipher::ContentSecret;
use protocol::manifest::{KeyPolicy, Manifest};
use protocol::receipt::Completion;
use protocol::trust::KeyPurpose;
use protocol::{Refusal, RefusalCode, Signed};
use store::Step;

use super::key::{complete, complete_for_key, open_grant};
use super::run::Run;
use super::ticket::{self, Checked, NotOpened};
use super::{FetchError, FetchPhase};
use crate::home::{blocking, now_ms};
use crate::inbox::ask_ticket;
use crate::library::DeliveryState;

/// For the completion of a product whose key is here already: the manager gets it from the seeders, too.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);

impl Run<'_> {
    /// What was downloaded in full before is paid and closed. To download it again is a delivery of its own, for which
    /// the manager says who serves it; while the manager is away, the old lease is what there is.
    pub(super) async fn ask_for_further_delivery(&self, checked: &mut Checked) -> Result<(), FetchError> {
        let Some(known) = self.delivery().await? else { return Ok(()) };
        if !known.reported && !self.reports_late(checked, known.completion).await? {
            return Ok(());
        }
        // Of what nobody can fetch any more a further delivery is of no use, and there are only so many.
        if let Some(refusal) = self.delivered_void(checked, known.manifest) {
            return Err(FetchError::ContentVoid(refusal));
        }
        let renewed = tokio::select! {
            renewed = ticket::try_renew(self.home, self.link, checked) => renewed,
            () = self.cancel.cancelled() => return Err(FetchError::Cancelled),
        };
        match renewed {
            Ok(renewed) => *checked = renewed,
            Err(error) => {
                tracing::info!(transaction = %self.transaction, %error, "no further delivery was opened");
                checked.not_opened = Some(NotOpened::by(&error));
            }
        }
        Ok(())
    }

    /// [`Run::content_void`], also where nothing but the manifest is kept of what was delivered.
    fn delivered_void(&self, checked: &Checked, kept: Option<Signed<Manifest>>) -> Option<Refusal> {
        if self.store.get(&checked.manifest).is_some() {
            return self.content_void(checked);
        }
        let signed = kept.filter(|signed| signed.digest() == checked.manifest)?;
        let published_at = signed.peek().ok()?.published_at;
        let trust = self.link.known_trust().unwrap_or_else(|| Arc::clone(&checked.trust));
        let good = trust.still_good(&signed.signer(), KeyPurpose::Catalogue, published_at, now_ms());
        good.err().map(|refusal| {
            let detail = format!("the product's manifest is void: {}", refusal.detail);
            Refusal::new(RefusalCode::KeyRetired, detail)
        })
    }

    /// The manager was away when the last download was complete: it hears of that first, or it would take what comes again
    /// for a part of the same. False where there is nothing to say, or nobody hears it.
    async fn reports_late(&self, checked: &Checked, last: Option<Signed<Completion>>) -> Result<bool, FetchError> {
        let delivery = self.delivery_id(checked);
        let Some(last) = last.filter(|last| last.peek().is_ok_and(|said| said.delivery == delivery)) else {
            return Ok(false);
        };
        if !self.report(&last).await {
            return Ok(false);
        }
        let (library, transaction) = (self.home.library(), self.transaction);
        blocking(move || library.update(transaction, |delivery| delivery.reported = true)).await?;
        Ok(true)
    }

    /// Gives the manager the signed word that all of it came. Does it have it?
    pub(super) async fn report(&self, completion: &Signed<Completion>) -> bool {
        match tokio::time::timeout(REPORT_TIMEOUT, complete(self.link, completion)).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => {
                tracing::info!(transaction = %self.transaction, %error, "the manager does not have the completion yet");
                false
            }
            Err(_) => false,
        }
    }

    /// Notes that all of it is here, with the signed word for it.
    pub(super) async fn note_fetched(
        &self,
        checked: &Checked,
        content: &Arc<Content>,
        signed: Option<Signed<Completion>>,
    ) -> Result<Signed<Completion>, FetchError> {
        let mine = Completion {
            network: checked.purchase.network,
            delivery: self.delivery_id(checked),
            manifest: checked.manifest,
            at: now_ms(),
        };
        let known = self.delivery().await?.and_then(|delivery| delivery.completion);
        let known = known.filter(|known| known.peek().is_ok_and(|said| said.delivery == mine.delivery));
        let new = known.is_none();
        let completion = signed.or(known).unwrap_or_else(|| Signed::sign(&mine, self.home.keypair()));
        let (library, transaction) = (self.home.library(), self.transaction);
        let (manifest, length, noted) =
            (content.signed_manifest().clone(), content.manifest().length, completion.clone());
        blocking(move || {
            library.update_step(Step::ClientFetched, transaction, move |delivery| {
                delivery.set_underway(DeliveryState::Fetched);
                delivery.manifest = Some(manifest.clone());
                delivery.completion = Some(noted.clone());
                // What the manager has is the word for an earlier one.
                delivery.reported &= !new;
                (delivery.have_bytes, delivery.total_bytes) = (length, length);
            })
        })
        .await?;
        Ok(completion)
    }

    /// The key that was held back until now.
    pub(super) async fn ask_for_key(
        &self,
        checked: &Checked,
        content: &Content,
        completion: &Signed<Completion>,
    ) -> Result<ContentSecret, FetchError> {
        self.progress.send_modify(|p| p.phase = FetchPhase::AwaitingKey);
        let patience = self.options.manager_patience;
        let mut grant = complete_for_key(self.link, completion, patience, self.progress, self.cancel).await?;
        if grant.is_none() && content.manifest().policy == KeyPolicy::AtRelease {
            // A ticket that lost its key on the way; the mailbox has it.
            let asked = ask_ticket(self.link, self.transaction, checked.purchase.network, self.home.peer_id()).await;
            grant = asked.ok().and_then(|envelope| envelope.grant);
        }
        let grant = grant.ok_or(FetchError::BadKey)?;
        let (library, transaction) = (self.home.library(), self.transaction);
        blocking(move || {
            library.update_step(Step::ClientKey, transaction, move |d| {
                d.grant = Some(grant.clone());
                d.reported = true;
            })
        })
        .await?;
        tracing::info!(transaction = %transaction, "content key received");
        let delivery = self.delivery().await?;
        delivery.and_then(|d| open_grant(self.home.keypair(), &d)).ok_or(FetchError::BadKey)
    }
}
