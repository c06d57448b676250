//! What it costs a delivery that the seeder makes notes and acknowledgements durable before it goes on. Two seeders serve
//! the same content from the same disk; one keeps its database on that disk, where a flush takes milliseconds, the other
//! in memory, where it takes none. They take turns, and the ratio of each turn counts, so that other work on the machine
//! falls on both. `cargo bench -p willcall-seeder --bench durable_accounts`
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    dead_code,
    reason = "a bench fails by panicking and prints; the tests' world has more than it needs"
)]

extern crate willcall_seeder as seeder;

#[path = "../tests/seeder/client.rs"]
mod client;
#[path = "../tests/seeder/manager.rs"]
mod manager;
#[path = "../tests/seeder/world.rs"]
mod world;

use std::path::Path;
use std::time::{Duration, Instant};

use protocol::ChunkSet;
use protocol::deliver::{ClientMessage, SeederMessage};
use seeder::Running;

use crate::client::Client;
use crate::world::{CHUNK, Goods, World, stop};

/// Deliveries of 128 MiB and of 1 GiB in chunks of 64 KiB, the smallest there are: the window of 16 MiB is passed many times,
/// and has to double seven times before it is that large, each time after a note. And how many turns of each: one says
/// little on a machine that does other things, ten per cent up or down.
const SIZES: [(usize, usize); 2] = [(2048, 101), (16_384, 31)];
/// What a client acknowledges at a time: a quarter of the window.
const EVERY: u32 = 64;

#[tokio::main(worker_threads = 2)]
async fn main() {
    // Also run, once and without numbers, by `cargo test --benches`.
    let measures = std::env::args().any(|arg| arg == "--bench");
    for (chunks, turns) in if measures { &SIZES[..] } else { &[(64, 1)] } {
        let Some(memory) = memory() else { return println!("left out: /dev/shm is no memory file system here") };
        measure(memory.path(), *chunks, *turns).await;
    }
}

/// So many turns of deliveries of so many chunks.
async fn measure(memory: &Path, chunks: usize, turns: usize) {
    let world = World::new(false).await;
    std::os::unix::fs::symlink(memory, world.path("memory")).unwrap();
    let goods = world.publish(1, chunks);
    let on_disk = world.seeder("disk", &[&goods], |_| {}).await;
    let content = world.path("content-of-memory");
    let in_memory = world.seeder("memory", &[&goods], |config| config.content_dir = content).await;
    let flush = flush_time(&world.path("flush"));
    let size = (chunks * CHUNK) >> 20;
    println!("{size} MiB; one flush of this disk: {:.2} ms", flush.as_secs_f64() * 1000.0);

    let client = Client::new(10).await;
    let mut ratios = Vec::new();
    for turn in 0..turns {
        // Who is first alternates, too.
        let (first, second) = if turn % 2 == 0 { (&on_disk, &in_memory) } else { (&in_memory, &on_disk) };
        let a = deliver(&world, &goods, chunks, &client, first).await;
        let b = deliver(&world, &goods, chunks, &client, second).await;
        let (disk, memory) = if turn % 2 == 0 { (a, b) } else { (b, a) };
        ratios.push(disk.as_secs_f64() / memory.as_secs_f64());
        let rate = |time: Duration| (chunks * CHUNK) as f64 / f64::from(1 << 20) / time.as_secs_f64();
        if turn % 10 == 0 {
            println!("durable {:.0} MiB/s, not {:.0} MiB/s, time ratio {:.3}", rate(disk), rate(memory), ratios[turn]);
        }
    }
    ratios.sort_by(f64::total_cmp);
    let part = |n: usize| ratios[(ratios.len() - 1) * n / 4];
    println!(
        "{size} MiB: median time ratio {:.3}, half of all turns between {:.3} and {:.3}",
        part(2),
        part(1),
        part(3)
    );
    stop(on_disk).await;
    stop(in_memory).await;
}

/// One whole delivery, by a client that checks nothing and acknowledges as an honest one does.
async fn deliver(world: &World, goods: &Goods, chunks: usize, client: &Client, seeder: &Running) -> Duration {
    let at = seeder.peer_addrs();
    let ticket = world.ticket(goods, client.peer(), at.peer);
    let begin = Instant::now();
    let (mut talk, _) = client.begin(&at, &ticket).await;
    talk.want(0..chunks as u32).await;
    let (mut got, mut said) = (0, 0);
    while got < chunks as u32 {
        talk.chunk().await.unwrap();
        got += 1;
        // From two chunks on, while the window grows.
        if got - said >= EVERY.min(got / 2).max(1) {
            said = got;
            let ack = client.ack(world.office.network, &ticket, at.peer, ChunkSet::from_range(0..got));
            talk.say(ClientMessage::Ack(ack)).await;
        }
    }
    talk.say(ClientMessage::Finish { ack: None, completion: None }).await;
    while !matches!(talk.hear().await, Some(SeederMessage::Finished)) {}
    begin.elapsed()
}

fn memory() -> Option<tempfile::TempDir> {
    let mounts = std::fs::read_to_string("/proc/mounts").ok()?;
    let is_memory = mounts.lines().any(|line| line.split(' ').skip(1).take(2).eq(["/dev/shm", "tmpfs"]));
    if is_memory { tempfile::tempdir_in("/dev/shm").ok() } else { None }
}

/// How long it takes to make a page durable.
fn flush_time(path: &Path) -> Duration {
    use std::io::Write;
    let mut file = std::fs::File::create(path).unwrap();
    let begin = Instant::now();
    for _ in 0..20 {
        file.write_all(&[1; 4096]).unwrap();
        file.sync_data().unwrap();
    }
    begin.elapsed() / 20
}
