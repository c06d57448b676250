//! Which ticket is fetched by, and whether it is any good: judged here with the same checks as at a seeder, so that a
//! wrong one ends in one clear line and not in refusals from everywhere.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use delivery::StallCause;
use protocol::clock::ClockState;
use protocol::codec::Wire;
use protocol::deliver::Credential;
use protocol::ticket::{Admission, Lease, TicketEnvelope};
use protocol::trust::{RevocationState, Trust};
use protocol::{PeerId, Refusal, RefusalCode, TransactionId};

use super::key::{Patience, current, current_at_once};
use super::lease::NO_LONGER;
use super::{FetchError, FetchOptions, Purchase, Target};
use crate::home::{Home, blocking, now_ms};
use crate::inbox::{OTHER_SALE, TicketError, ask_ticket, ask_ticket_instead};
use crate::library::{LibraryError, Put, is_same_sale, issued};
use crate::link::{Link, ManagerError, wants_newer_keys};

/// To compare this clock with the manager's, before a fetch ends for its sake.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(3);

/// The purchase that is meant, with the newest ticket at hand; the library has a ticket of it afterwards.
pub(super) async fn find(home: &Home, target: Target, options: &FetchOptions) -> Result<Purchase, FetchError> {
    let envelope = match target {
        Target::Envelope(envelope) => *envelope,
        Target::File(path) => {
            let from = path.clone();
            let read = blocking(move || read_ticket_file(&from)).await;
            let bytes = read.map_err(|source| FetchError::ReadTicket { path: path.clone(), source })?;
            TicketEnvelope::from_file_bytes(&bytes).map_err(|source| FetchError::TicketFile { path, source })?
        }
        Target::Transaction(transaction) => {
            let library = home.library();
            match blocking(move || library.get(&transaction)).await? {
                Some(delivery) => delivery.envelope,
                None => ask_networks(home, transaction, options).await?,
            }
        }
    };
    let (data, lease) = peek(&envelope).map_err(FetchError::BadTicket)?;
    if envelope.join.network() != data.network {
        let why = "its join line is of another network";
        return Err(FetchError::BadTicket(Refusal::new(RefusalCode::WrongNetwork, why)));
    }
    if lease.client != home.peer_id() {
        return Err(FetchError::OtherClient { ticket_for: lease.client, here: home.peer_id() });
    }
    let (library, transaction) = (home.library(), data.transaction);
    let envelope = blocking(move || match library.get(&transaction)? {
        None => {
            library.put_ticket(transaction, &envelope, false, now_ms())?;
            tracing::info!(step = 8, %transaction, "ticket received");
            Ok(envelope)
        }
        // Either may be the good one: this one is put in once it was checked.
        Some(known) if !known.checked => Ok(envelope),
        Some(known) if !is_same_sale(&known.envelope, &envelope) => Err(FetchError::OtherSale(transaction)),
        // An older ticket of a purchase that goes on by a renewed one.
        Some(known) => Ok(Some(known.envelope).filter(|known| issued(known) > issued(&envelope)).unwrap_or(envelope)),
    })
    .await?;
    Ok(Purchase { transaction, network: data.network, envelope })
}

/// The bytes of a ticket file: of a longer file only so many that it is seen to be no ticket.
///
/// # Errors
/// Those of reading, and for what is no file.
pub fn read_ticket_file(path: &Path) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"));
    }
    // The text form takes a third more than the bytes that it stands for.
    let limit = 2 * TicketEnvelope::MAX as u64;
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(std::fs::File::open(path)?, limit), &mut bytes)?;
    Ok(bytes)
}

fn peek(envelope: &TicketEnvelope) -> Result<(protocol::ticket::TransactionData, Lease), Refusal> {
    Ok((envelope.ticket.data.peek()?, envelope.ticket.lease.peek()?))
}

/// A transaction that the library does not know: some manager's mailbox may.
async fn ask_networks(
    home: &Home,
    transaction: TransactionId,
    options: &FetchOptions,
) -> Result<TicketEnvelope, FetchError> {
    let joins = match &options.join {
        Some(join) => vec![join.clone()],
        None => {
            let networks = home.networks();
            blocking(move || networks.list()).await?
        }
    };
    let mut why = String::new();
    for join in joins {
        let link = Link::start(home, &join, options.link.clone()).await?;
        let asked = match link.trust().await {
            Ok(_) => ask_ticket(&link, transaction, join.network(), home.peer_id()).await.map_err(|e| e.to_string()),
            Err(error) => Err(error.to_string()),
        };
        link.stop().await;
        match asked {
            Ok(envelope) => return Ok(envelope),
            Err(error) => why.push_str(&format!("; {error}")),
        }
    }
    Err(FetchError::Unknown(transaction, why))
}

