//! From a ticket to files in their place, whatever happens on the way: every step can be broken off and taken up again,
//! and what is not moving says why.

mod acks;
mod banned;
mod debts;
mod delivered;
mod finish;
mod key;
mod lease;
mod refused;
mod run;
mod served;
mod sources;
mod tally;
mod ticket;
mod told;
mod transfer;

pub use ticket::read_ticket_file;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use delivery::{FetchLimits, Pace, Progress, Rate, SourceReport, StallCause};
use node::StartError;
use protocol::clock::ClockState;
use protocol::ticket::{TicketEnvelope, TicketTextError};
use protocol::trust::{DEFAULT_CLOCK_GRACE_MS, JoinLine};
use protocol::{NetworkId, PeerAddrs, PeerId, Refusal, RefusalCode, TextError, TransactionId};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::home::{FileError, Home, all_as_text, as_text, now_ms};
use crate::library::{DeliveryState, LibraryError};
use crate::link::{LinkOptions, ManagerError, TrustError};
use crate::place::PlaceError;
use crate::plain::PlainError;
use crate::unpack::UnpackError;

pub(crate) use key::open_grant;
pub(crate) use refused::refuse;

/// What is to be fetched.
#[derive(Clone, Debug)]
pub enum Target {
    /// This ticket.
    Envelope(Box<TicketEnvelope>),
    /// The ticket in this file.
    File(PathBuf),
    /// A purchase in the library, or in the mailbox at a manager.
    Transaction(TransactionId),
}

/// Why a text is no target.
#[derive(Debug, thiserror::Error)]
#[error("not a ticket: {0}; a ticket is a line that begins with willcall:, a transaction id, or a ticket's file")]
pub struct TargetError(#[from] TextError);

impl FromStr for Target {
    type Err = TargetError;

    /// A `willcall:` line, a transaction id, or else the path of a file.
    fn from_str(text: &str) -> Result<Self, TargetError> {
        if text.trim_start().starts_with("willcall:") {
            return Ok(Target::Envelope(Box::new(text.parse()?)));
        }
        match text.trim().parse::<TransactionId>() {
            Ok(transaction) => Ok(Target::Transaction(transaction)),
            Err(_) => Ok(Target::File(PathBuf::from(text))),
        }
    }
}

/// How it is fetched.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Only these files: paths in the product, folders, or patterns with `*` and `?`. Empty: everything.
    pub only: Vec<String>,
    /// Seeders to ask first, besides those that ticket and discovery name.
    pub sources: Vec<PeerAddrs>,
    /// The network to look in for a transaction that is not in the library; else all known ones.
    pub join: Option<JoinLine>,
    /// Bounds and patience of the transfer.
    pub limits: FetchLimits,
    /// The limit that all transfers of the process share.
    pub process_pace: Arc<Pace>,
    /// How long to go on asking an absent manager for a key or a lease without which nothing can be done.
    pub manager_patience: Duration,
    /// How to connect.
    pub link: LinkOptions,
}

impl Default for FetchOptions {
    fn default() -> Self {
        let mut limits = FetchLimits::default();
        // Until the list of files is here, nothing of it has its place on the disk.
        limits.scheduler.first_bytes = LIST_BYTES;
        FetchOptions {
            only: Vec::new(),
            sources: Vec::new(),
            join: None,
            limits,
            process_pace: Arc::new(Pace::new(Rate::default())),
            manager_patience: Duration::from_secs(10 * 60),
            link: LinkOptions::default(),
        }
    }
}

/// The lists of most products are shorter: one of fifty thousand files is about so long.
const LIST_BYTES: u32 = 4 * 1024 * 1024;

/// Bytes of all names of files that a purchase was fetched by: with them its record stays below its limit.
pub(crate) const MOST_NAMED: usize = 64 * 1024;

/// How far a fetch is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FetchPhase {
    /// The ticket is being checked, the network joined.
    #[default]
    Preparing,
    /// What an earlier fetch delivered is read: `transfer` counts bytes of these files meanwhile.
    Checking,
    /// Chunks are coming, or awaited.
    Fetching,
    /// Everything is here; the key comes from the manager.
    AwaitingKey,
    /// Files are being decrypted.
    Unpacking,
    /// The files are in their place; seeders are told so for a few seconds more.
    Done,
}

