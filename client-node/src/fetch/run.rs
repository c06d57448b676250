//! The order in which a fetch does its work, and what it does when a part of it fails.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use delivery::{Content, ContentStore, Pace, Rate};
use node::{DirLock, DirLockError, Supervisor};
use protocol::receipt::Completion;
use protocol::ticket::TicketEnvelope;
use protocol::{ChunkSet, Digest, Refusal, Signed, TransactionId};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::debts;
use super::delivered::{Delivered, Standing, Wanted, check_names, clear_away, standing};
use super::key::{Patience, meet, open_grant};
use super::refused::discard;
use super::tally::{Late, Tally};
use super::ticket::{self, Checked};
use super::{FetchError, FetchOptions, FetchOutcome, FetchPhase, FetchProgress, Purchase, Target};
use crate::home::{At, FileError, Home, blocking, make_private_dir, now_ms, sweep};
use crate::in_place::{InPlace, InPlaceBodies};
use crate::layout::{Layout, Unpacked};
use crate::library::{Delivery, DeliveryState, Trouble, is_same_sale};
use crate::link::Link;
use crate::place::{make_work_dir, work_dir};
use crate::plain::{Plain, PlainError, Stored, payload};
use crate::running::{self, Limits};
use crate::shop::printable;
use crate::unpack::UnpackError;

/// Rounds of transfer and unpacking: one, one more after a renewal, one more after damage on this disk.
pub(super) const ROUNDS: u32 = 4;

/// For answers under way to commands that asked how far it is.
const ASKED_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) type Reporter = watch::Sender<FetchProgress>;

pub(super) async fn run(
    home: &Home,
    target: Target,
    out: &Path,
    options: FetchOptions,
    progress: Reporter,
    cancel: CancellationToken,
) -> Result<FetchOutcome, FetchError> {
    let (started, began) = (Instant::now(), now_ms());
    let found = tokio::select! {
        found = ticket::find(home, target, &options) => found?,
        () = cancel.cancelled() => return Err(FetchError::Cancelled),
    };
    let (transaction, tried) = (found.transaction, found.envelope.clone());
    let title = printable(&tried.title, 200);
    progress.send_modify(|p| (p.transaction, p.title) = (Some(transaction), title.clone()));
    let result = fetch_purchase(home, found, out, options, &progress, &cancel).await;
    match result {
        Ok(mut outcome) => {
            outcome.total_ms = millis(started.elapsed());
            outcome.first_chunk_ms = progress.borrow().first_chunk_at.map(|at| at.saturating_sub(began));
            progress.send_modify(|p| p.phase = FetchPhase::Done);
            Ok(outcome)
        }
        Err(error) => {
            tracing::info!(%transaction, cause = error.cause(), %error, "fetch ended early");
            for source in error.sources() {
                tracing::info!(seeder = %source.peer, reason = source.last_reason, bytes = source.bytes, "seeder at the end");
            }
            note_trouble(home, transaction, tried, &error).await;
            Err(error)
        }
    }
}

/// Keeps why a purchase did not get further. What is wrong with the command alone, or with a ticket that is not the one in
/// the library, is nothing of the purchase.
async fn note_trouble(home: &Home, transaction: TransactionId, tried: TicketEnvelope, error: &FetchError) {
    if matches!(error, FetchError::Running { .. } | FetchError::OnlyWithoutKey | FetchError::TooManyNames) {
        return;
    }
    let bad_ticket = matches!(error, FetchError::BadTicket(_));
    let is_its_own = move |delivery: &Delivery| {
        let another = delivery.envelope.ticket != tried.ticket;
        is_same_sale(&delivery.envelope, &tried) && !(bad_ticket && delivery.checked && another)
    };
    let trouble = Trouble { cause: error.cause().to_owned(), detail: printable(&error.to_string(), 500), at: now_ms() };
    let library = home.library();
    let ended = error.is_final();
    let note = move |delivery: &mut Delivery| match ended {
        _ if !is_its_own(delivery) => {}
        true => delivery.refuse(trouble.clone()),
        false => delivery.trouble = Some(trouble.clone()),
    };
    let noted = blocking(move || library.update(transaction, note)).await;
    if let Err(error) = noted {
        tracing::warn!(%transaction, %error, "the library does not know why the fetch ended");
    }
}

