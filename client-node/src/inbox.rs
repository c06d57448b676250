//! Tickets wait for their client at the manager: gifts, and purchases made on another machine. The mailbox answers only
//! for the peer ID that the connection proves.

use protocol::api::{MailItem, MailboxRequest, MailboxResponse, TransactionState};
use protocol::ticket::{Admission, TicketEnvelope};
use protocol::trust::{JoinLine, RevocationState};
use protocol::{NetworkId, PeerId, TransactionId};

use crate::home::{FileError, Home, blocking, now_ms};
use crate::library::{self, LibraryError, Put};
use crate::link::{Link, LinkOptions, ManagerError, TrustError};
use crate::shop::printable;

/// Two networks, or a manager and whoever wrote a ticket, gave two sales one number.
pub(crate) const OTHER_SALE: &str = "another purchase of this number is in the library, and was checked";

/// Pages read from one mailbox: ten thousand purchases; older ones are reached by their transaction id.
const MAX_PAGES: usize = 100;

/// One line of an inbox.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct InboxItem {
    /// The network.
    pub network: NetworkId,
    /// Which.
    pub transaction: TransactionId,
    /// What was bought.
    pub title: String,
    /// Where it stands at the manager.
    pub state: TransactionState,
    /// When it was released, unix milliseconds.
    pub released_at: u64,
    /// Bytes of all files.
    pub plain_bytes: u64,
    /// It was not in the library before.
    pub new: bool,
    /// Why its ticket could not be had, if it could not.
    pub problem: Option<String>,
}

/// What an inbox holds.
#[derive(Debug, Default)]
pub struct Inbox {
    /// Newest first, network by network.
    pub items: Vec<InboxItem>,
    /// Networks that could not be asked.
    pub failed: Vec<(NetworkId, InboxError)>,
}

