//! What a fetch meets before any seeder is asked for goods.

use std::time::Duration;

use delivery::StallCause;
use protocol::manifest::KeyPolicy;
use protocol::{Address, Keypair, PeerAddrs};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fetching::{Client, LIMIT, album, net, options};
use super::network::Vice;
use super::world::{Sale, World};
use crate::fetch::{FetchOptions, FetchProgress, Target, fetch};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_that_begins_later_is_changed_for_one_that_begins_now() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    net.sale.ahead = 20 * 60_000;
    let early = net.ticket(client.home.peer_id());
    // The manager's clock was set right.
    net.sale.ahead = 0;
    net.manager.tickets.lock().unwrap().push(net.ticket(client.home.peer_id()));
    client.fetch(&early).await.unwrap();
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_networks_keys_come_from_a_seeder_however_many_before_it_are_gone() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let nowhere = Address::new("/ip4/127.0.0.1/tcp/1").unwrap();
    let gone = |n: u8| PeerAddrs::new(Keypair::from_seed(&[n; 32]).peer_id(), vec![nowhere.clone()]);
    // What has the keys is known as a seeder only, the thirteenth.
    let has_keys = std::mem::replace(&mut net.sale.managers, vec![gone(200)]);
    net.sale.sources = (201..=212).map(gone).chain(has_keys).chain(net.sale.sources.clone()).collect();
    let outcome = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap();
    album().assert_in(&outcome.path);
    net.stop().await;
}

/// In a network namespace of its own, which has no network.
const CUT_OFF: &str = "WILLCALL_TEST_CUT_OFF";

#[test]
fn a_machine_without_a_network_says_so_at_once() {
    if std::env::var_os(CUT_OFF).is_some() {
        return cut_off();
    }
    let mut test = std::process::Command::new("unshare");
    test.args(["--map-root-user", "--net"]).arg(std::env::current_exe().unwrap());
    test.args(["--exact", "tests::beginning::a_machine_without_a_network_says_so_at_once", "--nocapture"]);
    match test.env(CUT_OFF, "1").output() {
        Ok(done) if done.status.success() => assert!(String::from_utf8_lossy(&done.stdout).contains("1 passed")),
        // This system gives no namespaces: left out.
        Ok(done) if String::from_utf8_lossy(&done.stderr).starts_with("unshare:") => {}
        Ok(done) => panic!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr)),
        Err(_) => {}
    }
}

#[tokio::main]
async fn cut_off() {
    let client = Client::new();
    let world = World::new();
    let product = world.publish(&album(), KeyPolicy::AtRelease);
    let at = vec![Address::new("/ip4/192.0.2.1/tcp/4001").unwrap()];
    let managers = vec![PeerAddrs::new(Keypair::from_seed(&[7; 32]).peer_id(), at)];
    let envelope = world.ticket(&product, client.home.peer_id(), &Sale::new(Vec::new(), managers));
    let progress = watch::Sender::new(FetchProgress::default());
    let mut seen = progress.subscribe();
    let (out, ticket) = (client.out(), Target::Envelope(Box::new(envelope)));
    let impatient = FetchOptions { manager_patience: Duration::from_secs(2), ..options() };
    let run = fetch(&client.home, ticket, &out, impatient, progress, CancellationToken::new());
    let told = async {
        let told = seen.wait_for(|progress| progress.waiting.is_some()).await.unwrap().waiting.clone().unwrap();
        assert_eq!(told.cause, StallCause::NetworkUnreachable, "{told:?}");
        assert!(told.detail.contains("no route"), "{told:?}");
    };
    let both = async { tokio::join!(run, told) };
    let (error, ()) = tokio::time::timeout(LIMIT, both).await.expect("it hangs");
    let error = error.unwrap_err();
    assert_eq!(error.cause(), "network-unreachable", "{error}");
    assert!(error.to_string().contains("no route") && !error.to_string().contains("manager-needed"), "{error}");
}