async fn fetch_purchase(
    home: &Home,
    purchase: Purchase,
    out: &Path,
    mut options: FetchOptions,
    progress: &Reporter,
    cancel: &CancellationToken,
) -> Result<FetchOutcome, FetchError> {
    let (folder, transaction) = (home.delivery_dir(&purchase.transaction), purchase.transaction);
    let wanted = out.to_owned();
    let (out, _lock) = blocking(move || {
        std::fs::create_dir_all(&wanted).at("make the folder", &wanted)?;
        let out = std::fs::canonicalize(&wanted).at("find the folder", &wanted)?;
        make_private_dir(&folder)?;
        match DirLock::acquire_looked_at(&folder) {
            Ok(lock) => {
                sweep(&folder);
                Ok((out, lock))
            }
            Err(DirLockError::Held { pid, .. }) => Err(FetchError::Running { pid }),
            Err(DirLockError::Io { source, .. }) => Err(FileError { doing: "lock", path: folder, source }.into()),
        }
    })
    .await?;
    // From here on other commands may ask how far it is.
    let own = options.limits.bytes_per_second.take().unwrap_or(0);
    let limits = Limits { process: Arc::clone(&options.process_pace), transfer: Arc::new(Pace::new(Rate::new(own))) };
    let pacing = options.limits.pacing.clone();
    options.limits.pacing = pacing.and(Arc::clone(&limits.process)).and(Arc::clone(&limits.transfer));
    let asked = Supervisor::new();
    // Also where this future is dropped before its end.
    let _stop = asked.token().drop_guard();
    running::answer(&asked, home, transaction, progress.subscribe(), limits).await?;
    let result = fetch_asked(home, purchase, out, options, progress, cancel).await;
    if let Err(error) = asked.shutdown(ASKED_TIMEOUT).await {
        tracing::warn!(%error, "who asked how far it is has no answer yet");
    }
    result
}

async fn fetch_asked(
    home: &Home,
    purchase: Purchase,
    out: PathBuf,
    options: FetchOptions,
    progress: &Reporter,
    cancel: &CancellationToken,
) -> Result<FetchOutcome, FetchError> {
    let transaction = purchase.transaction;
    check_names(home, transaction, &options.only).await?;
    let wanted = match standing(home, transaction, &out, &options, progress, cancel).await? {
        Standing::Here(outcome) => {
            clear_away(home, transaction, &out, &options).await?;
            debts::pay_alone(home, &purchase, &options, cancel).await;
            return Ok(*outcome);
        }
        Standing::Wanting(wanted) => wanted,
    };
    let mut link = options.link.clone();
    link.seeders.extend(options.sources.iter().chain(&purchase.envelope.sources).cloned());
    // They may be the only ones there today who lead to others, and know what was revoked.
    link.seeders.extend(super::served::load(home, transaction).await?);
    let link = Link::start(home, &purchase.envelope.join, link).await?;
    let result = fetch_linked(home, &link, purchase, (out.clone(), wanted), options, progress, cancel).await;
    link.stop().await;
    if result.as_ref().is_err_and(FetchError::is_final) {
        discard(home, transaction, Some(out)).await;
    }
    result
}

