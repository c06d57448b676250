//! Contact with the manager: enrolment, keys, revocations, heartbeats when gossip is silent, and the report that is
//! answered with what to fetch. While the manager is away everything else goes on.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use node::{AcceptError, CallLimits, Protocol, serve_calls};
use protocol::api::{MeshRequest, MeshResponse, SEEDER_PROTOCOL, SeederReport, SeederRequest, SeederResponse};
use protocol::replication::Placement;
use protocol::trust::{Heartbeat, JoinLine, Update};
use protocol::{Digest, Nonce, Refusal, RefusalCode};
use store::StoreError;
use tokio::time::Instant;

use crate::catching_up::{self, Teller};
use crate::clock::{BackOff, jittered, now_ms};
use crate::context::Seeder;
use crate::gossip::after_restore;
use crate::manager::AskError;
use crate::network::TakeError;
use crate::room::Room;
use crate::statements::{self, FetchError};
use crate::{replication, upkeep};

/// Nudges of managers being answered at once.
const NUDGES: CallLimits = CallLimits { concurrent: 8, per_peer: 4, io_timeout: Duration::from_secs(10) };
const NUDGE: Protocol = Protocol::new(SEEDER_PROTOCOL);
/// A certificate is renewed when less than this is left, milliseconds: 30 days …
const RENEW_BEFORE_MS: u64 = 30 * 24 * 60 * 60 * 1000;
/// … but asked for no more often than this.
const RENEW_EVERY: Duration = Duration::from_secs(60 * 60);

/// Seeders that hear of a manager's return come to it within about so long, milliseconds.
const RETURN_MS: u64 = 10_000;

/// What may still be said to the manager when the node is to stop.
const FAREWELL: Duration = Duration::from_secs(1);

/// Statements are of days: asked for no more often than this.
const STATEMENTS_EVERY: Duration = Duration::from_secs(60 * 60);

