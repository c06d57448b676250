//! What was delivered is fetched once more.

use std::time::Duration;

use delivery::StallCause;
use protocol::manifest::KeyPolicy;
use protocol::{Refusal, RefusalCode};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fetching::{Client, LIMIT, net, options};
use super::network::{Net, Vice};
use super::world::{Files, PAYLOAD, World, noise};
use crate::fetch::{FetchError, FetchProgress, Target, fetch};
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
