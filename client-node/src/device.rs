//! Purchases go to a new device: the key here signs that another peer is to have them. From then on tickets of this home
//! open nothing, and the new device finds its own in its mailbox.

use std::collections::BTreeSet;

use protocol::api::{MailboxRequest, MailboxResponse, TransactionState};
use protocol::entitlement::Move;
use protocol::trust::JoinLine;
use protocol::{NetworkId, PeerId, Signed, TransactionId};

use crate::fetch::refuse;
use crate::home::{Home, blocking, now_ms};
use crate::inbox::{self, InboxError};
use crate::library::{self, LibraryError, Trouble};
use crate::link::{Link, LinkOptions, ManagerError};
use crate::shop::printable;

/// Which purchases go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MoveChoice {
    /// Everything that the mailboxes of this home have.
    All,
    /// These.
    Some(BTreeSet<TransactionId>),
}

/// One purchase and what became of it.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MoveItem {
    /// Which.
    pub transaction: TransactionId,
    /// What was bought, where that is known.
    pub title: String,
    /// The network; absent where no network has this purchase.
    pub network: Option<NetworkId>,
    /// The generation that began, where it moved.
    pub generation: Option<u32>,
    /// Why it did not move.
    pub problem: Option<String>,
}

/// What moved.
#[derive(Debug, Default)]
pub struct Moves {
    /// Each purchase.
    pub items: Vec<MoveItem>,
    /// Networks that could not be asked.
    pub failed: Vec<(NetworkId, InboxError)>,
}

/// A purchase that is to go, and the generation that it is in.
struct Candidate {
    transaction: TransactionId,
    title: String,
    generation: u32,
}

/// Moves purchases of this home to the peer `to`, in the network of `join` or in all that are known. Doing it again is
/// harmless: what moved before is answered as it was.
///
/// # Errors
/// [`InboxError`] when nothing could be asked at all; what fails for one purchase or network stands beside the others.
pub async fn move_purchases(
    home: &Home,
    to: PeerId,
    choice: &MoveChoice,
    join: Option<&JoinLine>,
    options: &LinkOptions,
) -> Result<Moves, InboxError> {
    let joins = match join {
        Some(join) => vec![join.clone()],
        None => inbox::known_joins(home).await?,
    };
    if joins.is_empty() {
        return Err(InboxError::NoNetwork);
    }
    let mut moves = Moves::default();
    let alone = joins.len() == 1;
    for join in joins {
        let link = Link::start(home, &join, options.clone()).await?;
        let moved = move_in(home, &link, join.network(), to, choice).await;
        link.stop().await;
        match moved {
            Ok(items) => moves.items.extend(items),
            Err(error) if alone => return Err(error),
            Err(error) => moves.failed.push((join.network(), error)),
        }
    }
    if let MoveChoice::Some(wanted) = choice {
        let found: BTreeSet<TransactionId> = moves.items.iter().map(|item| item.transaction).collect();
        moves.items.extend(wanted.difference(&found).map(|transaction| MoveItem {
            transaction: *transaction,
            title: String::new(),
            network: None,
            generation: None,
            problem: Some("no network that was asked has this purchase for this client".to_owned()),
        }));
    }
    Ok(moves)
}

async fn move_in(
    home: &Home,
    link: &Link,
    network: NetworkId,
    to: PeerId,
    choice: &MoveChoice,
) -> Result<Vec<MoveItem>, InboxError> {
    link.trust().await?;
    let mut items = Vec::new();
    for candidate in candidates(home, link, network, choice).await? {
        let word = Move {
            network,
            transaction: candidate.transaction,
            to,
            generation: candidate.generation.saturating_add(1),
            at: now_ms(),
        };
        let request = MailboxRequest::Move { word: Signed::sign(&word, home.keypair()) };
        let (generation, problem) = match link.mailbox(&request).await {
            Ok(MailboxResponse::Moved { generation }) => (Some(generation), None),
            Ok(_) => return Err(ManagerError::Unfitting("a move").into()),
            Err(error @ ManagerError::Refused(_)) => (None, Some(error.to_string())),
            Err(error) => return Err(error.into()),
        };
        if generation.is_some() {
            note_moved(home, candidate.transaction, to).await?;
            tracing::info!(transaction = %candidate.transaction, %to, "purchase moved");
        }
        let Candidate { transaction, title, .. } = candidate;
        items.push(MoveItem { transaction, title, network: Some(network), generation, problem });
    }
    Ok(items)
}

/// What the mailbox has of the choice; and, of purchases that were named, those that only the library knows: the answer
/// to an earlier try may have been lost.
async fn candidates(
    home: &Home,
    link: &Link,
    network: NetworkId,
    choice: &MoveChoice,
) -> Result<Vec<Candidate>, InboxError> {
    let is_wanted = |id: &TransactionId| match choice {
        MoveChoice::All => true,
        MoveChoice::Some(wanted) => wanted.contains(id),
    };
    let is_gone = |state| matches!(state, TransactionState::Refunded | TransactionState::Revoked);
    let mut found: Vec<Candidate> = inbox::list(link)
        .await?
        .into_iter()
        .filter(|mail| is_wanted(&mail.transaction) && !is_gone(mail.state))
        .map(|mail| Candidate {
            transaction: mail.transaction,
            title: printable(&mail.title, 200),
            generation: mail.generation,
        })
        .collect();
    let MoveChoice::Some(wanted) = choice else { return Ok(found) };
    for transaction in wanted.iter().copied() {
        if found.iter().any(|candidate| candidate.transaction == transaction) {
            continue;
        }
        let library = home.library();
        let known = blocking(move || library.get(&transaction)).await?;
        if let Some(known) = known.filter(|known| known.envelope.join.network() == network) {
            let title = printable(&known.envelope.title, 200);
            found.push(Candidate { transaction, title, generation: library::generation(&known.envelope) });
        }
    }
    Ok(found)
}

async fn note_moved(home: &Home, transaction: TransactionId, to: PeerId) -> Result<(), LibraryError> {
    let detail = format!("this purchase was moved to {to}");
    refuse(home, transaction, Trouble { cause: "moved".to_owned(), detail, at: now_ms() }).await
}