/// Something other than seeders is waited for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Waiting {
    /// Why.
    #[serde(flatten)]
    pub cause: StallCause,
    /// One line for people.
    pub detail: String,
    /// When it is tried again, unix milliseconds.
    pub next_try: u64,
}

/// A lease and what becomes of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct LeaseView {
    /// Its end, unix milliseconds.
    pub until: u64,
    /// When it is renewed, or that is tried again, unix milliseconds.
    pub next_try: u64,
    /// Why it was not renewed at the last try.
    pub problem: Option<String>,
}

/// Where a fetch stands.
#[derive(Clone, Debug, Default, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct FetchProgress {
    /// How far it is.
    pub phase: FetchPhase,
    /// Which purchase, once that is known.
    pub transaction: Option<TransactionId>,
    /// What was bought.
    pub title: String,
    /// The transfer, with why it is not moving.
    pub transfer: Progress,
    /// Bytes unpacked.
    pub unpacked_bytes: u64,
    /// Bytes to be unpacked; 0 while that is unknown.
    pub plain_bytes: u64,
    /// The lease that the transfer goes by, while it runs.
    pub lease: Option<LeaseView>,
    /// When the first new chunk was verified, unix milliseconds.
    pub first_chunk_at: Option<u64>,
    /// The manager's newest sign of life that came, unix milliseconds: keys and revocations are known as of then.
    pub manager_seen_at: Option<u64>,
    /// What else is waited for.
    pub waiting: Option<Waiting>,
}

/// What a fetch did.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct FetchOutcome {
    /// The purchase.
    pub transaction: TransactionId,
    /// What was bought.
    pub title: String,
    /// Ciphertext bytes fetched in this run.
    pub bytes: u64,
    /// Ciphertext bytes of what was asked for that were there from earlier runs: in the work folder, or in the files that
    /// they delivered.
    pub resumed_from: u64,
    /// Bytes of chunks that came twice.
    pub duplicate_bytes: u64,
    /// Time of the transfer, milliseconds.
    pub transfer_ms: u64,
    /// Time of everything, milliseconds.
    pub total_ms: u64,
    /// Time until the first new chunk was here and verified, milliseconds; `None` when none came.
    pub first_chunk_ms: Option<u64>,
    /// Files in their place, of this run and earlier ones.
    pub files: u32,
    /// Bytes of these files.
    pub plain_bytes: u64,
    /// Where they are: a file, or a folder with them.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// Each seeder's part.
    pub sources: Vec<SourceReport>,
    /// How far the delivery is now.
    pub state: DeliveryState,
    /// The manager has the completion.
    pub reported: bool,
    /// Nothing was fetched: all of it was in its place already, and was found sound.
    pub already_here: bool,
    /// What stood where a file belongs and is another one: it lies here now.
    #[serde(serialize_with = "all_as_text")]
    pub kept_aside: Vec<PathBuf>,
}

