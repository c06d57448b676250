//! A seeder is paid by what this client acknowledged to it. One that was away when a delivery ended (killed, restarting,
//! cut off) is remembered, and given its acknowledgement during the fetches that follow.

use std::sync::Arc;
use std::time::Duration;

use delivery::{FetchLimits, SettleJob};
use futures::StreamExt;
use node::DirLock;
use protocol::deliver::Credential;
use protocol::receipt::{Completion, DeliveryId};
use protocol::ticket::{Lease, Ticket, TransactionData};
use protocol::trust::{RevocationState, Trust};
use protocol::{NetworkId, PeerAddrs, Refusal, Signed, TransactionId};
use rand::seq::SliceRandom;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use super::acks::AckFiles;
use super::ticket::Checked;
use super::{FetchOptions, Purchase};
use crate::home::{Home, blocking, now_ms};
use crate::library::{Debt, LibraryError};
use crate::link::Link;

/// Deliveries looked at in one run; the next run sees others, if there are more.
const AT_ONCE: usize = 32;
/// So many of them at the same time.
const SIDE_BY_SIDE: usize = 4;
/// Seeders take an acknowledgement for two days past the lease unless configured otherwise; a week later none does.
const GIVE_UP_MS: u64 = 9 * 24 * 3600 * 1000;

/// For all of them together, however long the fetch beside takes.
const LIMIT: Duration = Duration::from_secs(10);
/// A fetch that is over sooner waits so long for it: who is there has heard of it by then, and whoever is gone for good would
/// otherwise hold up every fetch of a week.
const AFTERWARDS: Duration = Duration::from_secs(2);
/// And so long where there is nothing to fetch.
const ALONE: Duration = Duration::from_secs(2);

/// Notes which seeders of a delivery that ended could not be told.
pub(super) async fn note(
    home: &Home,
    checked: &Checked,
    delivery: DeliveryId,
    completion: Option<Signed<Completion>>,
    mut seeders: Vec<PeerAddrs>,
) -> Result<(), LibraryError> {
    seeders.truncate(Debt::MOST);
    let ticket = checked.purchase.envelope.ticket.clone();
    let debt = (!seeders.is_empty()).then_some(Debt { ticket, completion, seeders });
    let library = home.library();
    blocking(move || library.set_debt(delivery, debt)).await
}

/// Seeders that are owed something of this delivery: worth asking for the rest of it.
pub(super) async fn owed(home: &Home, delivery: DeliveryId) -> Result<Vec<PeerAddrs>, LibraryError> {
    let library = home.library();
    Ok(blocking(move || library.debt(delivery)).await?.map(|debt| debt.seeders).unwrap_or_default())
}

/// Deliveries of which something is owed in a network.
async fn owed_in(home: &Home, network: NetworkId) -> Result<Vec<DeliveryId>, LibraryError> {
    let library = home.library();
    let ours = move |debt: &Debt| terms(debt).is_ok_and(|(data, _)| data.network == network);
    blocking(move || library.owed(ours)).await
}

/// Pays what is owed in the network of `link`, but for purchases that are being fetched: their own fetches do that, and a
/// second stream would end the first. `own` is the one whose lock this fetch holds; it is paid for where nothing of it is
/// fetched, and is `idle`. Failing is no matter of the fetch that it runs beside: the next one tries again.
pub(super) async fn pay(home: &Home, link: &Link, own: TransactionId, idle: bool) {
    let mut debts = match owed_in(home, link.network()).await {
        Ok(debts) => debts,
        Err(error) => return tracing::warn!(%error, "what seeders are owed is not known"),
    };
    // In another order each time: those whose seeders are gone for good keep no others from their turn.
    debts.shuffle(&mut rand::rng());
    let known = &Known::new();
    let paying = debts.into_iter().take(AT_ONCE).map(|delivery| async move {
        if is_busy(home, delivery.transaction, own, idle).await {
            return;
        }
        if let Err(error) = pay_one(home, link, known, delivery).await {
            tracing::warn!(transaction = %delivery.transaction, %error, "what seeders are owed stays owed");
        }
    });
    let paying = futures::stream::iter(paying).buffer_unordered(SIDE_BY_SIDE).collect::<()>();
    let _ = tokio::time::timeout(LIMIT, paying).await;
}

/// Is it being fetched, here or by another process?
async fn is_busy(home: &Home, transaction: TransactionId, own: TransactionId, idle: bool) -> bool {
    if transaction == own {
        return !idle;
    }
    let dir = home.delivery_dir(&transaction);
    // Only looked at: who comes to fetch it now is not to be told that somebody does.
    blocking(move || DirLock::is_held(&dir)).await
}

