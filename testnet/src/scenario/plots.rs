//! The scenarios themselves: who is there, what is done to them while goods are on their way, and what must hold.

use std::sync::Arc;
use std::time::Duration;

use client_node::{FetchOptions, Target};
use delivery::{Pace, Rate};
use protocol::{ChunkSet, PeerId};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::report::{Event, Report, causes, since};
use super::set::{Set, calm, event};
use super::{Options, ScenarioError};
use crate::client::Client;
use crate::network::Network;
use crate::plan::Plan;

const MIB: u64 = 1024 * 1024;
/// Seeders that come and go at most: a delivery that takes longer has failed anyway.
const ROUNDS: usize = 120;

/// From one seeder that joins to the next.
const ROUND: Duration = Duration::from_secs(1);
/// Bytes a second that come while a round takes longer than that.
const TRICKLE: u64 = 16 * 1024;

/// A seeder leaves and another joins every second.
pub(super) async fn churn(options: Options) -> Result<Report, ScenarioError> {
    // A copy for everybody who joins, as soon as it joins.
    let plan = Plan::new(4).copies(200).manager(|config| {
        config.seeder_away_ms = 4000;
        config.seeder_lost_ms = 6000;
        config.close_grace_ms = 3000;
    });
    let mut set = Set::build("churn", options, plan).await?;
    let (client, id, ticket) = set.sell("client").await?;
    // What stays is the churn: the origin, which would carry a delivery alone, goes too.
    set.network.manager.crash_origin().await?;
    // The goods last ten rounds.
    let usual = (options.bytes / 10).max(MIB / 4);
    let rate = Rate::new(usual);
    let slow = FetchOptions { process_pace: Arc::new(Pace::new(rate.clone())), ..Client::options() };
    let disturb = async |network: &mut Network, over: &CancellationToken, start: Instant| {
        let mut events = Vec::new();
        let mut tick = tokio::time::interval(ROUND);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        tick.tick().await;
        let mut oldest = 0;
        for _ in 0..ROUNDS {
            tokio::select! {
                biased;
                () = over.cancelled() => break,
                _ = tick.tick() => {}
            }
            if rate.get() != usual {
                rate.set(usual);
            }
            let round = come_and_go(network, &mut oldest, start, &mut events);
            // On a machine that needs longer for a round the goods would be there before enough had left.
            let held_up = async {
                tokio::time::sleep(ROUND).await;
                rate.set(TRICKLE);
            };
            let mut round = std::pin::pin!(round);
            tokio::select! {
                done = &mut round => done?,
                () = held_up => round.await?,
            }
        }
        rate.set(usual);
        Ok(events)
    };
    Box::pin(set.deliver(&client, &ticket, slow, disturb)).await?;
    let came = set.network.seeders.len().saturating_sub(4);
    set.report.figures.insert("seeders_joined", came as f64);
    let left = set.network.seeders.iter().filter(|seeder| seeder.running().is_err()).count();
    set.expect_left(left, came);
    set.end(&[id]).await
}

/// A seeder joins, and the oldest one leaves.
async fn come_and_go(
    network: &mut Network,
    oldest: &mut usize,
    start: Instant,
    events: &mut Vec<Event>,
) -> Result<(), ScenarioError> {
    let joined = network.add_seeder().await?;
    events.push(event(start, format!("seeder {joined} joins")));
    // One that has not got anything yet is of no use: those who leave wait for their copies.
    let holders = futures::future::join_all(network.seeders.iter().skip(*oldest + 1).map(|s| s.holds(1))).await;
    if holders.iter().filter(|holds| **holds).count() == 0 {
        events.push(event(start, "nobody leaves: nobody else has a whole copy yet"));
        return Ok(());
    }
    if let Some(seeder) = network.seeders.get_mut(*oldest) {
        events.push(event(start, format!("seeder {oldest} leaves")));
        seeder.stop().await?;
        *oldest += 1;
    }
    Ok(())
}

/// No seeder holds everything: each chunk is at two of four, the origin and the manager are gone.
pub(super) async fn partial_holders(options: Options) -> Result<Report, ScenarioError> {
    let mut set = Set::build("partial-holders", options, Plan::new(4)).await?;
    let (client, id, ticket) = set.sell("client").await?;
    set.network.manager.crash().await;
    for (number, seeder) in (0u64..).zip(&set.network.seeders) {
        let Some(content) = seeder.running()?.contents().get(&set.product.manifest) else { continue };
        let mut gone = ChunkSet::new();
        // Runs of eight: nobody's part is a single chunk here and there.
        for chunk in 0..set.product.chunks {
            let part = (u64::from(chunk) / 8).wrapping_add(options.seed) % 4;
            if part != number && (part + 1) % 4 != number {
                gone.insert_range(chunk..chunk + 1);
            }
        }
        tokio::task::spawn_blocking(move || content.forget(&gone)).await.map_err(std::io::Error::other)??;
    }
    Box::pin(set.deliver(&client, &ticket, Client::options(), calm)).await?;
    set.expect_few_duplicates();
    set.network.manager.start().await?;
    set.end(&[id]).await
}

