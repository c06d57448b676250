//! What seeders are owed of one purchase is paid beside the fetch of another.

use node::DirLock;
use protocol::NetworkId;
use protocol::manifest::KeyPolicy;
use protocol::receipt::DeliveryId;
use protocol::ticket::TicketEnvelope;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fetching::{Client, LIMIT, net, options};
use super::network::Vice;
use super::world::{Sale, World, keypair};
use crate::fetch::{FetchPhase, FetchProgress, Target, fetch};
use crate::library::Debt;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_paid_for_a_purchase_that_another_process_fetches() {
    let net = net(KeyPolicy::AtRelease, &[Vice::Mute]).await;
    let client = Client::new();
    let (progress, mut seen) = watch::channel(FetchProgress::default());
    let mut patient = options();
    patient.limits.finish_timeout = 2 * LIMIT;
    let (out, target) = (client.out(), Target::Envelope(Box::new(net.ticket(client.home.peer_id()))));
    let run = fetch(&client.home, target, &out, patient, progress, CancellationToken::new());
    let first = async {
        tokio::select! {
            ended = run => panic!("the seeder heard nothing yet: {ended:?}"),
            placed = seen.wait_for(|progress| progress.phase == FetchPhase::Done) => drop(placed.unwrap()),
        }
    };
    tokio::time::timeout(LIMIT, first).await.expect("the goods waited");
    let owed = || client.home.library().debts(8).unwrap().len();
    assert_eq!(owed(), 1);

    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    let sale = Sale { transaction: Sale::new(vec![], vec![]).transaction, ..net.sale.clone() };
    let other = net.world.ticket(&net.product, client.home.peer_id(), &sale);
    let elsewhere = client.out().join("elsewhere");
    let fetch_other = async || {
        let (progress, target) =
            (watch::Sender::new(FetchProgress::default()), Target::Envelope(Box::new(other.clone())));
        let run = fetch(&client.home, target, &elsewhere, options(), progress, CancellationToken::new());
        tokio::time::timeout(LIMIT, run).await.expect("it hangs").unwrap();
    };
    let lock = DirLock::acquire_looked_at(&client.home.delivery_dir(&net.sale.transaction)).unwrap();
    fetch_other().await;
    assert_eq!(owed(), 1, "its own fetch pays");
    drop(lock);
    fetch_other().await;
    assert_eq!(owed(), 0);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn newer_debts_of_another_network_hide_none() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    client.fetch(&ticket).await.unwrap();
    let library = client.home.library();
    let owe = |transaction, ticket: &TicketEnvelope| {
        let id = DeliveryId { transaction, delivery: 1 };
        let seeders = net.sale.sources.clone();
        library.set_debt(id, Some(Debt { ticket: ticket.ticket.clone(), completion: None, seeders })).unwrap();
        id
    };
    let ours = owe(net.sale.transaction, &ticket);
    let elsewhere = World { network: NetworkId::of_root(&keypair(99).peer_id()), ..World::new() };
    for _ in 0..40 {
        let sale = Sale { transaction: Sale::new(vec![], vec![]).transaction, ..net.sale.clone() };
        owe(sale.transaction, &elsewhere.ticket(&net.product, client.home.peer_id(), &sale));
    }
    assert!(library.debt(ours).unwrap().is_some());
    assert!(client.fetch(&ticket).await.unwrap().already_here);
    assert_eq!(library.debt(ours).unwrap(), None, "it was paid");
    assert_eq!(library.debts(64).unwrap().len(), 40);
    net.stop().await;
}
