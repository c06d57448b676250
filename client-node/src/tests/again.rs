//! What was delivered is fetched once more.

use std::sync::atomic::Ordering;
use std::time::Duration;

use delivery::StallCause;
use protocol::manifest::KeyPolicy;
use protocol::{Address, PeerAddrs, Refusal, RefusalCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fetching::{Client, LIMIT, album, net, options};
use super::network::{Net, Vice};
use super::world::{Files, PAYLOAD, World, keypair, noise};
use crate::fetch::{FetchError, FetchOptions, FetchProgress, Target, fetch};
use crate::home::now_ms;
use crate::library::DeliveryState;
use crate::status::status;

// On one thread: each sees what the other did before that goes on.
#[tokio::test]
async fn reading_what_is_there_is_ended_by_a_stop() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    client.fetch(&ticket).await.unwrap();
    let (cancel, progress) = (CancellationToken::new(), watch::Sender::new(FetchProgress::default()));
    let (out, target, mut seen) = (client.out(), Target::Envelope(Box::new(ticket.clone())), progress.subscribe());
    let run = fetch(&client.home, target, &out, options(), progress, cancel.clone());
    let stop = async {
        seen.wait_for(|p| p.transaction.is_some()).await.map(drop).unwrap();
        cancel.cancel();
    };
    let (ended, ()) = tokio::time::timeout(LIMIT, async { tokio::join!(run, stop) }).await.expect("it hangs");
    assert!(matches!(ended.unwrap_err(), FetchError::Cancelled));
    assert_eq!(status(&client.home).await.unwrap()[0].state, DeliveryState::Done);
    assert!(client.fetch(&ticket).await.unwrap().already_here);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_no_second_time_without_the_manager_is_told_so() {
    let world = World::new();
    // More than a seeder sends unacknowledged: its window, and an eighth of what it was acknowledged for.
    let product = world.publish(&Files::single("long", noise(600 * PAYLOAD, 1)), KeyPolicy::AtRelease);
    let net = Net::start(world, product, &[Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    net.manager.tickets.lock().unwrap().push(ticket.clone());
    assert!(client.fetch(&ticket).await.unwrap().reported);
    std::fs::remove_dir_all(client.out()).unwrap();

    let refusal = Refusal::new(RefusalCode::LimitReached, "the next download may begin tomorrow");
    net.manager.refuses.lock().unwrap().replace(refusal);
    let (cancel, progress) = (CancellationToken::new(), watch::Sender::new(FetchProgress::default()));
    let (out, target, mut seen) = (client.out(), Target::Envelope(Box::new(ticket)), progress.subscribe());
    let mut patient = options();
    patient.limits.patience = Duration::from_secs(7);
    let run = fetch(&client.home, target, &out, patient, progress, cancel);
    let told = async {
        let told = seen.wait_for(|p| p.waiting.is_some()).await.unwrap().waiting.clone().unwrap();
        assert_eq!(told.cause, StallCause::AllRefused { code: RefusalCode::LimitReached }, "{told:?}");
        assert!(told.detail.contains("tomorrow") && told.next_try > now_ms(), "{told:?}");
    };
    let (ended, ()) = tokio::time::timeout(2 * LIMIT, async { tokio::join!(run, told) }).await.expect("it hangs");
    let error = ended.unwrap_err();
    assert_eq!(error.cause(), "limit-reached", "{error}");
    assert!(error.to_string().contains("tomorrow") && !error.sources().is_empty(), "{error}");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_served_it_without_being_listed_is_asked_again_when_the_listed_ones_and_the_manager_are_away() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let nowhere = Address::new("/ip4/127.0.0.1/tcp/1").unwrap();
    let gone = PeerAddrs::new(keypair(70).peer_id(), vec![nowhere]);
    let there = std::mem::replace(&mut net.sale.sources, vec![gone]);
    let ticket = || Target::Envelope(Box::new(net.ticket(client.home.peer_id())));
    let part = FetchOptions { sources: there, only: vec!["art".into()], ..options() };
    client.fetch_with(ticket(), part).await.unwrap();

    net.manager.away.store(true, Ordering::SeqCst);
    let outcome = client.fetch_with(ticket(), options()).await.unwrap();
    album().assert_in(&outcome.path);
    net.stop().await;
}