#[derive(Debug, thiserror::Error)]
pub(crate) enum SyncError {
    #[error(transparent)]
    Ask(#[from] AskError),
    #[error(transparent)]
    Take(#[from] TakeError),
}

impl From<StoreError> for SyncError {
    fn from(error: StoreError) -> Self {
        SyncError::Take(error.into())
    }
}

/// Answers managers' nudges.
pub(crate) async fn serve_nudges(seeder: &Arc<Seeder>) -> Result<(), AcceptError> {
    let shared = Arc::clone(seeder);
    let answer = move |peer, request: SeederRequest| {
        let seeder = Arc::clone(&shared);
        async move {
            let named = |trust: Arc<protocol::trust::Trust>| trust.key_set().managers.contains(&peer);
            if !seeder.manager.is_manager(&peer) && !seeder.network.trust().is_some_and(named) {
                return SeederResponse::Refused(Refusal::new(RefusalCode::NotEntitled, "only a manager may ask this"));
            }
            match request {
                SeederRequest::Nudge => {
                    seeder.wake.sync.notify_one();
                    SeederResponse::Noted
                }
                SeederRequest::Epochs { after } => match seeder.network.epochs_after(after) {
                    Ok(epochs) => SeederResponse::Epochs(epochs),
                    Err(error) => {
                        tracing::error!(%error, "cannot look up revocation epochs");
                        SeederResponse::Refused(Refusal::new(RefusalCode::Internal, "this seeder's database failed"))
                    }
                },
            }
        }
    };
    serve_calls(&seeder.supervisor, &seeder.node, NUDGE, NUDGES, answer).await
}

/// Keeps in contact until the node stops, and tells the manager of that, so that nobody is sent here meanwhile. One that is
/// away does not hold up the stop.
pub(crate) async fn keep_contact(seeder: Arc<Seeder>, join: JoinLine) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let too_long = async {
        token.cancelled().await;
        tokio::time::sleep(FAREWELL).await;
    };
    let contact = async {
        // One after the other: a report that is under way would say that this seeder is here.
        keep_reporting(&seeder, join).await?;
        if seeder.network.is_enrolled()
            && let Err(error) = seeder.manager.ask(&MeshRequest::Stopping).await
        {
            tracing::debug!(%error, "the manager does not know yet that this seeder stops");
        }
        Ok(())
    };
    tokio::select! {
        ended = Box::pin(contact) => ended,
        () = too_long => Ok(()),
    }
}

async fn keep_reporting(seeder: &Arc<Seeder>, join: JoinLine) -> Result<(), StoreError> {
    let token = seeder.supervisor.token();
    let mut contact = Contact {
        back_off: BackOff::new(seeder.config.retry_ms),
        up_to_date: false,
        renewed: None,
        forgotten: false,
        stated: None,
        turn: 0,
        join,
        seeder: Arc::clone(seeder),
    };
    loop {
        let mut away = false;
        // From here on, since it may be heard while it is asked in vain.
        let mut heard = pin!(seeder.wake.returned.notified());
        heard.as_mut().enable();
        let wait = match contact.round().await {
            Ok(not_taken) => {
                contact.back_off.reset();
                match not_taken {
                    None => contact.seeder.notes.manager.clear(),
                    Some(error) => contact.went_wrong(&error.into()),
                }
                Duration::from_millis(jittered(contact.seeder.config.report_ms))
            }
            Err(SyncError::Take(TakeError::Store(error))) => return Err(error),
            Err(error) => {
                contact.went_wrong(&error);
                away = matches!(error, SyncError::Ask(AskError::Unreachable(_)));
                if away && seeder.network.trust().is_some() {
                    tokio::select! {
                        () = token.cancelled() => return Ok(()),
                        asked = Box::pin(catching_up::from_others(seeder, contact.turn)) => asked?,
                    }
                    contact.turn = contact.turn.wrapping_add(1);
                }
                contact.back_off.pause()
            }
        };
        // All the others hear it, too.
        let returned = async {
            heard.await;
            tokio::time::sleep(Duration::from_millis(jittered(RETURN_MS))).await;
        };
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            // Something may be new at the manager: keys and revocations are asked for, too.
            () = contact.seeder.wake.sync.notified() => contact.up_to_date = false,
            () = tokio::time::sleep(wait) => {}
            () = returned, if away => {}
        }
        if token.is_cancelled() {
            return Ok(());
        }
    }
}

struct Contact {
    seeder: Arc<Seeder>,
    join: JoinLine,
    back_off: BackOff,
    /// The manager was asked for news since the start, and since the last nudge.
    up_to_date: bool,
    renewed: Option<Instant>,
    /// It says that this seeder is not enrolled, although it was.
    forgotten: bool,
    /// When statements were last asked for.
    stated: Option<Instant>,
    /// How often others were asked instead of the manager.
    turn: usize,
}

impl Contact {
    fn went_wrong(&mut self, error: &SyncError) {
        let (note, text) = (&self.seeder.notes.manager, error.to_string());
        if note.get().as_deref() != Some(&text) {
            tracing::warn!(%error, "no contact with the manager, or not all of its news can be taken");
        }
        note.set(text);
        // What gossip brought meanwhile, or did not, is not known: it is asked in the next round.
        self.up_to_date = false;
    }

    /// Gives what of the manager's news was not taken, since it is not good.
    async fn round(&mut self) -> Result<Option<TakeError>, SyncError> {
        if self.seeder.network.trust().is_none() {
            Teller::Manager.key_set(&self.seeder).await?;
        }
        self.certificate().await?;
        // What is not good is not taken, and is no reason to be away for the manager: it may be one that was put back and does
        // not know so, and what is held here can be served all the same.
        let not_taken = match self.fresh().await {
            Err(SyncError::Take(error @ (TakeError::Refused(_) | TakeError::Fork(_)))) => Some(error),
            done => done.map(|()| None)?,
        };
        // A newer key set may have made it void.
        self.certificate().await?;
        match self.report().await {
            Err(SyncError::Ask(AskError::Refused(refusal)))
                if refusal.code == RefusalCode::NotEnrolled && self.seeder.network.is_enrolled() =>
            {
                tracing::warn!(%refusal, "the manager has forgotten this seeder, and is shown its certificate");
                self.forgotten = true;
                self.certificate().await?;
                self.report().await?;
            }
            reported => reported?,
        }
        self.statements().await?;
        Ok(not_taken)
    }