/// Why a fetch did not end with files.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The file cannot be read.
    #[error("cannot read the ticket {}: {source}", path.display())]
    ReadTicket {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no ticket.
    #[error("{}: {source}", path.display())]
    TicketFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: TicketTextError,
    },
    /// The ticket names another client.
    #[error("this ticket is for {ticket_for}, this machine is {here}; fetch it there, or use the home with that key")]
    OtherClient {
        /// Whom it names.
        ticket_for: PeerId,
        /// This home.
        here: PeerId,
    },
    /// The ticket contradicts itself.
    #[error("the ticket does not hold: {0}; ask the merchant for it again")]
    BadTicket(Refusal),
    /// It is of another sale than the one that is known by its number.
    #[error(
        "this ticket is not of the purchase {0} that is in the library and was checked: it is another one under the same \
         number; ask whoever gave it"
    )]
    OtherSale(TransactionId),
    /// The ticket begins later.
    #[error("{0}; compare this machine's clock with the time, then fetch again")]
    Clock(Refusal),
    /// Those of the seeders are wrong.
    #[error(
        "the seeders refuse the ticket for the time, and it is their clocks that are wrong: they are {theirs}, while this \
         machine's clock agrees with the manager's, and there is nothing to set here; fetch again later, or from another \
         seeder (--seeder)"
    )]
    TheirClocks {
        /// By this machine's clock.
        theirs: ClockState,
        /// Why the transfer ended.
        transfer: delivery::FetchError,
    },
    /// The purchase was taken back.
    #[error("this purchase was revoked or refunded: {0}")]
    Revoked(Refusal),
    /// It is another client's since.
    #[error("this purchase was moved to another client: {0}; fetch it there")]
    Moved(Refusal),
    /// The manifest that it was sold by is void.
    #[error(
        "what was bought cannot be delivered any more: {0}. A new ticket does not help; ask the merchant for a refund, \
         and buy it again where it is still sold"
    )]
    ContentVoid(Refusal),
    /// No such purchase anywhere.
    #[error("transaction {0} is neither in the library nor in the mailbox of a network known here{1}")]
    Unknown(TransactionId, String),
    /// Another command fetches the same.
    #[error("process {pid} is fetching this purchase already; wait for it or stop it")]
    Running {
        /// The process.
        pid: String,
    },
    /// The network cannot be joined.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Other commands could not ask it.
    #[error(transparent)]
    Control(#[from] node::ControlStartError),
    /// The network's keys are not known.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The network was never met, and this machine is cut off.
    #[error("{}; check its connection, then fetch again", key::NO_ROUTE)]
    NoRoute,
    /// The transfer ended.
    #[error("{0}{way}", way = way_out(.0))]
    Transfer(delivery::FetchError),
    /// The transfer ended because the lease is over, and it could not be renewed.
    #[error("{transfer}; the lease is over and was not renewed: {renewal}")]
    LeaseOver {
        /// How the transfer ended.
        transfer: delivery::FetchError,
        /// Why there is no new lease.
        renewal: String,
    },
    /// Seeders do not send again what came before, and no further delivery of it was opened.
    #[error("{transfer}; what came before comes again in a further delivery only, and none was opened: {why}")]
    NotOpened {
        /// How the transfer ended.
        transfer: delivery::FetchError,
        /// Why there is none.
        why: String,
        /// The same for machines.
        cause: &'static str,
    },
    /// No seeder takes the lease any more, and there is no other lease yet. The purchase may be good all the same.
    #[error("the lease is void ({refusal}) and was not replaced: {renewal}; fetch again to go on")]
    LeaseVoid {
        /// Why no seeder takes it.
        refusal: Refusal,
        /// Why there is no new lease.
        renewal: String,
        /// The same for machines.
        cause: &'static str,
    },
    /// There is not enough space.
    #[error(
        "{} has {free} bytes free, and unpacking needs {needed}; make room there or choose another folder, then fetch \
         again", path.display()
    )]
    NoSpace {
        /// Where.
        path: PathBuf,
        /// Bytes needed.
        needed: u64,
        /// Bytes free.
        free: u64,
    },
    /// Some files only, of a product whose key comes at the end.
    #[error("this product's key comes only when all of it is here; fetch it without --only")]
    OnlyWithoutKey,
    /// More is named than the library can remember.
    #[error(
        "--only names too much: the library remembers {MOST_NAMED} bytes of names for a purchase, those of earlier fetches \
         included; name folders or patterns (--only 'art/*'), or fetch all of it without --only"
    )]
    TooManyNames,
    /// The manager does not give the key.
    #[error("everything is here, but the manager gives no key: {0}; {advice}", advice = key_advice(.0))]
    Key(ManagerError),
    /// The key that came is none.
    #[error("the key in the ticket cannot be opened with this home's key; ask the merchant for the ticket again")]
    BadKey,
    /// The bytes cannot be read.
    #[error(transparent)]
    Plain(PlainError),
    /// The files cannot be written.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// The files cannot be moved into their place.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The library failed.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The disk failed under the content.
    #[error(transparent)]
    Content(#[from] delivery::FileError),
    /// Stopped by the user.
    #[error("stopped; what was fetched is kept, fetch again to go on")]
    Cancelled,
}

/// What is to be done where a manager gives no key.
fn key_advice(error: &ManagerError) -> &'static str {
    match error {
        ManagerError::Refused(refusal) if refusal.code == RefusalCode::NotEntitled => {
            "it may have come back from a backup from before this purchase: ask the shop, which gives back what it holds for \
             a sale that is forgotten"
        }
        ManagerError::Refused(refusal) if refusal.code == RefusalCode::Revoked => {
            "ask the shop what became of the payment"
        }
        _ => "fetch again to go on",
    }
}

