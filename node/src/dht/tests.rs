//! The table of the DHT and whom it is about, without a network.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests fail by panicking")]

use super::*;

#[test]
fn who_came_first_makes_room_for_those_who_are_met_now() {
    let mut state = DhtState::new(&Limits { dht_newcomers: 2, ..Limits::default() }, Members::default());
    let ours = |n: u8| protocol::Keypair::from_seed(&[n; 32]).peer_id();
    let theirs = |n: u8| peer_to_libp2p(&ours(n)).into_iter().collect::<Vec<_>>();
    let mut now = |come: &[u8], go: &[u8]| {
        come.iter().flat_map(|n| theirs(*n)).for_each(|peer| state.met(&peer));
        go.iter().flat_map(|n| theirs(*n)).for_each(|peer| state.on_gone(&peer));
        assert_eq!(state.came.len(), state.newcomers.borrow().len());
        state.newcomers.borrow().clone()
    };
    let these = |numbers: &[u8]| numbers.iter().map(|n| ours(*n)).collect::<BTreeSet<_>>();
    assert_eq!(now(&[1, 2, 1], &[]), these(&[1, 2]));
    assert_eq!(now(&[3], &[]), these(&[2, 3]));
    assert_eq!(now(&[4], &[3]), these(&[4]));
    assert_eq!(now(&[5, 6], &[]), these(&[5, 6]));
}

#[test]
fn the_newest_word_of_where_a_peer_is_replaces_the_last_and_has_a_bound() {
    let id = |n: u8| protocol::Keypair::from_seed(&[n; 32]).peer_id();
    let net = |n: u8| peer_to_libp2p(&id(n)).into_iter().next().unwrap();
    let mut config = kad::Config::new(libp2p::StreamProtocol::new("/test"));
    config.set_kbucket_inserts(kad::BucketInserts::Manual);
    let store = kad::store::MemoryStore::new(net(1));
    let mut kad = Kad::with_config(net(1), store, config);
    let mut state = DhtState::new(&Limits::default(), Members::default());

    let at = |night: u8, n: u8| protocol::Address::new(&format!("/ip4/192.0.{night}.{n}/tcp/4001")).unwrap();
    let told = |night: u8, count: u8| PeerAddrs::new(id(2), (0..count).map(|n| at(night, n)).collect());
    let known = |kad: &mut Kad| {
        let known = table_addresses(kad, &net(2));
        known.iter().filter_map(address_from_libp2p).collect::<Vec<_>>()
    };
    for night in 0..100 {
        state.add(&mut kad, &told(night, 16)).unwrap();
        assert_eq!(known(&mut kad), told(night, 8).addrs);
    }
    state.add(&mut kad, &told(99, 1)).unwrap();
    assert_eq!(known(&mut kad), [at(99, 0)]);
    // Nothing to say is no reason to forget.
    state.add(&mut kad, &PeerAddrs::from(id(2))).unwrap();
    assert_eq!(known(&mut kad), [at(99, 0)]);

    // It moved. Where it was when it was met is beside that, as far as there is room.
    let moved = PeerAddrs::new(id(2), vec![at(98, 0), at(98, 1)]);
    state.add(&mut kad, &moved).unwrap();
    for _ in 0..2 {
        state.recall(&mut kad, told(50, 16)).unwrap();
        assert_eq!(known(&mut kad), [&moved.addrs[..], &told(50, 6).addrs].concat());
    }
    state.add(&mut kad, &moved).unwrap();
    assert_eq!(known(&mut kad), moved.addrs);

    // What the library adds itself.
    for n in 0..100 {
        kad.add_address(&net(2), address_to_libp2p(&at(7, n), &net(2)).unwrap());
        let Some(bucket) = kad.kbucket(net(2)) else { panic!("no bucket") };
        let event = kad::Event::RoutingUpdated {
            peer: net(2),
            is_new_peer: false,
            addresses: bucket.iter().next().unwrap().node.value.clone(),
            bucket_range: bucket.range(),
            old_peer: None,
        };
        state.on_event(&mut kad, event);
    }
    assert_eq!(known(&mut kad), (92..100).map(|n| at(7, n)).collect::<Vec<_>>());

    // Long ones are fewer.
    let long = protocol::Address::new(&format!("/dns4/{}.example/tcp/4001", "a".repeat(180))).unwrap();
    let mut addrs = vec![at(1, 1)];
    addrs.extend((0..4).map(|n| protocol::Address::new(&long.as_str().replace("4001", &format!("400{n}"))).unwrap()));
    addrs.push(at(1, 2));
    state.add(&mut kad, &PeerAddrs::new(id(2), addrs.clone())).unwrap();
    let kept = table_addresses(&mut kad, &net(2));
    assert!(kept.iter().map(Multiaddr::len).sum::<usize>() <= ADDRESS_BYTES, "{kept:?}");
    assert_eq!(known(&mut kad), [&addrs[..3], &addrs[5..]].concat());
}

#[test]
fn no_single_answer_is_all_that_is_heard() {
    let peer = |n: u8| PeerAddrs::from(protocol::PeerId::from_bytes([n; 32]));
    let named = |numbers: &[u8]| numbers.iter().map(|n| peer(*n)).collect::<Vec<_>>();
    let answers = || vec![named(&[1, 2, 3, 4, 5, 6]), named(&[7]), named(&[8, 9])];
    assert_eq!(in_turn(answers(), 5), named(&[1, 7, 8, 2, 9]));
    assert_eq!(in_turn(answers(), 2), named(&[1, 7]));
    assert_eq!(in_turn(answers(), 100).len(), 9);
    assert_eq!(in_turn(answers(), 0), []);
    assert_eq!(in_turn(Vec::new(), 5), []);
}