    /// New statements of account. Without them nothing else is worse off: a failure is only noted.
    async fn statements(&mut self) -> Result<(), SyncError> {
        if self.stated.is_some_and(|at| at.elapsed() < STATEMENTS_EVERY) {
            return Ok(());
        }
        self.stated = Some(Instant::now());
        match statements::fetch(&self.seeder).await {
            Ok(_) => Ok(()),
            Err(FetchError::Take(TakeError::Store(error))) => Err(error.into()),
            Err(error) => {
                tracing::warn!(%error, "no statements of account");
                Ok(())
            }
        }
    }

    /// Enrols this seeder, or renews its certificate before it ends, and as soon as the key that signed it is void.
    async fn certificate(&mut self) -> Result<(), SyncError> {
        let (until, now) = (self.seeder.network.certificate_holds_until().unwrap_or(0), now_ms());
        let holds = until > now;
        let asked = self.renewed.is_some_and(|at| at.elapsed() < RENEW_EVERY);
        let fits = until > now.saturating_add(RENEW_BEFORE_MS) || holds && asked;
        if fits && !std::mem::take(&mut self.forgotten) {
            return Ok(());
        }
        let token = match &self.join.invitation {
            Some(invitation) => invitation.token,
            // Who is enrolled needs none.
            None if self.seeder.network.is_enrolled() => Nonce::from_bytes([0; 16]),
            None => {
                let refusal = Refusal::new(RefusalCode::BadInvitation, "the join line carries no invitation");
                return Err(AskError::from(refusal).into());
            }
        };
        let config = &self.seeder.config;
        let held = self.seeder.network.held_certificate();
        let request = MeshRequest::Enrol { token, name: config.name.clone(), capacity: config.capacity, held };
        let signed = match self.seeder.manager.ask(&request).await {
            Ok(MeshResponse::Enrolled(signed)) => signed,
            Ok(_) => return Err(AskError::Unexpected("an enrolment").into()),
            // What is held is good for a while yet.
            Err(error) if holds => {
                tracing::warn!(%error, "the certificate could not be renewed");
                self.renewed = Some(Instant::now());
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        let network = &self.seeder.network;
        let taken = match network.take_certificate(signed.clone()).await {
            // Signed by a key of a newer key set.
            Err(TakeError::Refused(refusal)) if refusal.code == RefusalCode::UnknownKey => {
                Teller::Manager.key_set(&self.seeder).await?;
                network.take_certificate(signed).await?
            }
            taken => taken?,
        };
        // What was in vain is not tried again at once. A new one may be made void by the next key set, and is due then.
        self.renewed = (taken == Update::NotNewer).then(Instant::now);
        if taken == Update::Taken {
            tracing::info!(peer = %self.seeder.peer, "enrolled");
            self.seeder.wake.announce.notify_one();
        }
        Ok(())
    }

    /// Makes up for what gossip did not bring.
    async fn fresh(&mut self) -> Result<(), SyncError> {
        let seeder = Arc::clone(&self.seeder);
        let heard = seeder.network.heartbeat().map_or(0, |heartbeat| heartbeat.at);
        let silent = now_ms().saturating_sub(heard) > seeder.config.heartbeat_silence_ms;
        let mut newest = seeder.network.heartbeat();
        if silent || !self.up_to_date || self.knows_newer_keys() {
            self.compare_keys().await?;
        }
        if silent || !self.up_to_date || seeder.network.clock_is_due(now_ms()) {
            newest = Some(self.heartbeat().await?);
            // What it names is fetched below. To wake this for it would have a round that fails followed by the next without
            // a pause.
            after_restore(&seeder).await?;
        }
        let Some(heartbeat) = newest else { return Ok(()) };
        if seeder.network.trust().is_none_or(|trust| trust.key_set().version < heartbeat.key_set_version) {
            Teller::Manager.key_set(&seeder).await?;
        }
        Teller::Manager.epochs(&seeder, Some(heartbeat.epoch)).await?;
        self.up_to_date = true;
        Ok(())
    }

    /// Does the manager's newest word name an older key set than the one held?
    fn knows_newer_keys(&self) -> bool {
        let network = &self.seeder.network;
        let held = network.trust().map_or(0, |trust| trust.key_set().version);
        network.heartbeat().is_some_and(|heartbeat| heartbeat.key_set_version < held)
    }

    /// Takes the manager's key set if it is newer. One that came back from a backup may have forgotten the one that is held
    /// here: then it is shown that, also where it has another one of the same number since.
    async fn compare_keys(&self) -> Result<(), SyncError> {
        let seeder = &self.seeder;
        let MeshResponse::KeySet(theirs) = seeder.manager.ask(&MeshRequest::KeySet).await? else {
            return Err(AskError::Unexpected("a question for the key set").into());
        };
        match seeder.network.take_key_set(theirs.clone()).await {
            Ok(Update::Taken) => return Ok(()),
            Ok(Update::NotNewer) | Err(TakeError::Fork(_)) => {}
            Err(error) => return Err(error.into()),
        }
        let Some(trust) = seeder.network.trust() else { return Ok(()) };
        let held = trust.signed_key_set();
        if *held == theirs {
            return Ok(());
        }
        let version = trust.key_set().version;
        match seeder.manager.ask(&MeshRequest::NewerKeySet(Box::new(held.clone()))).await {
            Ok(_) => tracing::warn!(version, "the manager was shown the key set that is held here"),
            Err(AskError::Refused(refusal)) => {
                tracing::error!(version, %refusal, "the manager does not take the key set")
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The manager's word of this moment, which also tells whose clock is off. One that does not come tells nothing.
    async fn heartbeat(&self) -> Result<Heartbeat, SyncError> {
        let seeder = &self.seeder;
        let asked = now_ms();
        let answer = seeder.manager.ask(&MeshRequest::Heartbeat).await?;
        let MeshResponse::Heartbeat(signed) = answer else {
            return Err(AskError::Unexpected("a question for the heartbeat").into());
        };
        // It was signed about half-way between question and answer.
        let answered = now_ms();
        let middle = asked + answered.saturating_sub(asked) / 2;
        let mut compared = seeder.network.compare_clock(&signed, middle);
        // Signed by a key of a newer key set.
        if matches!(&compared, Err(refusal) if refusal.code == RefusalCode::UnknownKey) {
            Teller::Manager.key_set(seeder).await?;
            compared = seeder.network.compare_clock(&signed, middle);
        }
        let (clock, heartbeat) = compared.map_err(TakeError::from)?;
        // By a clock that is off nobody can tell how old it is. What it says of keys and revocations holds all the same.
        if !clock.is_off() {
            seeder.network.take_heartbeat(signed).await?;
        }
        Ok(heartbeat)
    }

    async fn report(&self) -> Result<(), SyncError> {
        let seeder = &self.seeder;
        let placements = {
            let _alone = seeder.telling.lock().await;
            self.tell().await?
        };
        self.place(placements).await
    }

    /// Tells the manager how it is here, and what is held; gives what is to be fetched.
    async fn tell(&self) -> Result<Vec<Placement>, SyncError> {
        let seeder = &self.seeder;
        // Before it is made: what is taken back meanwhile is taken back by the next one.
        let (leaving, moving) = (seeder.drain.is_leaving(), seeder.moving.get());
        let unwanted = seeder.unwanted.still(|id| seeder.denied.contains(id));
        let reporting = Arc::clone(seeder);
        let made = tokio::task::spawn_blocking(move || {
            let mut held = upkeep::complete(&reporting);
            held.retain(|digest| !reporting.drain.is_released(digest) && !reporting.letting_go.has(digest));
            (held, upkeep::damaged(&reporting), reporting.room())
        })
        .await;
        // Only a panic in there; the next round says it again.
        let Ok((held, damaged, Room { free, spare })) = made else {
            return Err(AskError::Unexpected("nobody: the report was not made").into());
        };
        let (deliveries, max_deliveries) = seeder.deliveries.load();
        let turned_away = seeder.deliveries.turned_away();
        let report = SeederReport {
            addrs: seeder.addresses(),
            held: Vec::new(),
            damaged: damaged?,
            first: true,
            capacity: seeder.config.capacity,
            free,
            spare,
            leaving,
            moving,
            unwanted,
            deliveries,
            max_deliveries,
            turned_away,
            now: now_ms(),
        };
        let mut placements = Vec::new();
        for report in in_parts(&report, &held) {
            let (first, report) = (report.first, SeederReport { now: now_ms(), ..report });
            let failed = match seeder.manager.ask(&MeshRequest::Report(report)).await {
                Ok(MeshResponse::Placements(more)) => {
                    placements.extend(more);
                    continue;
                }
                Ok(_) => AskError::Unexpected("a report"),
                Err(error) => error,
            };
            if first {
                seeder.deliveries.untold(turned_away);
            }
            return Err(failed.into());
        }
        Ok(placements)
    }

    async fn place(&self, placements: Vec<Placement>) -> Result<(), SyncError> {
        for placement in placements {
            for source in &placement.sources {
                // The manager vouches for them; a full table is no reason to refuse the placement.
                let _ = self.seeder.node.add_dht_peer(source.clone()).await;
            }
            match replication::queue(&self.seeder, placement).await {
                Ok(()) => {}
                Err(TakeError::Refused(refusal)) => tracing::warn!(%refusal, "placement not taken"),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// A report of so many contents as may be held, in as many parts as that takes.
fn in_parts(report: &SeederReport, held: &[Digest]) -> Vec<SeederReport> {
    let mut parts: Vec<&[Digest]> = held.chunks(SeederReport::MAX_HELD).collect();
    // A part that is not full is the last.
    if parts.last().is_none_or(|part| part.len() == SeederReport::MAX_HELD) {
        parts.push(&[]);
    }
    let last = parts.len().saturating_sub(1);
    let part = |(index, part): (usize, &[Digest])| {
        let mut report = SeederReport { held: part.to_vec(), first: index == 0, ..report.clone() };
        // Once is enough.
        if index > 0 {
            report.moving.clear();
            report.unwanted.clear();
            report.turned_away = 0;
        }
        // Only the last part takes what no part names out of the manager's books, and it orders nothing that stands there.
        if index < last {
            report.damaged.clear();
        }
        report
    };
    parts.into_iter().enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_told_when_the_manager_knows_that_the_copy_is_held_no_more() {
        let digest = |n: usize| Digest::of("a test's content", &[&n.to_le_bytes()]);
        let whole = SeederReport {
            damaged: vec![digest(9999)],
            moving: vec![digest(1)],
            unwanted: vec![digest(2)],
            turned_away: 3,
            ..SeederReport::default()
        };
        for (count, parts) in [(0, 1), (1, 1), (1023, 1), (1024, 2), (2047, 2), (2048, 3)] {
            let held: Vec<Digest> = (0..count).map(digest).collect();
            let told = in_parts(&whole, &held);
            assert_eq!((told.len(), told.iter().flat_map(|part| &part.held).count()), (parts, count));
            for (index, part) in told.iter().enumerate() {
                let (first, last) = (index == 0, index + 1 == parts);
                assert_eq!(part.held.len() < SeederReport::MAX_HELD, last);
                let counts = [part.moving.len(), part.unwanted.len(), part.turned_away as usize];
                assert_eq!((part.first, counts), (first, if first { [1, 1, 3] } else { [0, 0, 0] }));
                assert_eq!(part.damaged.len(), usize::from(last));
            }
        }
    }
}