impl FetchError {
    /// The machine-readable cause that the library keeps.
    pub fn cause(&self) -> &'static str {
        match self {
            FetchError::ReadTicket { .. }
            | FetchError::TicketFile { .. }
            | FetchError::BadTicket(_)
            | FetchError::OtherSale(_) => "bad-ticket",
            FetchError::OtherClient { .. } => "wrong-client",
            FetchError::Clock(refusal) if clock(refusal).is_off() => "clock-off",
            FetchError::Clock(refusal) | FetchError::Revoked(refusal) => refusal_cause(refusal.code),
            FetchError::TheirClocks { .. } => "seeder-clocks-off",
            FetchError::Moved(_) => "moved",
            FetchError::ContentVoid(_) => "content-void",
            FetchError::Unknown(..) => "not-entitled",
            FetchError::Running { .. } => "running",
            FetchError::Start(_) | FetchError::Control(_) => "not-started",
            FetchError::Trust(TrustError::ManagerNeeded { .. }) => "manager-needed",
            FetchError::NoRoute => "network-unreachable",
            FetchError::Trust(_) => "bad-manager-signature",
            FetchError::Transfer(error) => transfer_cause(error),
            FetchError::LeaseOver { transfer, .. } if is_lease_over(transfer) => "ticket-expires",
            FetchError::LeaseOver { transfer, .. } => transfer_cause(transfer),
            FetchError::NotOpened { cause, .. } | FetchError::LeaseVoid { cause, .. } => cause,
            FetchError::NoSpace { .. } | FetchError::Unpack(UnpackError::DiskFull { .. }) => "disk-full",
            FetchError::OnlyWithoutKey => "only-without-key",
            FetchError::TooManyNames => "too-many-names",
            FetchError::Key(ManagerError::Refused(refusal)) => refusal.code.as_str(),
            FetchError::Key(_) => "manager-away",
            FetchError::BadKey | FetchError::Plain(PlainError::WrongKey) => "wrong-key",
            FetchError::Plain(_) | FetchError::Unpack(UnpackError::Plain(_)) => "bad-product",
            FetchError::Unpack(UnpackError::NoSuchFile { .. }) => "no-such-file",
            FetchError::Unpack(UnpackError::Stopped) | FetchError::Cancelled => "stopped",
            FetchError::Place(PlaceError::Exists { .. }) => "place-taken",
            FetchError::Unpack(UnpackError::File(_))
            | FetchError::Place(_)
            | FetchError::Library(_)
            | FetchError::File(_)
            | FetchError::Content(_) => "disk",
        }
    }
}

impl FetchError {
    /// How a transfer ended, and why the lease that it went by was not renewed, where it is over. That it is has to do with
    /// what seeders do, and with nothing else.
    pub(crate) fn ended(transfer: delivery::FetchError, not_renewed: Option<String>) -> FetchError {
        use delivery::FetchError as E;
        let for_seeders = matches!(transfer, E::NoSource { .. } | E::Refused { .. });
        match not_renewed.filter(|_| for_seeders) {
            Some(renewal) => FetchError::LeaseOver { transfer, renewal },
            None => FetchError::Transfer(transfer),
        }
    }

    fn not_opened(
        ticket::NotOpened { why, cause, .. }: ticket::NotOpened,
        transfer: delivery::FetchError,
    ) -> FetchError {
        FetchError::NotOpened { transfer, why, cause }
    }

    /// Every seeder that was tried, where the fetch ended for their sake.
    pub fn sources(&self) -> &[SourceReport] {
        match self {
            FetchError::Transfer(transfer)
            | FetchError::TheirClocks { transfer, .. }
            | FetchError::NotOpened { transfer, .. }
            | FetchError::LeaseOver { transfer, .. } => transfer.sources(),
            _ => &[],
        }
    }
}

/// With the manager and all seeders of a ticket away nobody is left to ask who else there is.
fn way_out(error: &delivery::FetchError) -> &'static str {
    match error {
        delivery::FetchError::NoSource { cause: StallCause::NoSeederLeft, .. } => {
            "; name a seeder that is up with --seeder"
        }
        _ => "",
    }
}

