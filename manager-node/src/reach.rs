//! Whether a seeder can be reached is something that it cannot find out alone: here a stranger tries for it, by a key that
//! nobody has seen and without any connection that is there already.

use std::time::Duration;

use node::{Node, NodeConfig, Protocol, Supervisor};
use protocol::{Address, Keypair, PeerAddrs, PeerId, Refusal, RefusalCode};
use rand::RngExt;
use tokio::sync::Semaphore;

use crate::context::Context;
use crate::enrol::Refused;

/// Seeders being dialled at once; further ones come back later. It costs up to [`TRIED`] handshakes each.
static TURNS: Semaphore = Semaphore::const_new(4);
/// Addresses of one seeder that are tried.
const TRIED: usize = 8;
/// All at once, and well within the time that a seeder waits for the answer.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
const DELIVER: Protocol = Protocol::new(protocol::deliver::PROTOCOL);

/// Dials the addresses that `peer` reported last; each with why nobody answered there.
pub(crate) async fn dial_back(ctx: &Context, peer: PeerId) -> Result<Vec<(Address, Option<String>)>, Refusal> {
    let busy = || Refusal::new(RefusalCode::Overloaded, "too many seeders are being dialled").retry_after(10_000);
    let _turn = TURNS.try_acquire().map_err(|_| busy())?;
    let addresses = ctx.registry.addresses(&peer).map_err(Refused::from)?.addrs;
    let tries = addresses.into_iter().take(TRIED).map(|address| async move {
        let why = try_one(peer, address.clone()).await.err().map(|why| shortened(&why));
        (address, why)
    });
    Ok(futures::future::join_all(tries).await)
}

async fn try_one(peer: PeerId, address: Address) -> Result<(), String> {
    let supervisor = Supervisor::new();
    let config = NodeConfig {
        gossip: false,
        connection_timeout: DIAL_TIMEOUT,
        ..NodeConfig::new(Keypair::from_seed(&rand::rng().random()))
    };
    let result = match Box::pin(Node::start(config, &supervisor)).await {
        Ok(node) => {
            let target = PeerAddrs::new(peer, vec![address]);
            node.open(&target, DELIVER, DIAL_TIMEOUT).await.map(drop).map_err(|error| error.to_string())
        }
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = supervisor.shutdown(STOP_TIMEOUT).await {
        tracing::debug!(%error, "a dialling node did not stop in time");
    }
    result
}

fn shortened(why: &str) -> String {
    why.chars().take(Refusal::MAX_DETAIL / 4).collect()
}