/// Seeders behind links of 1, 4 and 16 units of speed.
pub(super) async fn mixed_links(options: Options) -> Result<Report, ScenarioError> {
    // All together take about eight seconds.
    let unit = (options.bytes / (21 * 8)).max(32 * 1024);
    let speeds = [unit, 4 * unit, 16 * unit];
    let mut set = Set::build("mixed-links", options, Plan::new(3).speed(move |n| speeds.get(n).copied())).await?;
    let (client, id, ticket) = set.sell("client").await?;
    set.network.manager.crash_origin().await?;
    Box::pin(set.deliver(&client, &ticket, Client::options(), calm)).await?;
    set.expect_few_duplicates();
    let ideal = set.product.content_bytes as f64 / (21 * unit) as f64 * 1000.0;
    set.expect_near_ideal(ideal);
    set.end(&[id]).await
}

/// One of eight seeders sends something else than the goods.
pub(super) async fn corrupt_seeder(options: Options) -> Result<Report, ScenarioError> {
    let plan = Plan::new(8).manager(|config| config.close_grace_ms = 3000);
    let mut set = Set::build("corrupt-seeder", options, plan).await?;
    // Its memory turns bits over after it checked what it read: what its disk does it would find by itself.
    let number = usize::try_from(options.seed % 8).unwrap_or(0);
    let mut bad: Option<PeerId> = None;
    if let Some(seeder) = set.network.seeders.get(number) {
        bad = Some(seeder.peer());
        seeder.running()?.turn_bits(true);
    }
    let (client, id, ticket) = set.sell("client").await?;
    set.network.manager.crash_origin().await?;
    Box::pin(set.deliver(&client, &ticket, Client::options(), calm)).await?;
    let dropped = set.report.sources.iter().filter(|source| source.banned);
    let (banned, innocent): (Vec<_>, Vec<_>) = dropped.partition(|source| Some(source.peer) == bad);
    let (banned, innocent) = (banned.len(), innocent.len());
    set.report.invariant("honest-seeders-kept", innocent == 0, format!("{innocent} honest seeders were dropped"));
    set.report.invariant("damage-noticed", banned > 0, format!("dropped by {banned} clients"));
    set.report.figures.insert("banned", banned as f64);
    set.end(&[id]).await
}

/// The manager and the origin go away while six clients fetch, and come back when all have their goods.
pub(super) async fn manager_away(options: Options) -> Result<Report, ScenarioError> {
    let plan = Plan::new(4).manager(|config| config.close_grace_ms = 20_000);
    let mut set = Set::build("manager-away", options, plan).await?;
    let mut sold = Vec::new();
    for number in 0..6 {
        sold.push(set.sell(&format!("client-{number}")).await?);
    }
    let start = Instant::now();
    let mut fetches = Vec::new();
    for (client, id, ticket) in &sold {
        let slow = Client::slow_options((options.bytes / 5).max(MIB / 4));
        let mut fetch = client.fetch(Target::Envelope(Box::new(ticket.clone())), slow);
        fetch.chunks(1).await.map_err(crate::NetworkError::from)?;
        fetches.push((*id, fetch));
    }
    let origin = set.network.manager.origin()?;
    set.network.manager.crash().await;
    set.happened(start, "the manager and the origin go away");
    let mut delivered = Vec::new();
    for (id, fetch) in fetches {
        let watch = fetch.watch();
        let (result, seen) = tokio::join!(fetch.done(), causes(watch, start));
        set.report.causes.extend(seen);
        // What the origin sent last nobody could acknowledge to it any more.
        let sources = result.iter().flat_map(|outcome| &outcome.sources).filter(|source| source.peer != origin);
        delivered.push((id, sources.map(|source| u64::from(source.chunks)).sum::<u64>()));
        set.report.take(result, &set.goods)?;
    }
    set.report.time_ms = since(start);
    set.network.manager.start().await?;
    let back = Instant::now();
    set.happened(start, "the manager is back");
    // Receipts wait at the seeders with growing pauses; each of them must come and be counted before a delivery is closed.
    let sent = u64::from(set.product.chunks) * set.report.deliveries;
    let twice = set.report.duplicate_bytes.div_ceil(64 * 1024);
    let mut counted = 0;
    for (id, chunks) in &delivered {
        counted += set.network.until_counted(*id, *chunks).await?;
    }
    let least = delivered.iter().map(|(_, chunks)| chunks).sum::<u64>();
    let detail = format!("{counted} chunks are counted, of {sent} ({least} not from the origin) and {twice} twice");
    set.report.invariant("counted-once", (least..=sent + twice).contains(&counted), detail);
    set.report.figures.insert("chunks_delivered", sent as f64);
    set.report.figures.insert("chunks_counted", counted as f64);
    set.report.figures.insert("counted_after_ms", since(back) as f64);
    let ids: Vec<_> = sold.iter().map(|(_, id, _)| *id).collect();
    set.end(&ids).await
}
