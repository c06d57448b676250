//! A lease that was made void says nothing of the purchase: only the manager does.

use std::sync::atomic::Ordering;
use std::time::Duration;

use delivery::StallCause;
use protocol::manifest::KeyPolicy;
use protocol::ticket::TicketEnvelope;
use protocol::trust::{
    KeyEntry, KeyPurpose, KeySet, KeyState, RevocationEpoch, RevocationState, Revocations, Trust, Update,
};
use protocol::{Refusal, RefusalCode, Signed};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fetching::{Client, LIMIT, album, net, options};
use super::network::{Net, Vice};
use super::world::{World, keypair};
use crate::fetch::{FetchError, FetchOptions, FetchProgress, Target, fetch};
use crate::home::now_ms;
use crate::library::DeliveryState;
use crate::status::status;

/// Two seeders that take no lease of the first generation, a lease of it, and one of the next.
async fn voided(client: &Client) -> (Net, TicketEnvelope, TicketEnvelope) {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::Voids, Vice::Voids]).await;
    let void = net.ticket(client.home.peer_id());
    net.sale.generation = 1;
    let next = net.ticket(client.home.peer_id());
    (net, void, next)
}

fn by(ticket: &TicketEnvelope) -> Target {
    Target::Envelope(Box::new(ticket.clone()))
}