/// Why an inbox could not be read.
#[derive(Debug, thiserror::Error)]
pub enum InboxError {
    /// No network is known.
    #[error("this machine knows no network yet; give its join line, or fetch or buy something first")]
    NoNetwork,
    /// The node did not start.
    #[error(transparent)]
    Start(#[from] node::StartError),
    /// The manager did not do it.
    #[error(transparent)]
    Manager(#[from] ManagerError),
    /// The network's keys are not known.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The library failed.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// The home failed.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Reads the mailboxes of `join`'s network, or of all networks known, and puts every ticket into the library.
///
/// # Errors
/// [`InboxError`] when nothing could be asked at all; a network among several that fails is listed beside the others.
pub async fn inbox(home: &Home, join: Option<&JoinLine>, options: &LinkOptions) -> Result<Inbox, InboxError> {
    let joins = match join {
        Some(join) => vec![join.clone()],
        None => known_joins(home).await?,
    };
    if joins.is_empty() {
        return Err(InboxError::NoNetwork);
    }
    let mut inbox = Inbox::default();
    let alone = joins.len() == 1;
    for join in joins {
        match read_network(home, &join, options).await {
            Ok(items) => inbox.items.extend(items),
            Err(error) if alone => return Err(error),
            Err(error) => inbox.failed.push((join.network(), error)),
        }
    }
    Ok(inbox)
}

/// How to join every network of which this home has heard: those that it asked before, and those of tickets that came with
/// a purchase.
pub(crate) async fn known_joins(home: &Home) -> Result<Vec<JoinLine>, InboxError> {
    let (networks, library) = (home.networks(), home.library());
    blocking(move || {
        let mut joins = networks.list()?;
        for (_, delivery) in library.list()? {
            let join = delivery.envelope.join;
            if joins.iter().all(|known| known.network() != join.network()) {
                joins.push(join);
            }
        }
        Ok(joins)
    })
    .await
}

async fn read_network(home: &Home, join: &JoinLine, options: &LinkOptions) -> Result<Vec<InboxItem>, InboxError> {
    let link = Link::start(home, join, options.clone()).await?;
    let result = read_mailbox(home, &link, join.network()).await;
    link.stop().await;
    result
}

async fn read_mailbox(home: &Home, link: &Link, network: NetworkId) -> Result<Vec<InboxItem>, InboxError> {
    let (_, fresh) = link.trust().await?;
    if !fresh && let Err(error) = link.refresh().await {
        tracing::debug!(%error, "key set not refreshed");
    }
    let mut items = Vec::new();
    for mail in list(link).await? {
        items.push(take_mail(home, link, network, mail).await?);
    }
    Ok(items)
}

/// Everything in this peer's mailbox, newest first.
pub(crate) async fn list(link: &Link) -> Result<Vec<MailItem>, ManagerError> {
    let mut mails = Vec::new();
    let mut before = None;
    for _ in 0..MAX_PAGES {
        let MailboxResponse::List(mut page) = link.mailbox(&MailboxRequest::List { before }).await? else {
            return Err(ManagerError::Unfitting("a question for the mailbox"));
        };
        let whole = page.len() >= MailboxResponse::PAGE;
        let last = page.last().map(|mail| mail.transaction);
        page.truncate(MailboxResponse::PAGE);
        mails.append(&mut page);
        // A manager that repeats itself would keep this going.
        if !whole || last == before {
            break;
        }
        before = last;
    }
    Ok(mails)
}

async fn take_mail(home: &Home, link: &Link, network: NetworkId, mail: MailItem) -> Result<InboxItem, InboxError> {
    let MailItem { transaction, title, state, released_at, plain_bytes, generation } = mail;
    let title = printable(&title, 200);
    let mut item =
        InboxItem { network, transaction, title, state, released_at, plain_bytes, new: false, problem: None };
    let library = home.library();
    let known = blocking(move || library.get(&transaction)).await?;
    // A purchase that went to another device and came back: the ticket of before is void. And one that nobody checked may
    // be anybody's.
    if known.is_some_and(|known| known.checked && library::generation(&known.envelope) >= generation) {
        return Ok(item);
    }
    match ask_ticket(link, transaction, network, home.peer_id()).await {
        Ok(envelope) => {
            let (library, checked) = (home.library(), is_good(&envelope, home.peer_id(), link));
            match blocking(move || library.put_ticket(transaction, &envelope, checked, now_ms())).await? {
                Put::Other => item.problem = Some(OTHER_SALE.to_owned()),
                put => {
                    item.new = put == Put::New;
                    tracing::info!(step = 8, %transaction, "ticket received from the mailbox");
                }
            }
        }
        // Revoked and refunded ones have none: the list still shows them.
        Err(TicketError::Manager(error @ ManagerError::Refused(_))) => item.problem = Some(error.to_string()),
        Err(TicketError::Manager(error)) => return Err(error.into()),
        Err(TicketError::Other(why)) => item.problem = Some(why.to_owned()),
    }
    Ok(item)
}

/// Does it pass the checks that need nothing but the network's keys?
fn is_good(envelope: &TicketEnvelope, client: PeerId, link: &Link) -> bool {
    let Some(trust) = link.known_trust() else { return false };
    let (now, revoked) = (now_ms(), RevocationState::default());
    let admission = Admission {
        peer: client,
        seeder: client,
        trust: &trust,
        revoked: &revoked,
        informed: Some(now),
        continuation_ms: 0,
        now,
    };
    envelope.ticket.check(&admission).is_ok()
}

/// Why the manager gave no usable ticket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TicketError {
    #[error(transparent)]
    Manager(#[from] ManagerError),
    #[error("the manager sent a ticket that is not the one asked for: {0}")]
    Other(&'static str),
}

/// A ticket with a lease that is good now.
pub(crate) async fn ask_ticket(
    link: &Link,
    transaction: TransactionId,
    network: NetworkId,
    client: PeerId,
) -> Result<TicketEnvelope, TicketError> {
    ask_ticket_instead(link, transaction, network, client, None).await
}

/// The same, `instead_of` a delivery that cannot go on.
pub(crate) async fn ask_ticket_instead(
    link: &Link,
    transaction: TransactionId,
    network: NetworkId,
    client: PeerId,
    instead_of: Option<u32>,
) -> Result<TicketEnvelope, TicketError> {
    let request = MailboxRequest::Ticket { transaction, instead_of };
    let MailboxResponse::Ticket(envelope) = link.mailbox(&request).await? else {
        return Err(ManagerError::Unfitting("a question for a ticket").into());
    };
    let (Ok(data), Ok(lease)) = (envelope.ticket.data.peek(), envelope.ticket.lease.peek()) else {
        return Err(TicketError::Other("it cannot be read"));
    };
    if data.transaction != transaction || data.network != network || envelope.join.network() != network {
        return Err(TicketError::Other("another transaction or network"));
    }
    if lease.client != client {
        return Err(TicketError::Other("it is for another client"));
    }
    Ok(*envelope)
}