async fn fetch_linked(
    home: &Home,
    link: &Link,
    purchase: Purchase,
    (out, wanted): (PathBuf, Wanted),
    options: FetchOptions,
    progress: &Reporter,
    cancel: &CancellationToken,
) -> Result<FetchOutcome, FetchError> {
    let transaction = purchase.transaction;
    meet(link, options.manager_patience, progress, cancel).await?;
    let patience = Patience { time: options.manager_patience, progress, cancel };
    let checked = tokio::select! {
        checked = ticket::check(home, link, purchase, patience) => checked?,
        () = cancel.cancelled() => return Err(FetchError::Cancelled),
    };
    keep_fresh(link, &checked, progress);
    tracing::info!(step = 9, %transaction, sources = checked.lease.sources.len(), "presenting the ticket to seeders");
    let work = work_dir(&out, transaction);
    let (store, delivered) = {
        let (home, out, work, whole) = (home.clone(), out.clone(), work.clone(), wanted.is_everything());
        let manifest = checked.manifest;
        blocking(move || {
            let secret = home.library().get(&transaction)?.and_then(|delivery| open_grant(home.keypair(), &delivery));
            // Before the purchase is noted as being fetched: it has no part in this.
            if secret.is_none() && !whole {
                return Err(FetchError::OnlyWithoutKey);
            }
            make_work_dir(&work)?;
            let delivered = Delivered::find(&home, transaction, &manifest, &out, secret.clone())?;
            let store = match secret {
                Some(secret) => ContentStore::open_with(&work, Arc::new(InPlaceBodies::new(secret, whole))),
                None => ContentStore::open(&work),
            };
            Ok::<_, FetchError>((store?, delivered.map(Arc::new)))
        })
        .await?
    };
    let before = store.get(&checked.manifest);
    // Ciphertext proves itself when it is decrypted; files do not.
    let earlier = before.as_ref().map(|content| content.have()).unwrap_or_default();
    let unproven = before.filter(|content| content.body::<InPlace>().is_some()).map(|content| content.have());
    let earlier = Mutex::new(Earlier { sound: earlier, unproven: unproven.unwrap_or_default() });
    let settling = tokio::sync::Mutex::new(JoinSet::new());
    let options = &options;
    let run = Run {
        home,
        link,
        options,
        progress,
        cancel,
        store,
        work,
        out,
        transaction,
        wanted,
        delivered,
        earlier,
        adopted: Arc::default(),
        taken_back: Arc::default(),
        settling,
        late: Mutex::default(),
    };
    let (library, out) = (home.library(), run.out.clone());
    blocking(move || {
        library.update(transaction, move |delivery| {
            delivery.set_out(&out);
            delivery.trouble = None;
            if delivery.state != DeliveryState::Fetched {
                delivery.set_underway(DeliveryState::Fetching);
                delivery.started_at = now_ms();
            }
        })
    })
    .await?;
    let over = CancellationToken::new();
    let paying = async {
        tokio::select! {
            () = debts::beside(Box::pin(debts::pay(home, link, transaction, false)), over.cancelled()) => {}
            () = cancel.cancelled() => {}
        }
    };
    let working = async {
        let mut result = Box::pin(run.to_the_end(checked)).await;
        if result.is_ok() {
            // The goods are of use from here on, whatever the seeders still have to be told.
            progress.send_modify(|p| (p.phase, p.waiting) = (FetchPhase::Done, None));
        }
        run.settled().await;
        over.cancel();
        if let Ok(outcome) = &mut result {
            run.late.lock().unwrap_or_else(PoisonError::into_inner).tell_in(outcome);
        }
        result
    };
    let (result, ()) = tokio::join!(working, paying);
    let have = run.store.list().first().map(|content| (content.have_bytes(), content.manifest().length));
    if let (Err(_), Some((have, total))) = (&result, have) {
        let library = home.library();
        let note = move |delivery: &mut Delivery| {
            if delivery.state != DeliveryState::Done {
                (delivery.have_bytes, delivery.total_bytes) = (have, total);
            }
        };
        blocking(move || library.update(transaction, note)).await?;
    }
    if result.is_err() && run.store.list().is_empty() {
        let work = run.work.clone();
        // Nothing came, so nothing is kept; where anything is in it after all, it stays.
        let _ = blocking(move || std::fs::remove_dir(work)).await;
    }
    result
}

