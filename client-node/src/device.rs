//! Purchases go to a new device: the key here signs that another peer is to have them. From then on tickets of this home
//! open nothing, and the new device finds its own in its mailbox.

use std::collections::BTreeSet;

use protocol::api::{MailboxRequest, MailboxResponse, TransactionState};
use protocol::entitlement::Move;
use protocol::trust::JoinLine;
use protocol::{NetworkId, PeerId, RefusalCode, Signed, TransactionId};

use crate::fetch::refuse;
use crate::home::{Home, blocking, now_ms};
use crate::inbox::{self, InboxError};
use crate::library::{self, DeliveryState, LibraryError, Trouble};
use crate::link::{Link, LinkOptions, ManagerError};
use crate::shop::printable;

/// Which purchases go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MoveChoice {
    /// Everything that the mailboxes of this home have, and what its library has and did not see go.
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
    /// Why it did not move, or is not known to have.
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
    /// By the library alone, and not because it was named.
    guessed: bool,
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
    // Who asked hears of each what became of it, also where the manager goes away on the way.
    let mut away = false;
    for candidate in candidates(home, link, network, choice).await? {
        let Candidate { transaction, title, generation, guessed } = candidate;
        let mut item = MoveItem { transaction, title, network: Some(network), generation: None, problem: None };
        if away {
            item.problem = Some("not asked for, because the manager went away; repeat the command".to_owned());
            items.push(item);
            continue;
        }
        let word = Move { network, transaction, to, generation: generation.saturating_add(1), at: now_ms() };
        let request = MailboxRequest::Move { word: Signed::sign(&word, home.keypair()) };
        match link.mailbox(&request).await {
            Ok(MailboxResponse::Moved { generation }) => {
                item.generation = Some(generation);
                tracing::info!(%transaction, %to, "purchase moved");
                if let Err(error) = note_moved(home, transaction, to).await {
                    item.problem = Some(format!("not noted here: {error}"));
                }
            }
            Ok(_) => item.problem = Some(ManagerError::Unfitting("a move").to_string()),
            // It was another's all the time.
            Err(ManagerError::Refused(said)) if guessed && said.code == RefusalCode::NotEntitled => continue,
            Err(error) => {
                away = matches!(error, ManagerError::Away { .. });
                let unknown =
                    if away { "; it may have moved all the same, which repeating the command tells" } else { "" };
                item.problem = Some(format!("{error}{unknown}"));
            }
        }
        items.push(item);
    }
    Ok(items)
}

/// What the mailbox has of the choice; and those that only the library knows: the answer to an earlier try may have been
/// lost.
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
    let mails = inbox::list(link).await?;
    let listed: BTreeSet<TransactionId> = mails.iter().map(|mail| mail.transaction).collect();
    let (library, all) = (home.library(), *choice == MoveChoice::All);
    let known = blocking(move || library.list()).await?.into_iter().filter(|(id, known)| {
        let here = known.envelope.join.network() == network && is_wanted(id);
        // A purchase that was named is asked for whatever became of it.
        here && !(all && (listed.contains(id) || known.state == DeliveryState::Refused))
    });
    let mut found: Vec<Candidate> = mails
        .into_iter()
        .filter(|mail| is_wanted(&mail.transaction) && !is_gone(mail.state))
        .map(|mail| Candidate {
            transaction: mail.transaction,
            title: printable(&mail.title, 200),
            generation: mail.generation,
            guessed: false,
        })
        .collect();
    for (transaction, known) in known {
        if found.iter().all(|candidate| candidate.transaction != transaction) {
            let (title, generation) = (printable(&known.envelope.title, 200), library::generation(&known.envelope));
            found.push(Candidate { transaction, title, generation, guessed: all });
        }
    }
    Ok(found)
}

async fn note_moved(home: &Home, transaction: TransactionId, to: PeerId) -> Result<(), LibraryError> {
    let detail = format!("this purchase was moved to {to}");
    refuse(home, transaction, Trouble { cause: "moved".to_owned(), detail, at: now_ms() }).await
}