/// The purchase with keys and revocations that it was checked against.
#[derive(Clone)]
pub(super) struct Checked {
    pub(super) purchase: Purchase,
    pub(super) lease: Lease,
    pub(super) manifest: protocol::Digest,
    pub(super) trust: Arc<Trust>,
    pub(super) revoked: Arc<RevocationState>,
    /// Why an over lease could not be renewed; seeders that know the delivery may go on with it for a while.
    pub(super) not_renewed: Option<String>,
    /// Why there is no further delivery of what came before and is needed again: seeders send little of it in this one.
    pub(super) not_opened: Option<NotOpened>,
}

impl Checked {
    fn new(
        purchase: Purchase,
        lease: Lease,
        manifest: protocol::Digest,
        trust: Arc<Trust>,
        revoked: Arc<RevocationState>,
    ) -> Checked {
        Checked { purchase, lease, manifest, trust, revoked, not_renewed: None, not_opened: None }
    }
}

/// Why the manager opened no further delivery.
#[derive(Clone, Debug)]
pub(super) struct NotOpened {
    pub(super) why: String,
    pub(super) cause: &'static str,
    pub(super) stall: StallCause,
}

impl NotOpened {
    pub(super) fn by(error: &RenewError) -> NotOpened {
        let stall = match error.refusal().map(|said| said.code) {
            None => StallCause::ManagerAway,
            Some(RefusalCode::Overloaded) => StallCause::Overloaded,
            Some(code) => StallCause::AllRefused { code },
        };
        NotOpened { why: error.to_string(), cause: error.cause(), stall }
    }
}

impl Checked {
    /// What seeders are shown.
    pub(super) fn credential(&self) -> Credential {
        Credential::Ticket(Box::new(self.purchase.envelope.ticket.clone()))
    }

    /// Did the manager sign that the purchase is past this lease's generation?
    pub(super) fn has_moved_on(&self) -> bool {
        self.revoked.has_moved_on(&self.purchase.transaction, self.lease.generation)
    }
}