/// This machine's clock, as far as a refusal for time tells.
fn clock(refusal: &Refusal) -> ClockState {
    let for_time = matches!(refusal.code, RefusalCode::NotYetValid | RefusalCode::Expired) && refusal.now > 0;
    match for_time {
        true => ClockState::compare(now_ms(), refusal.now, DEFAULT_CLOCK_GRACE_MS),
        false => ClockState::Unknown,
    }
}

/// How far those clocks are off by this one for the sake of which a transfer ended.
fn clocks_of_seeders(error: &delivery::FetchError) -> Option<ClockState> {
    let ours = match error {
        delivery::FetchError::Refused { refusal, .. } => clock(refusal),
        delivery::FetchError::NoSource { cause: StallCause::ClockOff { off_by_ms }, .. } if *off_by_ms < 0 => {
            ClockState::Behind(off_by_ms.unsigned_abs())
        }
        delivery::FetchError::NoSource { cause: StallCause::ClockOff { off_by_ms }, .. } => {
            ClockState::Ahead(off_by_ms.unsigned_abs())
        }
        _ => ClockState::Unknown,
    };
    match ours {
        ClockState::Behind(ms) => Some(ClockState::Ahead(ms)),
        ClockState::Ahead(ms) => Some(ClockState::Behind(ms)),
        ClockState::Unknown | ClockState::Good => None,
    }
}

/// Does a seeder say so? Where none does, they would go on with it, and are away, busy or silent for other reasons.
fn is_lease_over(error: &delivery::FetchError) -> bool {
    let expired = |refusal: &Refusal| refusal.code == RefusalCode::Expired;
    error.sources().iter().any(|source| source.last_refusal.as_ref().is_some_and(expired))
}

/// A refusal's name; a ticket that is over has the one that it has while it is waited for.
fn refusal_cause(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::Expired => "ticket-expires",
        code => code.as_str(),
    }
}

fn transfer_cause(error: &delivery::FetchError) -> &'static str {
    use delivery::FetchError as E;
    match error {
        E::Refused { refusal, .. } if clock(refusal).is_off() => "clock-off",
        E::Refused { refusal, .. } => refusal_cause(refusal.code),
        E::Manifest(_) | E::Finish(_) => "bad-manifest",
        E::NoSource { cause, .. } => match cause {
            StallCause::NoSeederKnown => "no-seeder-known",
            StallCause::Connecting => "connecting",
            StallCause::AllRefused { code } => refusal_cause(*code),
            StallCause::TicketExpires => "ticket-expires",
            StallCause::ClockOff { .. } => "clock-off",
            StallCause::Overloaded => "overloaded",
            StallCause::NoSeederHolds { .. } => "no-seeder-holds",
            StallCause::Silent => "silent",
            StallCause::NetworkUnreachable => "network-unreachable",
            StallCause::RelayedOnly => "relayed-only",
            StallCause::WindowUsedUp => "window-used-up",
            StallCause::NoSeederLeft => "no-seeder-left",
            StallCause::DiskFull { .. } => "disk-full",
            StallCause::ManagerAway => "manager-away",
        },
        E::Create(delivery::CreateError::NoSpace(_)) | E::DiskFull { .. } => "disk-full",
        E::Create(_) | E::File(_) | E::Removed => "disk",
        E::Cancelled { .. } => "stopped",
    }
}

/// The part of a purchase that decides where and whether it may be fetched.
#[derive(Clone, Debug)]
struct Purchase {
    transaction: TransactionId,
    network: NetworkId,
    envelope: TicketEnvelope,
}

/// Fetches a purchase into the folder `out`, which is made if there is none: the product's own file or folder appears
/// in it in one step when everything is there and checked. Until then a hidden work folder beside holds what was
/// fetched, and the same call goes on from it after any interruption. Where an earlier delivery of the same purchase
/// lies, only what is missing or damaged of it is fetched and put in, and everything else there stays.
///
/// # Errors
/// [`FetchError`]; each says what to do, and nothing that was fetched is lost.
pub async fn fetch(
    home: &Home,
    target: Target,
    out: &Path,
    options: FetchOptions,
    progress: watch::Sender<FetchProgress>,
    cancel: CancellationToken,
) -> Result<FetchOutcome, FetchError> {
    Box::pin(run::run(home, target, out, options, progress, cancel)).await
}
