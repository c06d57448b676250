//! What a client can take without acknowledging it, in figures: at one seeder and over a mesh of fifty, by silence, by
//! stopping half way, by coming back a thousand times, across crashes of the seeders. `docs/protocol.md` has the table;
//! `cargo test -p willcall-protocol --test worst_losses -- --nocapture` prints it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "tests fail by panicking, and print what they found"
)]

extern crate willcall_protocol as protocol;

mod world;

use protocol::deliver::ClientMessage;
use protocol::serving::{FORGIVENESS, ServeAccount, ServeAction, ServeMachine, ServeTerms};
use protocol::{ChunkSet, Signed};
use world::*;

/// Of 1 MiB.
const CHUNKS: u32 = 400;
const MESH: usize = 50;
const LISTED: usize = 32;

/// A seeder with one delivery, and what the client got from it.
struct Seeder {
    terms: ServeTerms,
    disk: ServeAccount,
    machine: ServeMachine,
    sent: u32,
    acked: ChunkSet,
}

impl Seeder {
    fn new(listed: bool) -> Seeder {
        let terms = ServeTerms {
            network: network(),
            seeder: seeder().peer_id(),
            grant: grant(listed, u64::from(CHUNKS) * 5 / 4 * MIB),
            chunks: CHUNKS,
            chunk_size: 1 << 20,
            segments: 1,
            idle_ms: 60_000,
            window_wait_ms: 30_000,
        };
        let machine = machine(&terms, &ServeAccount::default());
        Seeder { terms, disk: ServeAccount::default(), machine, sent: 0, acked: ChunkSet::new() }
    }

    /// The client asks for everything and takes what comes.
    fn draw(&mut self) {
        let chunks = ChunkSet::from_range(0..CHUNKS).difference(&ChunkSet::from_range(0..self.sent));
        self.machine.message(ClientMessage::Want { chunks }, NOW).unwrap();
        while let Some(action) = self.machine.next_action(NOW) {
            match action {
                ServeAction::Persist(account) => {
                    self.disk = account;
                    self.machine.persisted();
                }
                ServeAction::SendChunk(_) => self.sent += 1,
                _ => {}
            }
        }
    }

    /// The client acknowledges all that it got.
    fn acknowledge(&mut self) {
        self.acked = ChunkSet::from_range(0..self.sent);
        let ack = ack_of(self.acked.clone(), NOW);
        self.machine.message(ClientMessage::Ack(Signed::sign(&ack, &client())), NOW).unwrap();
    }

    /// `kill -9`: only what is on disk is left.
    fn kill(&mut self) {
        self.machine = machine(&self.terms, &self.disk);
    }

    /// The stream ends in order.
    fn close(&mut self) {
        self.disk = self.machine.closing_account();
        self.kill();
    }

    /// Chunks sent that nobody pays for.
    fn lost(&self) -> u32 {
        self.sent - self.acked.len()
    }
}

fn machine(terms: &ServeTerms, disk: &ServeAccount) -> ServeMachine {
    ServeMachine::new(terms.clone(), ChunkSet::from_range(0..CHUNKS), disk.clone(), None, NOW).unwrap()
}

#[test]
fn what_a_seeder_can_lose_to_one_client() {
    println!("client                                    listed  unlisted  (chunks of 1 MiB)");
    let both = |what: &str, play: &dyn Fn(&mut Seeder)| {
        let lost = [true, false].map(|listed| {
            let mut seeder = Seeder::new(listed);
            play(&mut seeder);
            seeder.lost()
        });
        println!("{what:<42}{:>5}{:>10}", lost[0], lost[1]);
        lost
    };
    assert_eq!(both("never acknowledges", &|seeder| seeder.draw()), [2, 2]);
    let thousand = |seeder: &mut Seeder| {
        for round in 0..1000 {
            seeder.draw();
            match round % 3 {
                0 => seeder.close(),
                _ => seeder.kill(),
            }
        }
    };
    assert_eq!(both("never, and reconnects 1000 times", &thousand), [2, 2]);
    let half_way = |seeder: &mut Seeder| {
        seeder.draw();
        while seeder.sent < CHUNKS / 2 {
            seeder.acknowledge();
            seeder.draw();
        }
    };
    let [listed, unlisted] = both("stops half way", &half_way);
    // The largest window, and an eighth of what was acknowledged.
    assert!(listed <= 16 + CHUNKS / 2 / FORGIVENESS && listed > 16, "{listed}");
    assert!(unlisted <= 2 + CHUNKS / 2 / FORGIVENESS, "{unlisted}");
    let and_back = both("stops half way, reconnects 1000 times", &|seeder| {
        half_way(seeder);
        thousand(seeder);
    });
    assert_eq!(and_back, [listed, unlisted], "coming back buys nothing");
    let to_the_end = both("takes all, last window unacknowledged", &|seeder| {
        seeder.draw();
        while seeder.sent < CHUNKS {
            seeder.acknowledge();
            seeder.draw();
        }
    });
    assert!(to_the_end[0] <= 16 + CHUNKS / FORGIVENESS, "{to_the_end:?}");
}

#[test]
fn what_a_mesh_of_fifty_can_lose_to_one_client() {
    let mesh = || (0..MESH).map(|n| Seeder::new(n < LISTED)).collect::<Vec<_>>();
    let lost = |mesh: &[Seeder]| mesh.iter().map(Seeder::lost).sum::<u32>();

    let mut silent = mesh();
    for round in 0..10 {
        silent.iter_mut().for_each(Seeder::draw);
        silent.iter_mut().for_each(if round % 2 == 0 { Seeder::kill } else { Seeder::close });
    }
    let never = lost(&silent);
    assert_eq!(never, 2 * u32::try_from(MESH).unwrap());

    // It pays everybody for its share of the goods, and then takes what each lets out.
    let mut paying = mesh();
    let share = CHUNKS / u32::try_from(MESH).unwrap();
    for seeder in &mut paying {
        seeder.draw();
        while seeder.sent < share {
            seeder.acknowledge();
            seeder.draw();
        }
        seeder.acknowledge();
        seeder.draw();
        seeder.kill();
        seeder.draw();
    }
    let stopped = lost(&paying);
    for seeder in &paying {
        let most = if seeder.terms.grant.listed { 16 } else { 2 };
        assert!(
            seeder.lost() <= most + seeder.acked.len() / FORGIVENESS,
            "{} of {}",
            seeder.lost(),
            seeder.acked.len()
        );
    }
    println!("mesh of {MESH}, {LISTED} listed, content of {CHUNKS} chunks: never acknowledges {never},");
    println!(
        "pays each for its share and then stops {stopped} ({} paid)",
        paying.iter().map(|s| s.acked.len()).sum::<u32>()
    );
}