/// Checks the ticket against the network's keys, fetching newer ones, and a newer lease, where that helps.
pub(super) async fn check(
    home: &Home,
    link: &Link,
    mut purchase: Purchase,
    waiting: Patience<'_>,
) -> Result<Checked, FetchError> {
    let (mut trust, mut fresh) = link.trust().await?;
    let revoked = Arc::new(link.revocations(&trust).await?);
    let mut not_renewed = None;
    let mut renewed = false;
    loop {
        let now = now_ms();
        let refusal = match judge(&purchase.envelope, home.peer_id(), &trust, &revoked, now) {
            Ok(lease) => {
                let (data, _) = peek(&purchase.envelope).map_err(FetchError::BadTicket)?;
                if !note(home, &purchase).await? {
                    return Err(FetchError::OtherSale(purchase.transaction));
                }
                return Ok(Checked { not_renewed, ..Checked::new(purchase, lease, data.manifest, trust, revoked) });
            }
            Err(refusal) => refusal,
        };
        match refusal.code {
            // A key that was given up does not come back: what helps is another lease.
            RefusalCode::KeyRetired if !renewed => {
                renewed = true;
                match current(home, link, &purchase, waiting).await? {
                    Ok(envelope) => (purchase.envelope, fresh) = (envelope, false),
                    Err(error) => return Err(void(refusal, &RenewError::Ask(error), false)),
                }
            }
            _ if wants_newer_keys(&refusal) && !fresh => match link.refresh().await {
                Ok(newer) => (trust, fresh) = (newer, true),
                Err(error) => {
                    let detail = format!("{}; newer keys were not to be had: {error}", refusal.detail);
                    return Err(FetchError::BadTicket(Refusal::new(refusal.code, detail)));
                }
            },
            RefusalCode::Expired if !renewed => {
                renewed = true;
                match current_at_once(home, link, &purchase, waiting).await? {
                    Ok(envelope) => purchase.envelope = envelope,
                    Err(TicketError::Manager(ManagerError::Refused(said))) if said.code == RefusalCode::Revoked => {
                        return Err(FetchError::Revoked(said));
                    }
                    Err(error) => not_renewed = Some(error.to_string()),
                }
            }
            // A manager whose clock was ahead, and was set right since, gives one that begins now.
            RefusalCode::NotYetValid if !renewed => {
                renewed = true;
                match current_at_once(home, link, &purchase, waiting).await? {
                    Ok(envelope) => purchase.envelope = envelope,
                    Err(TicketError::Manager(ManagerError::Refused(said))) if said.code == RefusalCode::Revoked => {
                        return Err(FetchError::Revoked(said));
                    }
                    Err(error) => {
                        tracing::info!(transaction = %purchase.transaction, %error, "no lease that begins now")
                    }
                }
            }
            RefusalCode::Expired if not_renewed.is_some() => {
                let (data, lease) = peek(&purchase.envelope).map_err(FetchError::BadTicket)?;
                return Ok(Checked { not_renewed, ..Checked::new(purchase, lease, data.manifest, trust, revoked) });
            }
            RefusalCode::NotYetValid | RefusalCode::Expired => {
                let refusal = compared(link, &trust, refusal).await;
                if refusal.code == RefusalCode::NotYetValid || super::clock(&refusal).is_off() {
                    return Err(FetchError::Clock(refusal));
                }
                // The manager has no other one: seeders go on for a while with what they know, as while it is away.
                not_renewed = Some(NO_LONGER.to_owned());
            }
            RefusalCode::Revoked => {
                // The lease may be void, and the purchase still this client's.
                let (data, lease) = peek(&purchase.envelope).map_err(FetchError::BadTicket)?;
                let lease_only = revoked.has_moved_on(&data.transaction, lease.generation)
                    && !revoked.has_transaction(&data.transaction);
                if renewed || !lease_only {
                    return Err(FetchError::Revoked(refusal));
                }
                renewed = true;
                match current(home, link, &purchase, waiting).await? {
                    Ok(envelope) => purchase.envelope = envelope,
                    // A manager that does not answer has not said that the purchase was taken back.
                    Err(error) => return Err(void(refusal, &RenewError::Ask(error), true)),
                }
            }
            _ => return Err(FetchError::BadTicket(refusal)),
        }
    }
}

/// The same refusal, saying how far this clock is off where the manager's sign of life shows it. One that others pass on
/// may be old: it can show a clock to be behind, and never one to be ahead.
async fn compared(link: &Link, trust: &Trust, refusal: Refusal) -> Refusal {
    let asked = async {
        match link.managers_sign_of_life(trust).await {
            Ok(heartbeat) => Some((heartbeat.at, true)),
            Err(_) => link.sign_of_life(trust).await.ok().map(|heartbeat| (heartbeat.at, false)),
        }
    };
    let asked = tokio::time::timeout(COMPARE_TIMEOUT, asked).await;
    let now = now_ms();
    match asked {
        Ok(Some((at, fresh))) if fresh || at > now => refusal.at(at).compared_with(now, trust.grace_ms()),
        _ => refusal,
    }
}

/// This clock beside that of the manager, where it can be asked.
pub(super) async fn clock_by_manager(link: &Link, trust: &Trust) -> ClockState {
    match tokio::time::timeout(COMPARE_TIMEOUT, link.managers_sign_of_life(trust)).await {
        Ok(Ok(heartbeat)) => ClockState::compare(now_ms(), heartbeat.at, trust.grace_ms()),
        _ => ClockState::Unknown,
    }
}

/// A seeder's checks, at no seeder in particular and with the manager as fresh as can be.
fn judge(
    envelope: &TicketEnvelope,
    client: PeerId,
    trust: &Trust,
    revoked: &RevocationState,
    now: u64,
) -> Result<Lease, Refusal> {
    let admission =
        Admission { peer: client, seeder: client, trust, revoked, informed: Some(now), continuation_ms: 0, now };
    Ok(envelope.ticket.check(&admission)?.lease)
}

