//! What was delivered is fetched once more.

use protocol::manifest::KeyPolicy;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fetching::{Client, LIMIT, net, options};
use super::network::Vice;
use crate::fetch::{FetchError, FetchProgress, Target, fetch};
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
