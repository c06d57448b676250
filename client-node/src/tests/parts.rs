//! Parts of a product, beside a fetch of all of it that was broken off.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use protocol::manifest::KeyPolicy;
use protocol::ticket::TicketEnvelope;

use super::fetching::{Client, album, net, options};
use super::network::{Net, Vice};
use crate::fetch::{FetchError, FetchOptions, Target};
use crate::library::DeliveryState;

fn by(ticket: &TicketEnvelope) -> Target {
    Target::Envelope(Box::new(ticket.clone()))
}

fn only(name: &str) -> FetchOptions {
    FetchOptions { only: vec![name.to_owned()], ..options() }
}

/// All of it was fetched until the seeder had sent so many chunks.
async fn broken_off(client: &Client, after: u32) -> (Net, TicketEnvelope) {
    let net = net(KeyPolicy::AtRelease, &[Vice::Stops(after)]).await;
    let ticket = net.ticket(client.home.peer_id());
    let mut hasty = options();
    hasty.limits.patience = Duration::from_millis(500);
    client.fetch_with(by(&ticket), hasty).await.unwrap_err();
    assert_eq!(net.sent(), after);
    *net.seeders[0].vice.lock().unwrap() = Vice::None;
    (net, ticket)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_takes_nothing_away_of_what_came_of_the_whole() {
    let client = Client::new();
    let (net, ticket) = broken_off(&client, 16).await;
    let work = format!(".willcall-{}", net.sale.transaction);
    // Once more, too: it is there already.
    for already_here in [false, true] {
        let part = client.fetch_with(by(&ticket), only("art")).await.unwrap();
        assert_eq!(part.already_here, already_here);
        assert_eq!(std::fs::read(part.path.join("art/cover.png")).unwrap(), album().contents[1]);
        assert_eq!(client.names(), [work.as_str(), "An album"]);
        assert!(!client.out().join(&work).join("unpacked").exists());
    }
    let whole = client.fetch(&ticket).await.unwrap();
    album().assert_in(&whole.path);
    assert_eq!(net.sent(), net.product.manifest.chunks(), "nothing came twice");
    assert_eq!(client.names(), ["An album"]);
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_earlier_run_decrypted_is_proven_before_a_part_is_made_of_it() {
    let client = Client::new();
    // The begin of the first file is here, and most of the rest.
    let (net, ticket) = broken_off(&client, 23).await;
    let work = client.out().join(format!(".willcall-{}", net.sale.transaction));
    let file = work.join(net.product.digest.to_string()).join("files/An album/01.flac");
    let file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.write_all_at(b"damaged", 5).unwrap();
    let part = client.fetch_with(by(&ticket), only("01.flac")).await.unwrap();
    assert!(std::fs::read(part.path.join("01.flac")).unwrap() == album().contents[0]);
    assert!(net.sent() <= net.product.manifest.chunks() + 1, "nothing else came twice: {}", net.sent());
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_names_than_can_be_kept_are_refused_before_anything_comes() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let client = Client::new();
    let ticket = net.ticket(client.home.peer_id());
    let many = || FetchOptions { only: (0..3000).map(|n| format!("{n:030}")).collect(), ..options() };
    let error = client.fetch_with(by(&ticket), many()).await.unwrap_err();
    assert!(matches!(error, FetchError::TooManyNames), "{error}");
    assert_eq!(net.sent(), 0);
    client.fetch_with(by(&ticket), only("art")).await.unwrap();
    let error = client.fetch_with(by(&ticket), many()).await.unwrap_err();
    assert!(matches!(error, FetchError::TooManyNames), "{error}");
    let kept = client.home.library().get(&net.sale.transaction).unwrap().unwrap();
    assert!(kept.state == DeliveryState::Done && kept.trouble.is_none(), "it is as it was: {:?}", kept.trouble);
    net.stop().await;
}