/// Notes a ticket that was checked. False where it is of another sale than the one known.
async fn note(home: &Home, purchase: &Purchase) -> Result<bool, LibraryError> {
    let (library, transaction, envelope) = (home.library(), purchase.transaction, purchase.envelope.clone());
    Ok(blocking(move || library.put_ticket(transaction, &envelope, true, now_ms())).await? != Put::Other)
}

/// Why there is no new lease.
#[derive(Debug, thiserror::Error)]
pub(super) enum RenewError {
    #[error(transparent)]
    Ask(#[from] TicketError),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Library(#[from] LibraryError),
}

impl RenewError {
    /// The manager's no, or what is wrong with what it gave.
    fn refusal(&self) -> Option<&Refusal> {
        match self {
            RenewError::Ask(TicketError::Manager(ManagerError::Refused(said))) | RenewError::Refused(said) => {
                Some(said)
            }
            RenewError::Ask(_) | RenewError::Library(_) => None,
        }
    }

    /// The same for machines.
    fn cause(&self) -> &'static str {
        match (self.refusal(), self) {
            (Some(said), _) => said.code.as_str(),
            (None, RenewError::Library(_)) => "disk",
            (None, _) => "manager-away",
        }
    }
}

/// A new lease from the manager, checked and noted: why not, where there is none.
pub(super) async fn renew(home: &Home, link: &Link, checked: &Checked) -> Result<Checked, String> {
    try_renew(home, link, checked).await.map_err(|error| error.to_string())
}

/// The lease of a further delivery in place of this one, in which no seeder sends anything more.
pub(super) async fn replace(home: &Home, link: &Link, checked: &Checked) -> Result<Checked, RenewError> {
    ask_again(home, link, checked, Some(checked.lease.delivery)).await
}

/// [`renew`], where it matters what kind of failure it is.
pub(super) async fn try_renew(home: &Home, link: &Link, checked: &Checked) -> Result<Checked, RenewError> {
    ask_again(home, link, checked, None).await
}

async fn ask_again(
    home: &Home,
    link: &Link,
    checked: &Checked,
    instead_of: Option<u32>,
) -> Result<Checked, RenewError> {
    let Checked { purchase, trust, revoked, .. } = checked;
    let (transaction, network, client) = (purchase.transaction, purchase.network, home.peer_id());
    let envelope = ask_ticket_instead(link, transaction, network, client, instead_of).await?;
    let mut trust = link.known_trust().unwrap_or_else(|| Arc::clone(trust));
    let mut judged = judge(&envelope, home.peer_id(), &trust, revoked, now_ms());
    if judged.as_ref().is_err_and(wants_newer_keys)
        && let Ok(newer) = link.refresh().await
    {
        // The manager's keys changed since they were asked for.
        judged = judge(&envelope, home.peer_id(), &newer, revoked, now_ms());
        trust = newer;
    }
    let lease = judged?;
    let purchase = Purchase { envelope, ..purchase.clone() };
    if !note(home, &purchase).await? {
        return Err(TicketError::Other(OTHER_SALE).into());
    }
    // What was bought on completion has one lease, which comes again.
    if lease != checked.lease {
        tracing::info!(transaction = %purchase.transaction, until = lease.end, "lease renewed");
    }
    let (manifest, revoked) = (checked.manifest, Arc::clone(revoked));
    Ok(Checked::new(purchase, lease, manifest, trust, revoked))
}

/// No seeder takes the lease any more, and why there is no other yet. Where the manager signed that the purchase `moved` on,
/// and gives this client no other, it is another one's.
pub(super) fn void(refusal: Refusal, error: &RenewError, moved: bool) -> FetchError {
    match error {
        RenewError::Ask(TicketError::Manager(ManagerError::Refused(said))) if said.code == RefusalCode::Revoked => {
            FetchError::Revoked(said.clone())
        }
        RenewError::Ask(TicketError::Manager(ManagerError::Refused(said)))
            if moved && said.code == RefusalCode::NotEntitled =>
        {
            FetchError::Moved(refusal)
        }
        _ => FetchError::LeaseVoid { refusal, renewal: error.to_string(), cause: error.cause() },
    }
}

/// From half of its life on a lease is renewed, so that one that is needed is hardly ever over.
pub(super) fn half_life(lease: &Lease) -> u64 {
    lease.start.saturating_add(lease.end.saturating_sub(lease.start) / 2)
}
