//! Where seeders are looked for while a transfer goes on.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use delivery::MoreSources;
use futures::FutureExt;
use futures::future::Either;
use protocol::api::provider_key;
use protocol::{PeerAddrs, PeerId, RefusalCode};
use rand::seq::SliceRandom;

use super::run::Run;
use super::ticket::Checked;
use crate::inbox::{TicketError, ask_ticket};
use crate::link::ManagerError;

/// Seeders taken from one question to the DHT.
const PROVIDERS: usize = 32;
/// Peers of the local network that are asked.
const LAN_PEERS: usize = 8;
const DHT_TIMEOUT: Duration = Duration::from_secs(8);
/// For the manager's sources when the DHT has found some: a manager that is away takes its time to be given up.
const MANAGER_LATER: Duration = Duration::from_millis(200);
/// For the DHT when the manager has answered, which is one question, while a search takes several, some of them to peers
/// that are gone. The sources that a fetch begins with are not held up by it.
const DHT_LATER: Duration = Duration::from_secs(2);

impl Run<'_> {
    /// Whoever says in the DHT to have it, the sources that the manager knows by now, and peers of the local network, who
    /// may or may not have it. Should the manager say that the purchase was taken back, that is kept.
    pub(super) fn more_sources(&self, checked: &Checked) -> MoreSources {
        let (link, home) = (self.link.clone(), self.home.clone());
        let (transaction, network) = (self.transaction, checked.purchase.network);
        let key = *provider_key(&network, &checked.manifest).as_bytes();
        let (taken_back, generation) = (Arc::clone(&self.taken_back), checked.lease.generation);
        Arc::new(move || {
            let (link, home, taken_back) = (link.clone(), home.clone(), Arc::clone(&taken_back));
            async move {
                let providers =
                    async { link.node().find_first_providers(key, PROVIDERS, DHT_TIMEOUT).await.unwrap_or_default() };
                let ticket = async {
                    match ask_ticket(&link, transaction, network, home.peer_id()).await {
                        Ok(envelope) => envelope.sources,
                        // After moves a manager that came back from a backup says so of a lease that is good.
                        Err(TicketError::Manager(ManagerError::Refused(said)))
                            if said.code == RefusalCode::Revoked && generation == 0 =>
                        {
                            *taken_back.lock().unwrap_or_else(PoisonError::into_inner) = Some(said);
                            Vec::new()
                        }
                        Err(_) => Vec::new(),
                    }
                };
                let mut found = either_or_both((ticket, DHT_LATER), (providers, MANAGER_LATER)).await;
                let mut near = link.node().lan_peers().await.unwrap_or_default();
                // Others at each search, where there are more: none of them keeps another one out.
                near.shuffle(&mut rand::rng());
                found.extend(near.into_iter().take(LAN_PEERS));
                found
            }
            .boxed()
        })
    }
}

/// What both find, or what one does and the other has not found for as long as is said beside the one.
async fn either_or_both(
    (one, then_other): (impl Future<Output = Vec<PeerAddrs>>, Duration),
    (other, then_one): (impl Future<Output = Vec<PeerAddrs>>, Duration),
) -> Vec<PeerAddrs> {
    let (one, other) = (std::pin::pin!(one), std::pin::pin!(other));
    let (mut found, later, limit) = match futures::future::select(one, other).await {
        Either::Left((found, later)) => (found, later.left_future(), then_other),
        Either::Right((found, later)) => (found, later.right_future(), then_one),
    };
    if found.is_empty() {
        return later.await;
    }
    found.extend(tokio::time::timeout(limit, later).await.unwrap_or_default());
    found
}

/// Those that the user named first: whoever names one means it, and places are taken in this order. Then those of the lease,
/// in the order that is the manager's preference, and others that came with the ticket.
pub(super) fn known_sources(named: &[PeerAddrs], lease: &[PeerId], with_ticket: &[PeerAddrs]) -> Vec<PeerAddrs> {
    let known = |peer: &PeerId| with_ticket.iter().find(|source| source.peer == *peer);
    let listed = lease.iter().map(|peer| known(peer).cloned().unwrap_or_else(|| PeerAddrs::from(*peer)));
    let others = with_ticket.iter().filter(|source| !lease.contains(&source.peer));
    named.iter().cloned().chain(listed).chain(others.cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_the_user_names_is_asked_first_and_the_ticket_says_where_else_it_is() {
        let [a, b, c, d] = [1, 2, 3, 4].map(|n| PeerAddrs::from(PeerId::from_bytes([n; 32])));
        let at = |address: &str| PeerAddrs { addrs: address.parse().into_iter().collect(), ..c.clone() };
        let (here, there) = (at("/ip4/192.0.2.1/tcp/1"), at("/ip4/192.0.2.2/tcp/1"));
        assert_ne!(here, there);
        let known = known_sources(&[d.clone(), here.clone()], &[b.peer, c.peer], &[a.clone(), there.clone()]);
        assert_eq!(known, [d, here, b, there, a]);
    }

    #[tokio::test]
    async fn who_is_found_is_not_kept_waiting_for_a_manager_that_is_away() {
        let found = |n: u8| std::future::ready(vec![PeerAddrs::from(PeerId::from_bytes([n; 32]))]);
        let (none, never) = (|| std::future::ready(Vec::new()), std::future::pending::<Vec<PeerAddrs>>);
        const SOON: Duration = Duration::from_millis(10);
        assert_eq!(either_or_both((found(1), SOON), (never(), SOON)).await, found(1).await);
        assert_eq!(either_or_both((never(), SOON), (found(2), SOON)).await, found(2).await);
        assert_eq!(either_or_both((none(), SOON), (found(2), SOON)).await, found(2).await);
        assert_eq!(either_or_both((found(1), SOON), (none(), SOON)).await, found(1).await);
        assert_eq!(either_or_both((found(1), SOON), (found(2), SOON)).await.len(), 2);
        assert_eq!(either_or_both((none(), SOON), (none(), SOON)).await, []);
    }

    #[tokio::test]
    async fn a_manager_that_answers_first_does_not_throw_away_what_the_dht_finds() {
        let found = |n: u8| vec![PeerAddrs::from(PeerId::from_bytes([n; 32]))];
        // A search that hears of somebody a moment after the manager's answer, and then waits whether there is more.
        let search = async {
            tokio::time::sleep(2 * MANAGER_LATER).await;
            found(2)
        };
        let both = either_or_both((std::future::ready(found(1)), DHT_LATER), (search, MANAGER_LATER)).await;
        assert_eq!(both, [found(1), found(2)].concat());
    }
}
