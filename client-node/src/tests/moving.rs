//! Purchases move to another device while the manager comes and goes.

use std::sync::atomic::Ordering;

use protocol::manifest::KeyPolicy;

use super::fetching::{Client, net};
use super::network::Vice;
use super::world::{Sale, keypair};
use crate::device::{MoveChoice, move_purchases};
use crate::inbox::inbox;
use crate::library::DeliveryState;
use crate::link::LinkOptions;
use crate::status::status;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_moved_is_told_where_the_manager_goes_away_and_by_a_repetition() {
    let net = net(KeyPolicy::AtRelease, &[Vice::None]).await;
    let (client, to, options) = (Client::new(), keypair(44).peer_id(), LinkOptions::default());
    for _ in 0..3 {
        let sale = Sale { transaction: Sale::new(vec![], vec![]).transaction, ..net.sale.clone() };
        let ticket = net.world.ticket(&net.product, client.home.peer_id(), &sale);
        net.manager.tickets.lock().unwrap().push(ticket);
    }
    let join = net.ticket(client.home.peer_id()).join;
    inbox(&client.home, Some(&join), &options).await.unwrap();
    // One that is another client's, and that this home never saw go.
    let stranger = net.ticket(client.home.peer_id());
    client.home.library().put_ticket(net.sale.transaction, &stranger, true, 1).unwrap();
    let gone = || async {
        let all = status(&client.home).await.unwrap();
        all.into_iter().filter(|d| d.state == DeliveryState::Refused).map(|d| d.transaction).collect::<Vec<_>>()
    };

    net.manager.leaves_after.store(2, Ordering::SeqCst);
    let moves = move_purchases(&client.home, to, &MoveChoice::All, Some(&join), &options).await.unwrap();
    let done = net.manager.moves.lock().unwrap().clone();
    let told: Vec<_> = moves.items.iter().map(|item| (item.generation, item.problem.is_some())).collect();
    assert_eq!(told, [(Some(1), false), (None, true), (None, true), (None, true)], "{moves:?}");
    assert_eq!((done.len(), moves.items[1].transaction), (2, done[1].0), "the answer was lost");
    assert_eq!(gone().await, [done[0].0]);

    net.manager.away.store(false, Ordering::SeqCst);
    let moves = move_purchases(&client.home, to, &MoveChoice::All, Some(&join), &options).await.unwrap();
    assert!(moves.items.iter().all(|item| item.generation == Some(1) && item.problem.is_none()), "{moves:?}");
    let mut all: Vec<_> = moves.items.iter().map(|item| item.transaction).chain([done[0].0]).collect();
    all.sort();
    let mut gone = gone().await;
    gone.sort();
    assert_eq!((gone.len(), gone), (3, all));
    net.stop().await;
}