/// Fetches while the manager is away; it is back when it was told that it is waited for.
async fn waited_for(client: &Client, net: &Net, ticket: &TicketEnvelope) {
    net.manager.away.store(true, Ordering::SeqCst);
    let progress = watch::Sender::new(FetchProgress::default());
    let mut seen = progress.subscribe();
    let out = client.out();
    let run = fetch(&client.home, by(ticket), &out, options(), progress, CancellationToken::new());
    let comes_back = async {
        let told = seen.wait_for(|progress| progress.waiting.is_some()).await.unwrap().waiting.clone().unwrap();
        assert!(told.cause == StallCause::ManagerAway && told.next_try > now_ms(), "{told:?}");
        net.manager.away.store(false, Ordering::SeqCst);
    };
    let both = async { tokio::join!(run, comes_back) };
    let (outcome, ()) = tokio::time::timeout(LIMIT, both).await.expect("it hangs");
    album().assert_in(&outcome.unwrap().path);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_manager_does_not_answer_another_lease_is_waited_for() {
    let client = Client::new();
    let (net, void, next) = voided(&client).await;
    // The network is met first.
    net.manager.refuses.lock().unwrap().replace(Refusal::new(RefusalCode::LimitReached, "not now"));
    let error = client.fetch(&void).await.unwrap_err();
    assert_eq!(error.cause(), "limit-reached", "{error}");
    net.manager.refuses.lock().unwrap().take();
    net.manager.tickets.lock().unwrap().push(next);
    waited_for(&client, &net, &void).await;
    net.stop().await;

    // The same where this client knows of it before it asks a seeder.
    let client = Client::new();
    let (net, void, next) = voided(&client).await;
    net.manager.epochs.lock().unwrap().push(net.world.voided(&net.sale, 1));
    net.manager.refuses.lock().unwrap().replace(Refusal::new(RefusalCode::LimitReached, "not now"));
    client.fetch(&void).await.unwrap_err();
    net.manager.refuses.lock().unwrap().take();
    net.manager.tickets.lock().unwrap().push(next);
    waited_for(&client, &net, &void).await;
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_question_under_way_is_told_of_and_ends_with_the_patience() {
    let client = Client::new();
    let (net, void, _) = voided(&client).await;
    net.manager.away.store(true, Ordering::SeqCst);
    let patience = Duration::from_secs(4);
    let impatient = FetchOptions { manager_patience: patience, ..options() };
    let progress = watch::Sender::new(FetchProgress::default());
    let mut seen = progress.subscribe();
    let (out, began) = (client.out(), std::time::Instant::now());
    let run = fetch(&client.home, by(&void), &out, impatient, progress, CancellationToken::new());
    let told = async {
        let told = seen.wait_for(|progress| progress.waiting.is_some()).await.unwrap().waiting.clone().unwrap();
        assert_eq!(told.cause, StallCause::ManagerAway);
        assert!(told.next_try > now_ms() && told.next_try < now_ms() + 4_000, "{told:?}");
    };
    let both = async { tokio::join!(run, told) };
    let (error, ()) = tokio::time::timeout(LIMIT, both).await.expect("it hangs");
    assert_eq!(error.unwrap_err().cause(), "manager-needed");
    // A call has ten seconds.
    assert!(began.elapsed() < Duration::from_secs(8), "{:?}", began.elapsed());
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_managers_word_is_the_end_of_a_purchase() {
    let client = Client::new();
    let (net, void, _) = voided(&client).await;
    net.manager.refuses.lock().unwrap().replace(Refusal::new(RefusalCode::Revoked, "the purchase was refunded"));
    let error = client.fetch(&void).await.unwrap_err();
    assert!(matches!(error, FetchError::Revoked(_)), "{error}");
    assert!(error.to_string().contains("was refunded"), "{error}");

    net.manager.away.store(true, Ordering::SeqCst);
    let impatient = FetchOptions { manager_patience: Duration::from_secs(1), ..options() };
    let error = client.fetch_with(by(&void), impatient).await.unwrap_err();
    assert_eq!(error.cause(), "manager-away", "{error}");
    assert!(!error.to_string().contains("refunded"), "{error}");
    net.stop().await;
}

/// A seeder that sent five chunks and then turned into `vice`, what is here of the goods, and the ticket.
pub(super) async fn begun(client: &Client, vice: Vice) -> (Net, TicketEnvelope) {
    let net = net(KeyPolicy::AtRelease, &[Vice::Stops(5)]).await;
    let ticket = net.ticket(client.home.peer_id());
    client.fetch(&ticket).await.unwrap_err();
    *net.seeders[0].vice.lock().unwrap() = vice;
    assert_eq!(stands(client, &net).await, (DeliveryState::Fetching, "overloaded".to_owned(), 1));
    (net, ticket)
}

/// State, cause, and how much lies in the folder for the goods. What was acknowledged stays in any case.
async fn stands(client: &Client, net: &Net) -> (DeliveryState, String, usize) {
    let folder = client.home.delivery_dir(&net.sale.transaction).join("acks-1");
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
    let shown = status(&client.home).await.unwrap().remove(0);
    assert_eq!(shown.have_bytes == 0, shown.state == DeliveryState::Refused, "{shown:?}");
    (shown.state, shown.trouble.unwrap().cause, client.names().len())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_came_of_a_purchase_that_is_taken_back_goes_and_of_one_that_may_go_on_stays() {
    let client = Client::new();
    let (net, ticket) = begun(&client, Vice::Voids).await;
    net.manager.away.store(true, Ordering::SeqCst);
    let impatient = || FetchOptions { manager_patience: Duration::from_secs(1), ..options() };
    client.fetch_with(by(&ticket), impatient()).await.unwrap_err();
    assert_eq!(stands(&client, &net).await, (DeliveryState::Fetching, "manager-away".to_owned(), 1));
    net.manager.away.store(false, Ordering::SeqCst);
    net.manager.refuses.lock().unwrap().replace(Refusal::new(RefusalCode::Revoked, "the purchase was refunded"));
    client.fetch(&ticket).await.unwrap_err();
    assert_eq!(stands(&client, &net).await, (DeliveryState::Refused, "revoked".to_owned(), 0));
    // Again: the same, and nothing new is left.
    client.fetch(&ticket).await.unwrap_err();
    assert_eq!(stands(&client, &net).await, (DeliveryState::Refused, "revoked".to_owned(), 0));
    net.stop().await;
}

/// Seeders that are away, or have enough to do, say nothing of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transfer_that_stands_still_ends_when_the_manager_says_that_the_purchase_was_taken_back() {
    let client = Client::new();
    let net = net(KeyPolicy::AtRelease, &[Vice::Stops(0)]).await;
    let ticket = net.ticket(client.home.peer_id());
    net.manager.refuses.lock().unwrap().replace(Refusal::new(RefusalCode::Revoked, "the purchase was refunded"));
    let mut patient = options();
    patient.limits.patience = 10 * LIMIT;
    let error = client.fetch_with(by(&ticket), patient).await.unwrap_err();
    assert!(matches!(error, FetchError::Revoked(_)), "{error}");
    assert!(error.to_string().contains("was refunded"), "{error}");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_moved_to_another_client_is_refused_until_it_comes_back() {
    let client = Client::new();
    let (mut net, ticket) = begun(&client, Vice::Voids).await;
    // Nobody but a seeder says that it moved: a manager that lost its books knows of nothing.
    let error = client.fetch(&ticket).await.unwrap_err();
    assert_eq!(error.cause(), "not-entitled", "{error}");
    assert_eq!(stands(&client, &net).await, (DeliveryState::Fetching, "not-entitled".to_owned(), 1));
    net.manager.epochs.lock().unwrap().push(net.world.voided(&net.sale, 1));
    client.fetch(&ticket).await.unwrap_err();
    assert_eq!(stands(&client, &net).await, (DeliveryState::Refused, "moved".to_owned(), 0));
    net.sale.generation = 2;
    let outcome = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap();
    album().assert_in(&outcome.path);
    assert_eq!(outcome.state, DeliveryState::Done);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_taken_down_is_refused_although_seeders_only_lack_it() {
    // The manager says so, or its signed revocations.
    for by_word in [true, false] {
        let client = Client::new();
        let (net, ticket) = begun(&client, Vice::Lacks).await;
        net.manager.tickets.lock().unwrap().push(ticket.clone());
        client.fetch(&ticket).await.unwrap_err();
        assert_eq!(stands(&client, &net).await.0, DeliveryState::Fetching);
        if by_word {
            let refusal = Refusal::new(RefusalCode::Revoked, "this content was taken down");
            net.manager.refuses.lock().unwrap().replace(refusal);
        } else {
            let contents = vec![net.product.manifest.content];
            let epoch = net.world.revoked(Revocations { contents, ..Revocations::default() });
            net.manager.epochs.lock().unwrap().push(epoch);
        }
        let error = client.fetch(&ticket).await.unwrap_err();
        assert!(error.to_string().contains("taken down"), "{error}");
        assert_eq!(stands(&client, &net).await, (DeliveryState::Refused, "revoked".to_owned(), 0));
        net.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_refused_for_good_ends_a_delivery_that_is_all_here() {
    let client = Client::new();
    let net = net(KeyPolicy::OnCompletion, &[Vice::None]).await;
    let ticket = net.ticket(client.home.peer_id());
    client.fetch(&ticket).await.unwrap_err();
    assert_eq!(stands(&client, &net).await, (DeliveryState::Fetched, "not-entitled".to_owned(), 1));
    net.manager.refuses.lock().unwrap().replace(Refusal::new(RefusalCode::Revoked, "the purchase was refunded"));
    client.fetch(&ticket).await.unwrap_err();
    assert_eq!(stands(&client, &net).await, (DeliveryState::Refused, "revoked".to_owned(), 0));
    net.stop().await;
}

#[test]
fn what_was_revoked_is_remembered_over_the_beginning_of_a_new_chain_and_without_the_key_of_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let networks = crate::networks::Networks::new(dir.path().join("networks"));
    let world = World::new();
    let next = keypair(103);
    let (now, restored) = (now_ms(), now_ms() / 1000);
    let mut keys = world.key_set(1, &[]).peek().unwrap();
    let trust = |keys: &KeySet| Trust::new(world.root.peer_id(), Signed::sign(keys, &world.root), 1000).unwrap();
    let entry = |state| KeyEntry { purpose: KeyPurpose::Revocation, key: next.peer_id(), state };
    keys.keys.push(entry(KeyState::Active));
    let both = trust(&keys);
    let (mut state, mut previous) = (RevocationState::default(), None);
    for (number, key) in [(1, &world.key), (2, &world.key), (restored, &next), (restored + 1, &next)] {
        let peers = vec![keypair(number as u8).peer_id()];
        let added = Revocations { peers, ..Revocations::default() };
        let previous_of = previous.filter(|_| number != restored);
        let epoch = RevocationEpoch { network: world.network, number, previous: previous_of, at: now, added };
        let signed = Signed::sign(&epoch, key);
        previous = Some(signed.digest());
        let taken = networks.take_epochs(state.place(), &both, std::slice::from_ref(&signed), now).unwrap();
        assert!(taken.refused.is_none());
        let [(digest, epoch)] = &taken.epochs[..] else { panic!("not taken") };
        assert_eq!(state.apply(*digest, epoch).unwrap(), Update::Taken);
    }
    assert_eq!(state.number(), restored + 1);
    let remembered = networks.revocations(&both, now).unwrap();
    assert_eq!((remembered.number(), remembered.all()), (state.number(), state.all()));
    // The key of the first ones was stolen: what the new chain says stays.
    keys.keys.iter_mut().filter(|entry| entry.key != next.peer_id()).for_each(|entry| entry.state = KeyState::Revoked);
    let remembered = networks.revocations(&trust(&keys), now).unwrap();
    assert_eq!((remembered.number(), remembered.all().peers.len()), (restored + 1, 2));
}
