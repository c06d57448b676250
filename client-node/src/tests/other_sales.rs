//! Tickets under the number of a purchase that are not of it: other networks', and such as nobody signed.

use protocol::manifest::KeyPolicy;
use protocol::{Keypair, NetworkId, Signed};

use super::fetching::{Client, album, net, options};
use super::network::{Net, Vice};
use super::world::{World, keypair};
use crate::fetch::{FetchError, Target};
use crate::inbox::inbox;
use crate::library::DeliveryState;
use crate::link::LinkOptions;
use crate::status::status;
use crate::verify::{VerifyTarget, verify};

/// A network with another root key, which sells the same client something under the number of the first one's sale.
async fn another(first: &Net) -> Net {
    let root = Keypair::from_seed(&[110; 32]);
    let network = NetworkId::of_root(&root.peer_id());
    let world = World { root, key: keypair(111), merchant: keypair(112), network };
    let product = world.publish(&album(), KeyPolicy::AtRelease);
    let mut other = Net::start(world, product, &[Vice::None]).await;
    other.sale.transaction = first.sale.transaction;
    other.sale.generation = 1;
    other
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_network_does_not_take_the_place_of_a_purchase_by_its_number() {
    let real = net(KeyPolicy::OnCompletion, &[Vice::None]).await;
    let client = Client::new();
    let ticket = real.ticket(client.home.peer_id());
    real.manager.tickets.lock().unwrap().push(ticket.clone());
    let fetched = client.fetch(&ticket).await.unwrap();

    let other = another(&real).await;
    let theirs = other.ticket(client.home.peer_id());
    other.manager.tickets.lock().unwrap().push(theirs.clone());
    let inbox = inbox(&client.home, Some(&theirs.join), &LinkOptions::default()).await.unwrap();
    let problem = inbox.items[0].problem.clone().unwrap();
    assert!(!inbox.items[0].new && problem.contains("another purchase"), "{problem}");
    // Nor by a file.
    let error = client.fetch(&theirs).await.unwrap_err();
    assert!(matches!(error, FetchError::OtherSale(_)) && error.cause() == "bad-ticket", "{error}");

    let now = status(&client.home).await.unwrap().remove(0);
    assert_eq!((now.network, now.state, now.trouble), (Some(real.world.network), DeliveryState::Done, None));
    assert!(verify(&client.home, VerifyTarget::Path(fetched.path), |_, _| {}).await.unwrap().is_good());
    assert!(client.fetch(&ticket).await.unwrap().already_here);
    other.stop().await;
    real.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_that_nobody_signed_stands_in_no_good_ones_way() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let transaction = net.sale.transaction;
    // Where nothing is known, and where the good one is that nobody checked yet.
    for (bought, formed_at) in [(false, 1), (false, net.sale.formed_at), (true, 1), (true, net.sale.formed_at)] {
        let client = Client::new();
        let good = net.ticket(client.home.peer_id());
        let (mut data, mut lease) = (good.ticket.data.peek().unwrap(), good.ticket.lease.peek().unwrap());
        let mut forged = good.clone();
        (data.formed_at, lease.generation) = (formed_at, 7);
        forged.ticket.data = Signed::sign(&data, &keypair(66));
        lease.transaction_data = forged.ticket.data.digest();
        forged.ticket.lease = Signed::sign(&lease, &keypair(66));
        if bought {
            client.home.library().put_ticket(transaction, &good, false, 1).unwrap();
        }
        let error = client.fetch(&forged).await.unwrap_err();
        assert!(matches!(error, FetchError::BadTicket(_)), "{error}");
        if !bought {
            // Gifts come by no file.
            net.manager.tickets.lock().unwrap().push(good.clone());
            let inbox = inbox(&client.home, Some(&good.join), &LinkOptions::default()).await.unwrap();
            assert!(inbox.items[0].problem.is_none());
            net.manager.tickets.lock().unwrap().clear();
        }
        album().assert_in(&client.fetch_with(Target::Transaction(transaction), options()).await.unwrap().path);
        // The next one has another client.
        net.seeders[0].accounts.lock().unwrap().clear();
    }
    net.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_another_ticket_is_not_noted_of_a_good_purchase() {
    let net = net(KeyPolicy::AtRelease, &[Vice::Stops(10)]).await;
    let client = Client::new();
    let good = net.ticket(client.home.peer_id());
    let error = client.fetch(&good).await.unwrap_err();
    assert_eq!(error.cause(), "overloaded", "{error}");
    let mut damaged = good.clone();
    damaged.ticket.lease = Signed::sign(&good.ticket.lease.peek().unwrap(), &keypair(66));
    let error = client.fetch(&damaged).await.unwrap_err();
    assert!(matches!(error, FetchError::BadTicket(_)), "{error}");
    let now = status(&client.home).await.unwrap().remove(0);
    assert_eq!((now.state, now.trouble.unwrap().cause.as_str()), (DeliveryState::Fetching, "overloaded"));
    net.stop().await;
}
