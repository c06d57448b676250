//! What this client can show of a purchase: the ticket, and what it signed itself. It needs nobody, the manager and the
//! shop may be gone, but where the ticket's key was given up: then a newer lease, which the manager signs, vouches for it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use protocol::codec::{self, Wire};
use protocol::evidence::{EvidencePack, Exporter};
use protocol::receipt::Ack;
use protocol::trust::JoinLine;
use protocol::{Signed, TransactionId};

use crate::home::{FileError, Home, now_ms, read_file};
use crate::inbox::ask_ticket;
use crate::library::LibraryError;
use crate::link::{Link, LinkOptions};

/// How long the manager has to answer, keys and lease together: what is here is written in any case.
const ASK: Duration = Duration::from_secs(20);

/// Why there is no evidence.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// The library.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Never bought or fetched here.
    #[error("this client's library has no purchase {0}; `willcall status` lists what it has")]
    Unknown(TransactionId),
    /// A thread.
    #[error("the evidence was not put together: {0}")]
    Thread(String),
}

/// What was put together.
#[derive(Debug)]
pub struct Gathered {
    /// For the file.
    pub pack: EvidencePack,
    /// The ticket here proves nothing under the network's keys, and why no newer lease vouches for it.
    pub not_renewed: Option<String>,
}

/// Puts together what is here of one purchase, with a newer lease from the manager where the ticket here proves nothing any
/// more.
///
/// # Errors
/// [`EvidenceError`].
pub async fn evidence(
    home: &Home,
    transaction: TransactionId,
    options: &LinkOptions,
) -> Result<Gathered, EvidenceError> {
    let from = home.clone();
    let work = tokio::task::spawn_blocking(move || gather(&from, transaction));
    let (pack, join) = work.await.map_err(|error| EvidenceError::Thread(error.to_string()))??;
    // Without the network's keys it proves nothing to anybody: a home that has fetched nothing yet has none.
    if pack.verify(&join.root).facts.released {
        return Ok(Gathered { pack, not_renewed: None });
    }
    Ok(match renewed(home, transaction, &pack, &join, options).await {
        Ok(pack) => Gathered { pack, not_renewed: None },
        Err(why) => Gathered { pack, not_renewed: Some(why) },
    })
}

/// The same with the lease that the manager gives now, in place of one that holds no more, if that proves the sale.
async fn renewed(
    home: &Home,
    transaction: TransactionId,
    pack: &EvidencePack,
    join: &JoinLine,
    options: &LinkOptions,
) -> Result<EvidencePack, String> {
    let link = Link::start(home, join, options.clone()).await.map_err(|error| error.to_string())?;
    let mut newer = pack.clone();
    let asking = async {
        let trust = link.refresh().await.map_err(|error| error.to_string())?;
        newer.key_sets = vec![trust.signed_key_set().clone()];
        if newer.verify(&join.root).facts.released {
            return Ok::<_, String>(None);
        }
        let envelope = ask_ticket(&link, transaction, join.network(), home.peer_id()).await;
        Ok(Some(envelope.map_err(|error| error.to_string())?))
    };
    let asked = tokio::time::timeout(ASK, asking).await;
    link.stop().await;
    let Some(envelope) = asked.map_err(|_| "the manager did not answer in time".to_owned())?? else { return Ok(newer) };
    newer.leases = vec![envelope.ticket.lease];
    match newer.verify(&join.root).facts.released {
        true => Ok(newer),
        false => Err("the lease that the manager gives does not hold for this sale".to_owned()),
    }
}

fn gather(home: &Home, transaction: TransactionId) -> Result<(EvidencePack, JoinLine), EvidenceError> {
    let delivery = home.library().get(&transaction)?.ok_or(EvidenceError::Unknown(transaction))?;
    let ticket = &delivery.envelope.ticket;
    let mut pack = EvidencePack::new(Exporter::Client, now_ms(), ticket.data.clone());
    pack.endorsement.clone_from(&ticket.endorsement);
    pack.leases.push(ticket.lease.clone());
    pack.manifest.clone_from(&delivery.manifest);
    pack.completions.extend(delivery.completion.clone());
    if let Some(trust) = home.networks().trust(&delivery.envelope.join, 0)? {
        pack.key_sets.push(trust.signed_key_set().clone());
    }
    for ack in acks(&home.delivery_dir(&transaction)) {
        pack.add_ack(ack);
    }
    Ok((pack, delivery.envelope.join))
}

/// The acknowledgements of every download, as far as they can still be read: what is lost proves nothing less of the rest.
fn acks(dir: &Path) -> Vec<Signed<Ack>> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let folders = entries(dir).filter(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("acks-")) && path.is_dir()
    });
    let mut files: Vec<_> = folders.flat_map(|folder| entries(&folder).collect::<Vec<_>>()).collect();
    files.sort();
    let read = |path| read_file(path, <Signed<Ack>>::MAX).ok().flatten();
    files.iter().filter_map(|path| read(path)).filter_map(|bytes| codec::decode(&bytes).ok()).collect()
}
