//! The library under several commands at once, and under tickets that anybody may have written.

use protocol::manifest::KeyPolicy;
use protocol::ticket::TicketEnvelope;
use protocol::trust::{JoinLine, Trust};
use protocol::{Digest, PeerAddrs};

use super::world::{Files, Sale, World, keypair, noise};
use crate::home::{Home, now_ms};
use crate::library::{LibraryError, Put};

#[test]
fn commands_on_one_home_take_turns_and_a_stuck_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::open(dir.path(), None).unwrap();
    std::thread::scope(|scope| {
        for n in 0..8u8 {
            let library = home.library();
            scope.spawn(move || {
                for _ in 0..5 {
                    library.begin_attempt(Digest::from_bytes([n; 32]), "key".into(), 1).unwrap();
                }
            });
        }
    });
    let began = std::time::Instant::now();
    let held = loop {
        // Open in this process for a moment after its last access, and no longer.
        match node::DirLock::acquire(&home.dir().join("library")) {
            Ok(lock) => break lock,
            Err(node::DirLockError::Held { .. }) if began.elapsed().as_secs() < 20 => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    };
    let error = home.library().waiting(std::time::Duration::from_millis(100)).list().unwrap_err();
    assert!(matches!(&error, LibraryError::Busy { pid, .. } if *pid == std::process::id().to_string()), "{error}");
    drop(held);
    home.library().list().unwrap();
}

#[test]
fn a_command_that_asks_all_the_time_lets_others_in() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (Home::open(dir.path(), None).unwrap(), Home::open(dir.path(), None).unwrap());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let mut asked = 0u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                one.library().debts(1).unwrap();
                asked += 1;
            }
            asked
        });
        for n in 0..3u8 {
            other.library().begin_attempt(Digest::from_bytes([n; 32]), "key".into(), 1).unwrap();
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(busy.join().unwrap() > 0);
    });
}

#[test]
fn an_attempt_keeps_its_key_until_it_is_answered() {
    let dir = tempfile::tempdir().unwrap();
    let library = Home::open(dir.path(), None).unwrap().library();
    let purchase = Digest::from_bytes([1; 32]);
    assert_eq!(library.begin_attempt(purchase, "first".into(), 1).unwrap(), "first");
    assert_eq!(library.begin_attempt(purchase, "second".into(), 2).unwrap(), "first");
    library.end_attempt(purchase).unwrap();
    assert_eq!(library.begin_attempt(purchase, "third".into(), 3).unwrap(), "third");
    // Whoever has not answered by then never will.
    const OLD: u64 = 91 * 24 * 3_600_000;
    assert_eq!(library.begin_attempt(purchase, "fourth".into(), OLD).unwrap(), "fourth");
    assert_eq!(library.begin_attempt(purchase, "fifth".into(), OLD + 1).unwrap(), "fourth");
}

#[test]
fn a_checked_ticket_is_not_replaced_by_an_unchecked_or_older_one() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::open(dir.path(), None).unwrap();
    let (world, library) = (World::new(), home.library());
    let product = world.publish(&Files::single("x", noise(3, 1)), KeyPolicy::AtRelease);
    let sale = Sale::new(vec![], vec![]);
    let titled = |title: &str| {
        let mut envelope = world.ticket(&product, home.peer_id(), &sale);
        envelope.title = title.to_owned();
        envelope
    };
    let title = || library.get(&sale.transaction).unwrap().unwrap().envelope.title;
    let older = titled("older");
    let put =
        |envelope: &TicketEnvelope, checked| library.put_ticket(sale.transaction, envelope, checked, now_ms()).unwrap();
    assert_eq!(put(&titled("unchecked"), false), Put::New);
    assert_eq!(put(&titled("other"), false), Put::Known);
    assert_eq!(title(), "other");
    let mut keyless = titled("checked");
    keyless.grant = None;
    assert_eq!(put(&keyless, true), Put::Known);
    assert_eq!(put(&titled("forged"), false), Put::Known);
    assert_eq!(title(), "checked");
    assert!(library.get(&sale.transaction).unwrap().unwrap().envelope.grant.is_some(), "the key is kept");
    let later = older.ticket.lease.peek().unwrap().issued_at < keyless.ticket.lease.peek().unwrap().issued_at;
    if later {
        put(&older, true);
        assert_eq!(title(), "checked");
    }
    // Another sale under the same number, however well it is signed.
    let elsewhere = Sale { generation: 1, formed_at: sale.formed_at + 1, ..sale.clone() };
    let other = world.ticket(&product, home.peer_id(), &elsewhere);
    assert_eq!(put(&other, true), Put::Other);
    let kept = library.get(&sale.transaction).unwrap().unwrap();
    assert!(kept.envelope.ticket == keyless.ticket && kept.envelope.grant.is_some());
}

#[test]
fn a_ticket_that_was_never_good_leaves_nothing_to_a_good_one() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::open(dir.path(), None).unwrap();
    let (world, library) = (World::new(), home.library());
    let product = world.publish(&Files::single("x", noise(3, 1)), KeyPolicy::AtRelease);
    let sale = Sale::new(vec![], vec![]);
    let forged = world.ticket(&product, home.peer_id(), &Sale { generation: 9, formed_at: 1, ..sale.clone() });
    let mut good = world.ticket(&product, home.peer_id(), &sale);
    good.grant = None;
    assert_eq!(library.put_ticket(sale.transaction, &forged, false, now_ms()).unwrap(), Put::New);
    assert_eq!(library.put_ticket(sale.transaction, &good, true, now_ms()).unwrap(), Put::New);
    let known = library.get(&sale.transaction).unwrap().unwrap();
    assert!(known.checked && known.envelope == good, "the key of another ticket is none of this one");
}

#[test]
fn networks_are_remembered_without_invitations_and_trusted_by_their_root_only() {
    let dir = tempfile::tempdir().unwrap();
    let home = Home::open(dir.path(), None).unwrap();
    let world = World::new();
    let invitation = protocol::trust::Invitation {
        role: protocol::trust::InvitedRole::Seeder,
        token: protocol::Nonce::from_bytes([1; 16]),
    };
    let manager = PeerAddrs::from(keypair(1).peer_id());
    let join = JoinLine { invitation: Some(invitation), ..world.join(vec![manager]) };
    home.networks().remember(&join).unwrap();
    assert_eq!(home.networks().list().unwrap(), [join.public()]);
    assert!(home.networks().trust(&join, 0).unwrap().is_none());
    let trust = Trust::new(world.root.peer_id(), world.key_set(1, &[]), 0).unwrap();
    home.networks().save_key_set(&trust).unwrap();
    assert!(home.networks().trust(&join, 0).unwrap().is_some());
    let keyset = home.dir().join("networks").join(world.network.to_string()).join("keyset");
    let mut bytes = std::fs::read(&keyset).unwrap();
    bytes[60] ^= 1;
    std::fs::write(&keyset, bytes).unwrap();
    assert!(home.networks().trust(&join, 0).unwrap().is_none(), "a changed key set is none");
}
