//! Clocks that differ: whose is wrong, and by how much.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use protocol::manifest::KeyPolicy;
use protocol::{Refusal, RefusalCode};

use super::fetching::{Client, album, net, options};
use super::network::Vice;
use crate::fetch::{FetchError, Target};
use crate::status::status;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_behind_is_told_by_how_much() {
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    net.sale.ahead = 12 * 60_000;
    net.manager.ahead.store(net.sale.ahead, Ordering::SeqCst);
    let client = Client::new();
    let error = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap_err();
    assert!(error.to_string().contains("your clock is 12 minutes behind"), "{error}");
    assert_eq!(status(&client.home).await.unwrap()[0].trouble.as_ref().unwrap().cause, "clock-off");
    // Nobody to compare it with: then it is not known to be the clock.
    net.manager.ahead.store(0, Ordering::SeqCst);
    let error = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap_err();
    assert!(error.cause() == "not-yet-valid" && !error.to_string().contains("your clock is"), "{error}");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_is_ahead_is_told_by_how_much() {
    const DAY: u64 = 24 * 3600 * 1000;
    let mut net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    // A lease of a week that begins now, as a clock sees it that is eight days ahead.
    (net.sale.age, net.sale.lifetime) = (8 * DAY, 7 * DAY);
    net.manager.ahead.store(0u64.wrapping_sub(8 * DAY), Ordering::SeqCst);
    let ticket = net.ticket(client.home.peer_id());
    net.manager.tickets.lock().unwrap().push(ticket.clone());
    let error = client.fetch(&ticket).await.unwrap_err();
    assert!(error.to_string().contains("your clock is 8 days ahead"), "{error}");
    assert_eq!(error.cause(), "clock-off");
    // A manager whose clock is the same, and that gives a lease that is over: that is not the clock's fault.
    net.manager.ahead.store(0, Ordering::SeqCst);
    let error = client.fetch(&ticket).await.unwrap_err();
    assert!(error.cause() == "ticket-expires" && !error.to_string().contains("your clock is"), "{error}");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clocks_of_seeders_that_are_wrong_are_not_taken_for_this_one() {
    const DAYS: u64 = 8 * 24 * 3600 * 1000;
    let net = net(KeyPolicy::AtRelease, &[Vice::None, Vice::None]).await;
    net.seeders.iter().for_each(|seeder| seeder.ahead.store(DAYS, Ordering::SeqCst));
    let client = Client::new();
    let error = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap_err();
    assert_eq!(error.cause(), "seeder-clocks-off", "{error}");
    assert!(
        error.to_string().contains("they are 8 days ahead") && !error.to_string().contains("your clock"),
        "{error}"
    );
    // Where the manager's is like theirs, it is this one.
    net.manager.ahead.store(DAYS, Ordering::SeqCst);
    let error = client.fetch(&net.ticket(client.home.peer_id())).await.unwrap_err();
    assert!(error.cause() == "clock-off" && error.to_string().contains("your clock is 8 days behind"), "{error}");
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_over_and_has_no_successor_is_gone_on_with_while_the_manager_is_there() {
    const HOUR: u64 = 3_600_000;
    let mut net = net(KeyPolicy::OnCompletion, &[Vice::None]).await;
    let client = Client::new();
    // What is bought on completion has one lease, which the manager gives again; seeders go on with it for two days.
    (net.sale.age, net.sale.lifetime) = (10 * HOUR, 9 * HOUR);
    net.seeders[0].continuation.store(48 * HOUR, Ordering::SeqCst);
    let ticket = net.ticket(client.home.peer_id());
    net.manager.tickets.lock().unwrap().push(ticket.clone());
    // Where that seeder stops, it is not the lease.
    *net.seeders[0].vice.lock().unwrap() = Vice::Stops(5);
    let mut hasty = options();
    hasty.limits.patience = Duration::from_secs(1);
    let error = client.fetch_with(Target::Envelope(Box::new(ticket.clone())), hasty).await.unwrap_err();
    assert!(!["ticket-expires", "stopped"].contains(&error.cause()), "{error}");
    assert!(error.to_string().contains("the lease is over and was not renewed"), "{error}");
    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    let outcome = client.fetch(&ticket).await.unwrap();
    album().assert_in(&outcome.path);
    net.stop().await;
}

#[test]
fn a_lease_that_is_over_is_the_cause_of_what_seeders_refuse_for_it_and_of_nothing_else() {
    use delivery::{FetchError as E, SourceReport, StallCause};
    let over = || Some("the manager does not answer".to_owned());
    let ended = |cause: StallCause, code: Option<RefusalCode>| {
        let last_refusal = code.map(|code| Refusal::new(code, "no"));
        let sources =
            vec![SourceReport { last_refusal, ..SourceReport::of(protocol::PeerId::from_bytes([1; 32]), 0, 0) }];
        FetchError::ended(E::NoSource { cause, waited: Duration::ZERO, sources }, over())
    };
    for (cause, code, named) in [
        (StallCause::NetworkUnreachable, None, "network-unreachable"),
        (StallCause::Overloaded, Some(RefusalCode::Overloaded), "overloaded"),
        (StallCause::Silent, None, "silent"),
        (StallCause::NoSeederLeft, Some(RefusalCode::Expired), "ticket-expires"),
    ] {
        let error = ended(cause, code);
        assert!(matches!(error, FetchError::LeaseOver { .. }) && error.cause() == named, "{error}");
    }
    let disk_full = E::DiskFull { path: Path::new("here").into(), needed: 7, lacks: delivery::Lacks::Space };
    let full = FetchError::ended(disk_full, over());
    assert!(full.cause() == "disk-full" && !full.to_string().contains("lease"), "{full}");
    assert_eq!(FetchError::ended(E::Removed, over()).cause(), "disk");
}