/// Pays beside a fetch, and for a moment after it is over.
pub(super) async fn beside(paying: impl Future<Output = ()>, over: impl Future<Output = ()>) {
    beside_for(paying, over, AFTERWARDS).await;
}

async fn beside_for(paying: impl Future<Output = ()>, over: impl Future<Output = ()>, moment: Duration) {
    let afterwards = async {
        over.await;
        tokio::time::sleep(moment).await;
    };
    tokio::select! {
        () = paying => {}
        () = afterwards => {}
    }
}

#[derive(Debug, thiserror::Error)]
enum PayError {
    #[error(transparent)]
    Library(#[from] LibraryError),
    #[error(transparent)]
    Trust(#[from] crate::link::TrustError),
    #[error(transparent)]
    File(#[from] crate::home::FileError),
    #[error("its ticket cannot be read: {0}")]
    Ticket(#[from] Refusal),
}

/// What is remembered of the network, read once for all debts.
type Known = OnceCell<(Arc<Trust>, Arc<RevocationState>)>;

async fn pay_one(home: &Home, link: &Link, known: &Known, delivery: DeliveryId) -> Result<(), PayError> {
    let library = home.library();
    let Some(debt) = blocking(move || library.debt(delivery)).await? else { return Ok(()) };
    let debt = Debt { ticket: newest(home, delivery, &debt).await?, ..debt };
    let (data, lease) = terms(&debt)?;
    let reading = async {
        let (trust, _) = link.trust().await?;
        let revoked = link.revocations(&trust).await?;
        Ok::<_, PayError>((trust, Arc::new(revoked)))
    };
    let (trust, revoked) = known.get_or_try_init(|| reading).await?;
    let owed = match now_ms() > lease.end.saturating_add(GIVE_UP_MS) {
        true => Vec::new(),
        false => {
            let acks = AckFiles::of(home, delivery);
            let job = SettleJob {
                connect: Arc::new(link.node().clone()),
                manifest: data.manifest,
                credential: Credential::Ticket(Box::new(debt.ticket.clone())),
                delivery,
                keypair: home.keypair().clone(),
                seeders: debt.seeders.clone(),
                revoked: Arc::clone(revoked),
                trust: Arc::clone(trust),
                acks: Arc::new(acks),
                completion: debt.completion.clone(),
                limits: FetchLimits::default(),
            };
            delivery::settle(job).await
        }
    };
    if owed.len() < debt.seeders.len() {
        let debt = (!owed.is_empty()).then_some(Debt { seeders: owed, ..debt });
        let library = home.library();
        blocking(move || library.set_debt(delivery, debt)).await?;
    }
    Ok(())
}

/// The ticket by which it is settled: that of the debt, or a later one of the same delivery, because the key that signed
/// the first may be one that the network gave up since.
async fn newest(home: &Home, delivery: DeliveryId, debt: &Debt) -> Result<Ticket, LibraryError> {
    let library = home.library();
    let known = blocking(move || library.get(&delivery.transaction)).await?;
    let known = known.filter(|known| known.checked).map(|known| known.envelope.ticket);
    let lease = |ticket: &Ticket| ticket.lease.peek().ok();
    let later = known.filter(|known| match (lease(known), lease(&debt.ticket)) {
        (Some(known), Some(old)) => known.delivery == delivery.delivery && known.issued_at > old.issued_at,
        _ => false,
    });
    Ok(later.unwrap_or_else(|| debt.ticket.clone()))
}

fn terms(debt: &Debt) -> Result<(TransactionData, Lease), Refusal> {
    Ok((debt.ticket.data.peek()?, debt.ticket.lease.peek()?))
}

/// Pays what is owed in the network of a purchase that needs no fetching: then nobody else connects to it.
pub(super) async fn pay_alone(home: &Home, purchase: &Purchase, options: &FetchOptions, cancel: &CancellationToken) {
    if !owed_in(home, purchase.network).await.is_ok_and(|debts| !debts.is_empty()) {
        return;
    }
    match Link::start(home, &purchase.envelope.join, options.link.clone()).await {
        Ok(link) => {
            // Its node is to end in any case.
            tokio::select! {
                _ = tokio::time::timeout(ALONE, pay(home, &link, purchase.transaction, true)) => {}
                () = cancel.cancelled() => {}
            }
            link.stop().await;
        }
        Err(error) => tracing::warn!(%error, "what seeders are owed stays owed"),
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn whoever_is_gone_holds_up_no_fetch_that_is_over() {
        assert_eq!(beside_for(pending(), pending(), Duration::ZERO).now_or_never(), None, "the fetch goes on");
        beside_for(pending(), ready(()), Duration::from_millis(1)).await;
        // Nobody waits when all is paid.
        assert_eq!(beside(ready(()), pending()).now_or_never(), Some(()));
    }
}
