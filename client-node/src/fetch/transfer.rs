//! The transfer as a client drives it: where it looks for seeders, and what it can mend by itself (a lease that is over,
//! a damaged work folder) before it gives up.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use delivery::{Content, FetchJob, FetchReport, Progress, SourceReport, Stall, StallCause, Stored};
use protocol::api::MailboxRequest;
use protocol::clock::ClockState;
use protocol::deliver::Credential;
use protocol::receipt::DeliveryId;
use protocol::{ChunkSet, Digest, Refusal, RefusalCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::FetchError;
use super::acks::AckFiles;
use super::banned;
use super::debts;
use super::key::{Patience, TOLD_AFTER, renewed};
use super::run::{ROUNDS, Run, millis};
use super::served;
use super::sources::known_sources;
use super::tally::{Late, Tally};
use super::ticket::{self, Checked, NotOpened};
use crate::home::{blocking, now_ms};
use crate::in_place::InPlace;
use crate::inbox::{TicketError, ask_ticket};
use crate::link::{ManagerError, wants_newer_keys};
use crate::plain::PlainError;
use crate::unpack::UnpackError;

/// Complaints of one transfer: a network with more liars than that has other worries.
const MAX_COMPLAINTS: usize = 8;
const COMPLAIN_TIMEOUT: Duration = Duration::from_secs(3);
/// For keys or revocations that seeders know of and this client does not.
const LEARN_TIMEOUT: Duration = Duration::from_secs(3);
/// In whatever words the seeders said it.
const LEASE_VOID: &str = "seeders take this lease no longer";
const KEY_GONE: &str = "the network gave up the key that signed the lease";

impl Run<'_> {
    /// Transfers, renewing the lease or repairing the store where the first try fails for want of it.
    pub(super) async fn transfer(
        &self,
        checked: &mut Checked,
        tally: &mut Tally,
        only: Option<ChunkSet>,
    ) -> Result<FetchReport, FetchError> {
        let (mut round, mut fresh) = (0, false);
        loop {
            round += 1;
            let (delivery, before) = (checked.lease.delivery, checked.clone());
            let error = match self.transfer_once(checked, tally, only.clone(), round < ROUNDS).await? {
                Ok(report) => return Ok(report),
                Err(error) => error,
            };
            match error {
                // Broken off for it.
                delivery::FetchError::Cancelled { .. }
                    if !self.cancel.is_cancelled() && checked.lease.delivery != delivery =>
                {
                    self.owe(&before).await?;
                }
                delivery::FetchError::Cancelled { .. }
                    if !self.cancel.is_cancelled()
                        && let Some(refusal) = self.content_void(checked) =>
                {
                    return Err(FetchError::ContentVoid(refusal));
                }
                transfer @ delivery::FetchError::Cancelled { .. }
                    if !self.cancel.is_cancelled()
                        && round < ROUNDS
                        && let Some(said) = self.taken_back() =>
                {
                    self.with_another_lease(LeaseEnd::Revoked(said), transfer, checked).await?;
                }
                delivery::FetchError::Cancelled { .. } => return Err(FetchError::Cancelled),
                delivery::FetchError::Create(delivery::CreateError::Damaged(damaged)) if round < ROUNDS => {
                    tracing::warn!(%damaged, "work folder repaired");
                    let (store, digest) = (self.store.clone(), checked.manifest);
                    blocking(move || match store.recover(&digest) {
                        Ok(_) => Ok(()),
                        Err(_) => store.remove(&digest).map(drop),
                    })
                    .await?;
                }
                // By the network's signed word.
                delivery::FetchError::Manifest(refusal) if refusal.code == RefusalCode::Revoked => {
                    return Err(FetchError::Revoked(refusal));
                }
                delivery::FetchError::Manifest(refusal) if wants_newer_keys(&refusal) => {
                    // The product may have been signed with a key that is newer than those known here.
                    if !fresh
                        && refusal.code == RefusalCode::UnknownKey
                        && round < ROUNDS
                        && let Ok(trust) = self.link.refresh().await
                    {
                        (checked.trust, fresh) = (trust, true);
                        continue;
                    }
                    return Err(FetchError::ContentVoid(refusal));
                }
                // Seeders were enrolled anew with a key that is newer than those known here.
                transfer if !fresh && round < ROUNDS && transfer.sources().iter().any(|source| source.unknown_key) => {
                    match self.link.refresh().await {
                        Ok(trust) => (checked.trust, fresh) = (trust, true),
                        Err(error) => {
                            tracing::debug!(%error, "key set not refreshed");
                            return Err(FetchError::Transfer(transfer));
                        }
                    }
                }
                transfer if let Some(end) = lease_end(&transfer).filter(|_| round < ROUNDS) => {
                    self.with_another_lease(end, transfer, checked).await?;
                }
                // In this delivery they send nothing more, however long it is waited.
                transfer if is_allowance_spent(&transfer) && round < ROUNDS => {
                    match ticket::replace(self.home, self.link, checked).await {
                        Ok(further) if further.lease.delivery > delivery => *checked = further,
                        Ok(_) => return Err(FetchError::Transfer(transfer)),
                        Err(error) => {
                            tracing::info!(transaction = %self.transaction, %error, "no further delivery was opened");
                            return Err(FetchError::not_opened(NotOpened::by(&error), transfer));
                        }
                    }
                    self.owe(&before).await?;
                }
                transfer => {
                    if let Some(error) = self.unusable(checked) {
                        return Err(UnpackError::Plain(error).into());
                    }
                    if is_held_by_nobody(&transfer)
                        && let Some(refusal) = self.taken_down(checked).await
                    {
                        return Err(FetchError::Revoked(refusal));
                    }
                    if let Some(theirs) = super::clocks_of_seeders(&transfer)
                        && ticket::clock_by_manager(self.link, &checked.trust).await == ClockState::Good
                    {
                        return Err(FetchError::TheirClocks { theirs, transfer });
                    }
                    if let Some(why) = checked.not_opened.take().filter(|_| is_window_used_up(&transfer)) {
                        return Err(FetchError::not_opened(why, transfer));
                    }
                    return Err(FetchError::ended(transfer, checked.not_renewed.clone()));
                }
            }
        }
    }

    /// Goes on with a lease in place of one that no seeder takes any more, or says why there is none.
    async fn with_another_lease(
        &self,
        end: LeaseEnd,
        transfer: delivery::FetchError,
        checked: &mut Checked,
    ) -> Result<(), FetchError> {
        self.tell_of_renewal(&end);
        tokio::select! {
            known = self.learn(&end, checked) => known?,
            () = self.cancel.cancelled() => return Err(FetchError::Cancelled),
        }
        if matches!(end, LeaseEnd::KeyGone(_))
            && let Some(refusal) = self.content_void(checked)
        {
            return Err(FetchError::ContentVoid(refusal));
        }
        let time = self.options.manager_patience;
        let patience = Patience { time, progress: self.progress, cancel: self.cancel };
        match renewed(self.home, self.link, checked, patience).await? {
            Ok(renewed) => {
                *checked = renewed;
                Ok(())
            }
            Err(error) => Err(match end {
                LeaseEnd::Revoked(refusal) | LeaseEnd::KeyGone(refusal) => {
                    ticket::void(refusal, &error, checked.has_moved_on())
                }
                LeaseEnd::Over => FetchError::LeaseOver { transfer, renewal: error.to_string() },
            }),
        }
    }

    /// What the manager said when it was asked for sources, if that is that the purchase was taken back.
    fn taken_back(&self) -> Option<Refusal> {
        self.taken_back.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn is_taken_back(&self) -> bool {
        self.taken_back.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Another delivery takes the place of this one: what seeders are still owed in it is told them beside that.
    async fn owe(&self, before: &Checked) -> Result<(), FetchError> {
        let delivery = self.delivery_id(before);
        let files = AckFiles::of(self.home, delivery);
        let seeders = blocking(move || files.seeders()).await?;
        let known = &before.purchase.envelope.sources;
        let target = |peer| known.iter().find(|source| source.peer == peer).cloned().unwrap_or_else(|| peer.into());
        Ok(debts::note(self.home, before, delivery, None, seeders.into_iter().map(target).collect()).await?)
    }

    /// Why nobody can fetch this content any more, whatever the lease: the newest keys known here say that its manifest is
    /// void. `None` also where the manifest is not here yet: it is judged when it comes.
    pub(super) fn content_void(&self, checked: &Checked) -> Option<Refusal> {
        let trust = self.link.known_trust().unwrap_or_else(|| Arc::clone(&checked.trust));
        self.store.get(&checked.manifest)?.still_good(&trust, now_ms()).err()
    }

    /// Says why another lease is needed, until it is here or the manager is waited for.
    fn tell_of_renewal(&self, end: &LeaseEnd) {
        let cause = match end {
            LeaseEnd::Over => StallCause::TicketExpires,
            LeaseEnd::Revoked(refusal) | LeaseEnd::KeyGone(refusal) => StallCause::AllRefused { code: refusal.code },
        };
        let next_try = Some(now_ms().saturating_add(millis(LEARN_TIMEOUT + TOLD_AFTER)));
        self.progress.send_modify(|p| p.transfer.stalled = Some(Stall { cause, next_try }));
    }

    /// Learns what seeders knew and this client did not. Whether the purchase itself was taken back, the manager's signed
    /// revocations say, which any seeder passes on; otherwise it is the lease alone that is void.
    async fn learn(&self, end: &LeaseEnd, checked: &mut Checked) -> Result<(), FetchError> {
        let mut revoked = None;
        let learning = async {
            match end {
                LeaseEnd::Over => {}
                LeaseEnd::KeyGone(_) => {
                    if let Err(error) = self.link.refresh().await {
                        tracing::debug!(%error, "key set not refreshed");
                    }
                }
                LeaseEnd::Revoked(_) => {
                    let known = revoked.insert(checked.revoked.as_ref().clone());
                    if let Err(error) = self.link.refresh_revocations(&checked.trust, known).await {
                        tracing::debug!(%error, "revocations not refreshed");
                    }
                }
            }
        };
        // What takes longer is not waited for: the manager is asked all the same.
        let _ = tokio::time::timeout(LEARN_TIMEOUT, learning).await;
        if let Some(revoked) = revoked {
            checked.revoked = Arc::new(revoked);
        }
        match end {
            LeaseEnd::Revoked(refusal) if checked.revoked.has_transaction(&self.transaction) => {
                Err(FetchError::Revoked(self.managers_words(checked).await.unwrap_or_else(|| refusal.clone())))
            }
            _ => Ok(()),
        }
    }

    /// The manager knows why a purchase was taken back, and says so where it can be asked.
    async fn managers_words(&self, checked: &Checked) -> Option<Refusal> {
        let asked = ask_ticket(self.link, self.transaction, checked.purchase.network, self.home.peer_id());
        match tokio::time::timeout(LEARN_TIMEOUT, asked).await {
            Ok(Err(TicketError::Manager(ManagerError::Refused(said)))) if said.code == RefusalCode::Revoked => {
                Some(said)
            }
            _ => None,
        }
    }

    /// Seeders remove what was taken down, and then only say that they do not hold it. The manager says why, or its signed
    /// revocations do, which any seeder passes on.
    async fn taken_down(&self, checked: &mut Checked) -> Option<Refusal> {
        let mut known = checked.revoked.as_ref().clone();
        let asked = async {
            let Checked { trust, purchase, .. } = &*checked;
            let ticket = ask_ticket(self.link, self.transaction, purchase.network, self.home.peer_id());
            tokio::join!(
                tokio::time::timeout(LEARN_TIMEOUT, self.link.refresh_revocations(trust, &mut known)),
                tokio::time::timeout(LEARN_TIMEOUT, ticket),
            )
        };
        let (_, ticket) = tokio::select! {
            answers = asked => answers,
            () = self.cancel.cancelled() => return None,
        };
        if let Ok(Err(TicketError::Manager(ManagerError::Refused(said)))) = ticket
            && said.code == RefusalCode::Revoked
        {
            return Some(said);
        }
        // Also where not all was to be had: what was taken counts.
        checked.revoked = Arc::new(known);
        let content = self.store.get(&checked.manifest)?.manifest().content;
        let taken_down = || Refusal::new(RefusalCode::Revoked, "this content was taken down");
        checked.revoked.has_content(&content).then(taken_down)
    }

    /// What is wrong with the product itself, if that is why a chunk was not written.
    fn unusable(&self, checked: &Checked) -> Option<PlainError> {
        self.store.get(&checked.manifest)?.body::<InPlace>()?.trouble()
    }

    async fn transfer_once(
        &self,
        checked: &mut Checked,
        tally: &mut Tally,
        only: Option<ChunkSet>,
        may_replace: bool,
    ) -> Result<Result<FetchReport, delivery::FetchError>, FetchError> {
        let started = Instant::now();
        // Two streams of one delivery to one seeder would be one too many for it.
        self.settled().await;
        let (sender, mut transfer) = watch::channel(Progress::default());
        let (cancel, over) = (self.cancel.child_token(), CancellationToken::new());
        let (partial, manifest) = (only.is_some(), checked.manifest);
        let (credential, newest) = watch::channel(checked.credential());
        let mut job = self.job(checked, only, sender, cancel.clone(), newest);
        let delivery = job.delivery;
        // Where they are not listed, they were found before and served it then.
        job.sources.extend(debts::owed(self.home, delivery).await?);
        let (home, transaction) = (self.home.clone(), self.transaction);
        // A further delivery that nobody is paid for is the origin's, and every other seeder refuses it.
        if checked.lease.rate > 0 || checked.lease.delivery <= 1 {
            job.sources.extend(served::load(&home, transaction).await?);
        }
        job.banned = blocking(move || banned::load(&home, &transaction)).await?;
        let watcher = async {
            let (mut space, mut place, mut goes_on) = (None, None, true);
            while goes_on {
                goes_on = tokio::select! {
                    changed = transfer.changed() => changed.is_ok(),
                    () = over.cancelled() => false,
                };
                let now = transfer.borrow_and_update().clone();
                // A transfer that moves goes on: what seeders still send was paid for when they began.
                let stands_still = || now.stalled.is_some() && self.is_taken_back();
                if goes_on && may_replace && stands_still() {
                    cancel.cancel();
                }
                if place.is_none()
                    && let Some(name) = self.name_of(&manifest)
                {
                    let free = self.check_place(&name).await;
                    if free.is_err() {
                        cancel.cancel();
                    }
                    place = Some(free);
                }
                if space.is_none() && now.total_bytes > 0 {
                    // The space of files was looked for just before, and that of a part before this transfer. Ciphertext may lack
                    // some of its own, and the files come on top of it.
                    space = Some(match self.store.get(&manifest) {
                        Some(content) if !partial && content.body::<InPlace>().is_none() => {
                            self.check_space(&content, now.total_bytes)
                        }
                        _ => Ok(()),
                    });
                    if let Some(Err(_)) = &space {
                        cancel.cancel();
                    }
                }
                self.progress.send_modify(|p| {
                    p.first_chunk_at = p.first_chunk_at.or(now.first_chunk_at);
                    p.transfer = now;
                });
            }
            space.unwrap_or(Ok(())).and(place.unwrap_or(Ok(())))
        };
        let mut renewed = checked.clone();
        let fetching = async {
            let result = Box::pin(delivery::fetch_stored(job)).await;
            over.cancel();
            result
        };
        let transferred = async { tokio::join!(fetching, watcher) };
        let (result, room) = tokio::select! {
            done = transferred => done,
            never = Box::pin(self.keep_lease(&mut renewed, &credential, &cancel, may_replace)) => match never {},
        };
        self.tell_not_opened(None);
        // All of it came just before it was to go on in a further delivery: it was this one.
        if result.is_err() || renewed.lease.delivery == delivery.delivery {
            *checked = renewed;
        }
        if let Err(no_room) = room {
            self.drop_empty(checked).await?;
            return Err(no_room);
        }
        let result = match result {
            Ok(stored) => Ok(self.settle(checked, delivery, stored).await?),
            Err(error) => Err(error),
        };
        let sources = match &result {
            Ok(report) => {
                tally.add(report);
                report.sources.as_slice()
            }
            Err(error) => {
                tally.add_failed(&transfer.borrow(), started.elapsed(), error.sources().to_vec());
                error.sources()
            }
        };
        let (home, liars) = (self.home.clone(), sources.to_vec());
        blocking(move || banned::note(&home, &transaction, &liars)).await?;
        let served = transfer.borrow().sources.clone();
        served::note(self.home, self.link, checked, &served).await?;
        self.complain(sources).await;
        Ok(result)
    }

    /// Gives the seeders what they are owed, beside what is to be done with the goods. It is noted as a debt before, for
    /// the case that this process ends before they have it.
    async fn settle(&self, checked: &Checked, delivery: DeliveryId, stored: Stored) -> Result<FetchReport, FetchError> {
        let report = stored.report().clone();
        debts::note(self.home, checked, delivery, report.completion.clone(), report.owed.clone()).await?;
        let (home, checked) = (self.home.clone(), checked.clone());
        let before = report.clone();
        self.settling.lock().await.spawn(async move {
            let after = stored.settle().await;
            let late = Late::between(&before, &after);
            let FetchReport { completion, owed, .. } = after;
            if let Err(error) = debts::note(&home, &checked, delivery, completion, owed).await {
                tracing::warn!(%error, "seeders that were given what they are owed are given it again");
            }
            late
        });
        Ok(report)
    }

    /// Waits until the seeders of the transfers before have what they are owed, or are known to be away; or for the end.
    pub(super) async fn settled(&self) {
        let mut settling = self.settling.lock().await;
        loop {
            let settled = tokio::select! {
                settled = settling.join_next() => settled,
                () = self.cancel.cancelled() => return,
            };
            match settled {
                Some(Ok(late)) => self.late.lock().unwrap_or_else(PoisonError::into_inner).add(late),
                Some(Err(error)) => tracing::error!(%error, "seeders were not told everything"),
                None => return,
            }
        }
    }

    /// What the product is called, once that is known.
    fn name_of(&self, manifest: &Digest) -> Option<String> {
        self.store.get(manifest)?.body::<InPlace>()?.name()
    }

    /// Tells the manager which seeders sent something else, and as which chunk: it cannot know that they did, but it can
    /// look for itself. The fetch does not depend on it.
    async fn complain(&self, sources: &[SourceReport]) {
        let complaints = sources.iter().filter_map(|source| Some((source.peer, source.bad_chunk?)));
        let tell = async {
            for (seeder, chunk) in complaints.take(MAX_COMPLAINTS) {
                let complaint = MailboxRequest::Complain { transaction: self.transaction, seeder, chunk };
                match self.link.mailbox(&complaint).await {
                    Ok(_) => tracing::info!(%seeder, chunk, "bad chunk: complained of to the manager"),
                    Err(error) => tracing::info!(%seeder, chunk, %error, "bad chunk: the manager does not know of it"),
                }
            }
        };
        let _ = tokio::time::timeout(COMPLAIN_TIMEOUT, tell).await;
    }

    /// Is there room for files of so many bytes, beside the ciphertext that they are made of?
    fn check_space(&self, content: &Content, files: u64) -> Result<(), FetchError> {
        let needed = files.saturating_add(content.unreserved()?);
        self.check_room(needed)
    }

    pub(super) fn check_room(&self, needed: u64) -> Result<(), FetchError> {
        let free = delivery::free_space(&self.out)?;
        if free < needed {
            return Err(FetchError::NoSpace { path: self.out.clone(), needed, free });
        }
        Ok(())
    }

    /// Space that was reserved and not used is given back.
    async fn drop_empty(&self, checked: &Checked) -> Result<(), FetchError> {
        let (store, digest) = (self.store.clone(), checked.manifest);
        blocking(move || {
            if store.get(&digest).is_some_and(|content| content.have_bytes() == 0) {
                store.remove(&digest)?;
            }
            Ok::<_, FetchError>(())
        })
        .await
    }

    pub(super) fn delivery_id(&self, checked: &Checked) -> DeliveryId {
        DeliveryId { transaction: self.transaction, delivery: checked.lease.delivery }
    }

    fn job(
        &self,
        checked: &Checked,
        only: Option<ChunkSet>,
        progress: watch::Sender<Progress>,
        cancel: CancellationToken,
        credential: watch::Receiver<Credential>,
    ) -> FetchJob {
        let delivery = self.delivery_id(checked);
        FetchJob {
            connect: Arc::new(self.link.node().clone()),
            store: self.store.clone(),
            manifest: checked.manifest,
            only,
            credential,
            delivery,
            keypair: self.home.keypair().clone(),
            sources: known_sources(&self.options.sources, &checked.lease.sources, &checked.purchase.envelope.sources),
            banned: Vec::new(),
            more_sources: Some(self.more_sources(checked)),
            trust: Arc::clone(&checked.trust),
            revoked: Arc::clone(&checked.revoked),
            acks: Arc::new(AckFiles::of(self.home, delivery)),
            progress,
            adopted: Arc::clone(&self.adopted),
            limits: self.options.limits.clone(),
            cancel,
        }
    }
}

fn is_held_by_nobody(error: &delivery::FetchError) -> bool {
    let delivery::FetchError::NoSource { sources, .. } = error else { return false };
    let not_held = |source: &SourceReport| {
        source.last_refusal.as_ref().is_some_and(|refusal| refusal.code == RefusalCode::ContentNotHeld)
    };
    sources.iter().any(not_held)
}

/// Why a transfer ended that may go on with another lease.
#[derive(Debug, PartialEq, Eq)]
enum LeaseEnd {
    /// It is over.
    Over,
    /// The purchase was revoked, or this lease alone: then the purchase is this client's all the same.
    Revoked(Refusal),
    /// The network gave up the key that signed it.
    KeyGone(Refusal),
}

/// Those who served it send no more in this delivery, whatever is acknowledged, and nobody else does.
fn is_allowance_spent(transfer: &delivery::FetchError) -> bool {
    let delivery::FetchError::NoSource { sources, .. } = transfer else { return false };
    let mut said = sources.iter().filter_map(|source| source.last_refusal.as_ref());
    said.any(|refusal| refusal.code == RefusalCode::AllowanceSpent)
}

/// They wait for acknowledgements of what this client had acknowledged before and lost, or never got; or were greeted again
/// for that and have not said so yet.
fn is_window_used_up(transfer: &delivery::FetchError) -> bool {
    let delivery::FetchError::NoSource { cause, .. } = transfer else { return false };
    matches!(cause, StallCause::WindowUsedUp | StallCause::Silent)
}

fn lease_end(error: &delivery::FetchError) -> Option<LeaseEnd> {
    let refused = |code| match code {
        RefusalCode::Revoked => Some(LeaseEnd::Revoked(Refusal::new(code, LEASE_VOID))),
        RefusalCode::KeyRetired => Some(LeaseEnd::KeyGone(Refusal::new(code, KEY_GONE))),
        _ => None,
    };
    match error {
        // Another lease is no help to a clock that is off.
        delivery::FetchError::Refused { refusal, .. } if refusal.code == RefusalCode::Expired => {
            (!super::clock(refusal).is_off()).then_some(LeaseEnd::Over)
        }
        delivery::FetchError::Refused { refusal, .. } => refused(refusal.code),
        delivery::FetchError::NoSource { cause: StallCause::TicketExpires, .. } => Some(LeaseEnd::Over),
        // Whatever the others had against it, this is what can be helped.
        delivery::FetchError::NoSource { sources, .. } => {
            let codes = sources.iter().filter_map(|source| Some(source.last_refusal.as_ref()?.code));
            codes.filter_map(refused).next()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use protocol::PeerId;

    use super::*;

    #[test]
    fn one_that_names_the_lease_as_void_is_heard_among_those_that_would_not_serve_it_anyway() {
        let refused = |n: u8, code| SourceReport {
            last_refusal: Some(Refusal::new(code, "")),
            ..SourceReport::of(PeerId::from_bytes([n; 32]), 0, 0)
        };
        let ended = |last| {
            let dear = RefusalCode::PriceBelowFloor;
            let sources = vec![refused(1, dear), refused(2, dear), refused(3, last)];
            let cause = StallCause::AllRefused { code: dear };
            lease_end(&delivery::FetchError::NoSource { cause, waited: Duration::ZERO, sources })
        };
        assert!(matches!(ended(RefusalCode::KeyRetired), Some(LeaseEnd::KeyGone(_))));
        assert!(matches!(ended(RefusalCode::Revoked), Some(LeaseEnd::Revoked(_))));
        assert_eq!(ended(RefusalCode::PriceBelowFloor), None);
    }
}