/// Beside the fetch: newer keys and revocations for the next time.
fn keep_fresh(link: &Link, checked: &Checked, progress: &Reporter) {
    let (link_, checked, progress) = (link.clone(), checked.clone(), progress.clone());
    let token = link.supervisor().token();
    link.supervisor().spawn("refresh", async move {
        let refresh = async {
            let trust = match link_.refresh().await {
                Ok(trust) => trust,
                Err(error) => return tracing::debug!(%error, "key set not refreshed"),
            };
            match link_.sign_of_life(&trust).await {
                Ok(heartbeat) => {
                    progress.send_modify(|p| p.manager_seen_at = Some(heartbeat.at));
                    if heartbeat.key_set_version > trust.key_set().version {
                        tracing::warn!(
                            version = heartbeat.key_set_version,
                            "there is a newer key set that nobody gave"
                        );
                    }
                }
                Err(error) => tracing::debug!(%error, "no sign of life of the manager"),
            }
            let mut state = checked.revoked.as_ref().clone();
            if let Err(error) = link_.refresh_revocations(&checked.trust, &mut state).await {
                tracing::debug!(%error, "revocations not refreshed");
            }
        };
        tokio::select! {
            () = Box::pin(refresh) => {}
            () = token.cancelled() => {}
        }
    });
}

/// What the steps of one run share.
pub(super) struct Run<'a> {
    pub(super) home: &'a Home,
    pub(super) link: &'a Link,
    pub(super) options: &'a FetchOptions,
    pub(super) progress: &'a Reporter,
    pub(super) cancel: &'a CancellationToken,
    pub(super) store: ContentStore,
    pub(super) work: PathBuf,
    pub(super) out: PathBuf,
    pub(super) transaction: TransactionId,
    /// Which part of it this run is to bring.
    pub(super) wanted: Wanted,
    /// What lies in its place from earlier runs.
    pub(super) delivered: Option<Arc<Delivered>>,
    earlier: Mutex<Earlier>,
    /// Bytes that an earlier run left without a note of them.
    pub(super) adopted: Arc<AtomicU64>,
    /// The manager's word, while a transfer looked for sources, that the purchase was taken back.
    pub(super) taken_back: Arc<Mutex<Option<Refusal>>>,
    /// Seeders of transfers that are over are being told so.
    pub(super) settling: tokio::sync::Mutex<JoinSet<Late>>,
    /// What these brought.
    pub(super) late: Mutex<Late>,
}

/// Chunks that earlier runs left.
#[derive(Default)]
pub(super) struct Earlier {
    /// All but those that turned out damaged.
    pub(super) sound: ChunkSet,
    /// Those that were put into their files and not read since.
    unproven: ChunkSet,
}

fn is_lost(error: &PlainError) -> bool {
    match error {
        PlainError::Damaged(_) => true,
        PlainError::Disk(error) => error.is_damage(),
        _ => false,
    }
}

impl Run<'_> {
    async fn to_the_end(&self, mut checked: Checked) -> Result<FetchOutcome, FetchError> {
        let mut tally = Tally::default();
        let mut round = 0;
        loop {
            round += 1;
            let attempt = match self.wanted.is_everything() {
                true => self.everything(&mut checked, &mut tally).await,
                false => self.some_files(&mut checked, &mut tally).await,
            };
            let (content, unpacked, reported) = match attempt {
                Ok(done) => done,
                // The disk lost something between verification and decryption, or a run that ended while it put its files in
                // place moved it out of the work folder: what is not there is found and fetched again.
                Err(FetchError::Unpack(UnpackError::Plain(error))) if round < ROUNDS && is_lost(&error) => {
                    tracing::warn!(%error, "damaged on this disk, fetching it again");
                    self.forget_damaged(&checked).await?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            return self.put_in_place(content, unpacked, reported, tally).await;
        }
    }

    async fn forget_damaged(&self, checked: &Checked) -> Result<(), FetchError> {
        let (Some(content), stop) = (self.store.get(&checked.manifest), self.cancel.clone()) else { return Ok(()) };
        let found = blocking(move || content.verify_all(&mut |_| until(&stop))).await?;
        self.lost(&found.damaged);
        if !found.whole {
            return Err(FetchError::Cancelled);
        }
        self.note_fetching().await
    }

    async fn everything(
        &self,
        checked: &mut Checked,
        tally: &mut Tally,
    ) -> Result<(Arc<Content>, Unpacked, bool), FetchError> {
        let (content, signed) = self.receive(checked, tally).await?;
        let completion = self.note_fetched(checked, &content, signed).await?;
        tracing::info!(step = 11, transaction = %self.transaction, bytes = content.manifest().length, "product received");
        let delivery = self.delivery().await?;
        let (unpacked, reported) = match delivery.as_ref().and_then(|d| open_grant(self.home.keypair(), d)) {
            Some(secret) => {
                let (unpacked, reported) = tokio::join!(self.unpack(&content, &secret), self.report(&completion));
                (unpacked?, reported)
            }
            None => {
                let secret = self.ask_for_key(checked, &content, &completion).await?;
                (self.unpack(&content, &secret).await?, true)
            }
        };
        Ok((content, unpacked, reported))
    }

    /// Everything, with what an earlier run left read again beside the transfer: what is damaged comes again.
    async fn receive(
        &self,
        checked: &mut Checked,
        tally: &mut Tally,
    ) -> Result<(Arc<Content>, Option<Signed<Completion>>), FetchError> {
        let (mut signed, manifest) = (None, checked.manifest);
        for round in 0..ROUNDS {
            self.take_over().await?;
            let here = self.store.get(&manifest).filter(|content| content.is_complete());
            if here.is_none() && round == 0 {
                self.ask_for_further_delivery(checked).await?;
            }
            let (unproven, stop) = (std::mem::take(&mut self.earlier().unproven), self.cancel.child_token());
            let transfer = async {
                if here.is_some() {
                    return Ok(None);
                }
                self.progress.send_modify(|p| p.phase = FetchPhase::Fetching);
                let result = self.transfer(checked, tally, None).await;
                if result.is_err() {
                    stop.cancel();
                }
                result.map(Some)
            };
            let (report, sound) = tokio::join!(Box::pin(transfer), self.prove(&manifest, unproven, stop.clone()));
            if let Some(report) = report? {
                signed = report.completion;
            }
            let (sound, content) = (sound?, self.content(checked)?);
            // What turned out damaged only when it was to be noted as whole is not here any more either.
            if sound && content.is_complete() {
                return Ok((content, signed));
            }
            tracing::warn!(%manifest, "damaged on this disk, fetching it again");
        }
        Err(FetchError::Transfer(delivery::FetchError::Removed))
    }

    /// Reads these chunks again; those that are damaged are not held any more. Is everything sound?
    async fn prove(&self, manifest: &Digest, chunks: ChunkSet, stop: CancellationToken) -> Result<bool, FetchError> {
        let Some(content) = self.store.get(manifest).filter(|_| !chunks.is_empty()) else { return Ok(true) };
        let found = blocking(move || content.verify(&chunks, &mut |_| until(&stop))).await?;
        self.lost(&found.damaged);
        if !found.whole {
            return Err(FetchError::Cancelled);
        }
        if !found.damaged.is_empty() {
            self.note_fetching().await?;
        }
        Ok(found.damaged.is_empty())
    }

    /// What was here in full is not any more.
    async fn note_fetching(&self) -> Result<(), FetchError> {
        let (library, transaction) = (self.home.library(), self.transaction);
        Ok(blocking(move || library.update(transaction, |d| d.set_underway(DeliveryState::Fetching))).await?)
    }

    // A thread that panicked while it held this lock was between two plain assignments.
    pub(super) fn earlier(&self) -> MutexGuard<'_, Earlier> {
        self.earlier.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// These are not here after all.
    fn lost(&self, damaged: &ChunkSet) {
        let mut earlier = self.earlier();
        earlier.sound = earlier.sound.difference(damaged);
    }

    /// Bytes that earlier runs left, without what turned out damaged.
    pub(super) fn resumed(&self, content: &Content) -> u64 {
        content.bytes_of(&self.earlier().sound)
    }

    pub(super) async fn delivery(&self) -> Result<Option<Delivery>, FetchError> {
        let (library, transaction) = (self.home.library(), self.transaction);
        Ok(blocking(move || library.get(&transaction)).await?)
    }

    fn content(&self, checked: &Checked) -> Result<Arc<Content>, FetchError> {
        self.store.get(&checked.manifest).ok_or(FetchError::Transfer(delivery::FetchError::Removed))
    }

    /// The head of the pack first, then the chunks that the chosen files lie in.
    async fn some_files(
        &self,
        checked: &mut Checked,
        tally: &mut Tally,
    ) -> Result<(Arc<Content>, Unpacked, bool), FetchError> {
        let delivery = self.delivery().await?;
        let secret = delivery.and_then(|d| open_grant(self.home.keypair(), &d)).ok_or(FetchError::OnlyWithoutKey)?;
        self.progress.send_modify(|p| p.phase = FetchPhase::Fetching);
        self.take_over().await?;
        if !self.has_all_wanted(checked)? {
            self.ask_for_further_delivery(checked).await?;
        }
        let first = self.need(checked, tally, ChunkSet::from_range(0..1)).await?;
        let reader = |content: &Arc<Content>| Plain::new(Stored(Arc::clone(content)), content.manifest(), &secret);
        let mut plain = reader(&first).map_err(FetchError::Plain)?;
        let head = blocking(move || plain.head_length()).await.map_err(FetchError::Plain)?;
        let payload = payload(first.manifest());
        let head = ChunkSet::from_range(0..u32::try_from(head.div_ceil(payload)).unwrap_or(u32::MAX));
        let content = self.need(checked, tally, head).await?;
        let mut plain = reader(&content).map_err(FetchError::Plain)?;
        let listed = blocking(move || plain.list()).await.map_err(FetchError::Plain)?;
        self.check_place(&listed.list.name).await?;
        let selection = self.wanted.selection(&listed.list)?;
        let layout = Layout::new(self.work.clone(), listed, selection, payload);
        let wanted = layout.chunks();
        self.check_room(content.bytes_of(&wanted.difference(&content.have())).saturating_add(layout.bytes()))?;
        let content = self.need(checked, tally, wanted).await?;
        let (library, transaction) = (self.home.library(), self.transaction);
        let (manifest, have, length) =
            (content.signed_manifest().clone(), content.have_bytes(), content.manifest().length);
        blocking(move || {
            library.update(transaction, move |delivery| {
                delivery.manifest = Some(manifest.clone());
                if delivery.state != DeliveryState::Done {
                    (delivery.have_bytes, delivery.total_bytes) = (have, length);
                }
            })
        })
        .await?;
        tracing::info!(step = 11, %transaction, bytes = have, "chosen part of the product received");
        let unpacked = self.unpack(&content, &secret).await?;
        if !self.options.only.is_empty() {
            return Ok((content, unpacked, false));
        }
        // What was missing of the whole: with it this delivery is over, and what breaks later is mended under another,
        // where the seeder's window is open again.
        let completion = self.note_fetched(checked, &content, None).await?;
        let reported = self.report(&completion).await;
        Ok((content, unpacked, reported))
    }

    /// Makes sure that these chunks are here, and as they came: those that an earlier run decrypted are read again before
    /// anything is made of them.
    async fn need(
        &self,
        checked: &mut Checked,
        tally: &mut Tally,
        chunks: ChunkSet,
    ) -> Result<Arc<Content>, FetchError> {
        let unproven = {
            let mut earlier = self.earlier();
            let of_these = earlier.unproven.intersection(&chunks);
            earlier.unproven = earlier.unproven.difference(&of_these);
            of_these
        };
        if !self.prove(&checked.manifest, unproven, self.cancel.clone()).await? {
            tracing::warn!(manifest = %checked.manifest, "damaged on this disk, fetching it again");
        }
        if let Some(content) = self.store.get(&checked.manifest)
            && content.have().is_superset(&chunks)
        {
            return Ok(content);
        }
        self.transfer(checked, tally, Some(chunks)).await?;
        self.content(checked)
    }
}

/// Reading goes on until this is cancelled.
pub(super) fn until(stop: &CancellationToken) -> ControlFlow<()> {
    match stop.is_cancelled() {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    }
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
