//! The scenarios with somebody in them who means harm. What the attacker does goes over real connections with keys that
//! are genuinely its own; what is checked is what it got out of it, and that honest buyers got their goods meanwhile.

use std::time::Duration;

use protocol::evidence::EvidencePack;
use protocol::receipt::Receipt;
use protocol::serving::{FIRST_WINDOW, FORGIVE_FIRST_MS, FORGIVE_LONGEST_MS, FORGIVE_TIMES};
use protocol::ticket::TicketEnvelope;
use protocol::{ChunkSet, Keypair, PeerAddrs, TransactionId};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::report::{Fate, Report};
use super::set::{Set, calm, event};
use super::{Options, ScenarioError};
use crate::adversary::{
    Crook, Outcome, PresentError, Tampering, false_receipt, present, signed_anew, take_and_never_acknowledge,
};
use crate::client::Client;
use crate::network::{Network, NetworkError, rows};
use crate::plan::Plan;

const MINUTE: u64 = 60_000;
/// Streams that the taker tries at each seeder.
const TAKES: usize = 3;
/// A line that is only there to be cut or frozen.
const FAST: u64 = 1 << 30;

/// A client and two seeders claim ten times what was sent, and three seeders a delivery that never happened, each all of it
/// and again in new outboxes.
pub(super) async fn collusion(options: Options) -> Result<Report, ScenarioError> {
    let plan = Plan::new(4).manager(|config| config.close_grace_ms = 3000);
    let plan = plan.seeder(|_, config| config.window_wait_ms = 500);
    let mut set = Set::build("collusion", options, plan).await?;
    let start = Instant::now();
    let tenfold = Box::pin(drawn(&mut set, 2)).await?;
    let crooks = crooks(&mut set.network, 3).await?;
    Box::pin(claim_ten_times(&mut set, &tenfold, &crooks, start)).await?;
    let (accomplice, crooked, ticket) = set.sell("accomplice").await?;
    let (honest, id, good) = set.sell("client").await?;
    let chunks = set.product.chunks;
    let network = set.network.manager.running()?.manager().join_line().network();
    // All but one chunk at first: with the last one the delivery is closed, and what comes later does not count at all.
    for claimed in [chunks - 1, chunks, chunks] {
        for crook in &crooks {
            let key = accomplice.home().keypair();
            let claim = (ChunkSet::from_range(0..claimed), chunks);
            let receipt = false_receipt(key, network, &ticket, crook.peer(), claim, 0)?;
            crook.report(vec![receipt]).await?;
        }
        set.happened(start, format!("three seeders report {claimed} chunks each of a delivery that never happened"));
    }
    Box::pin(set.deliver(&honest, &good, Client::options(), calm)).await?;
    let told = set.network.transaction(crooked).await?;
    let (claimed, paid) = (seeder_sum(&told, "acknowledged_bytes"), seeder_sum(&told, "paid_bytes"));
    set.report.figures.insert("claimed_bytes", claimed as f64);
    let detail = format!("{claimed} bytes were claimed and {paid} are paid for, out of the accomplice's own purchase");
    set.report.invariant("claims-are-shared", paid <= set.product.content_bytes && claimed > paid, detail);
    let revoked = told.get("state").and_then(Value::as_str) == Some("revoked");
    set.report.figures.insert("lease_revoked_for_claims", f64::from(u8::from(revoked)));
    set.end(&[id]).await
}

/// A purchase of which a little was really sent, by the first seeders to the client that is in league with them.
struct Drawn {
    client: Client,
    id: TransactionId,
    ticket: TicketEnvelope,
    /// Bytes that each of them sent.
    sent: Vec<u64>,
}

async fn drawn(set: &mut Set, seeders: usize) -> Result<Drawn, ScenarioError> {
    let (client, id, ticket) = set.sell("tenfold").await?;
    let mut sent = Vec::with_capacity(seeders);
    for seeder in set.network.seeders.iter().take(seeders) {
        let at = seeder.at()?;
        sent.push(take_and_never_acknowledge(client.home().keypair(), &ticket, set.product.chunks, &at, 1).await?);
    }
    Ok(Drawn { client, id, ticket, sent })
}

/// Each of the seeders reports what it sent, ten times as much, the same in an outbox that is said to be new, and more than
/// there is; the client signs all of it, and that it has everything.
async fn claim_ten_times(
    set: &mut Set,
    Drawn { client, id, ticket, sent }: &Drawn,
    crooks: &[Crook],
    start: Instant,
) -> Result<(), ScenarioError> {
    let network = set.network.manager.running()?.manager().join_line().network();
    let (all, chunk) =
        (set.product.chunks, set.product.content_bytes.div_ceil(set.product.chunks.max(1).into()).max(1));
    let mut handed_in = Vec::new();
    for round in ["what was sent", "ten times what was sent", "the same again", "more than there is"] {
        for (crook, sent) in crooks.iter().zip(sent) {
            let sent = u32::try_from(sent.div_ceil(chunk)).unwrap_or(all);
            let ten = sent.saturating_mul(10).min(all);
            // A completion goes with what is said to be all.
            let (claimed, whole) = match round {
                "what was sent" => (sent, all),
                "more than there is" => (all.saturating_add(1), u32::MAX),
                _ => (ten, ten),
            };
            let claim = (ChunkSet::from_range(0..claimed), whole);
            let receipt = false_receipt(client.home().keypair(), network, ticket, crook.peer(), claim, 0)?;
            handed_in.push((crook, receipt.id(), format!("{round}: {claimed} of {all} chunks")));
            crook.report(vec![receipt]).await?;
        }
        set.happened(start, format!("two seeders report {round}"));
    }
    let told = set.network.until_state(*id, "settled").await?;
    let (sent, chunks) = (sent.iter().sum::<u64>(), u64::from(all));
    let (claimed, paid) = (seeder_sum(&told, "acknowledged_bytes"), seeder_sum(&told, "paid_bytes"));
    let deliveries = rows(&told, "deliveries");
    let ceiling = deliveries.iter().filter_map(|delivery| delivery.get("ceiling_micros")?.as_u64()).sum::<u64>();
    let micros = seeder_sum(&told, "micros");
    for (name, figure) in [
        ("tenfold_sent_bytes", sent),
        ("tenfold_claimed_bytes", claimed),
        ("tenfold_paid_bytes", paid),
        ("tenfold_paid_micros", micros),
        ("tenfold_ceiling_micros", ceiling),
    ] {
        set.report.figures.insert(name, figure as f64);
    }
    let detail = format!(
        "{sent} bytes were sent, {claimed} claimed and {paid} paid for, with {micros} of at most {ceiling} millionths"
    );
    // Of little goods there is not ten times as much.
    let most = chunks.saturating_mul(chunk);
    let tenfold = sent > 0 && (claimed >= sent.saturating_mul(10) || claimed >= most);
    set.report.invariant("ten-times-within-the-ceiling", tenfold && micros <= ceiling && paid < claimed, detail);

    let (mut explained, of) = (0, handed_in.len());
    for (crook, receipt, claim) in handed_in {
        let Some(told) = crook.explained(&[receipt]).await?.pop() else { continue };
        let (fate, why) = (told.line.fate.as_str(), told.summary());
        explained += usize::from(why.len() > fate.len());
        set.report.fates.push(Fate { seeder: crook.peer(), receipt, claim, fate, why });
    }
    let rejected = set.report.fates.iter().filter(|told| told.fate == "rejected").count();
    let held = of > 0 && explained == of && rejected > 0;
    set.report.invariant(
        "claims-are-explained",
        held,
        format!("{explained} of {of} receipts, {rejected} of them refused"),
    );
    Ok(())
}

/// A client takes from every seeder and acknowledges nothing, and half of the seeders fall silent in mid-delivery.
pub(super) async fn withhold(options: Options) -> Result<Report, ScenarioError> {
    let plan = Plan::new(4).speed(|_| Some(FAST)).seeder(|_, config| config.window_wait_ms = 500);
    // What a seeder sent that fell silent is acknowledged with the client's next fetch: there is none here.
    let plan = plan.manager(|config| config.close_grace_ms = 3000);
    let mut set = Set::build("withhold", options, plan).await?;
    let (taker, _, stolen) = set.sell("taker").await?;
    let (honest, id, ticket) = set.sell("client").await?;
    let start = Instant::now();
    let mut places: Vec<PeerAddrs> = Vec::new();
    for seeder in &set.network.seeders {
        places.push(seeder.at()?);
    }
    let (key, chunks) = (taker.home().keypair().clone(), set.product.chunks);
    let takes = places.iter().map(|at| take_and_never_acknowledge(&key, &stolen, chunks, at, TAKES));
    let taken = futures::future::join_all(takes).await.into_iter().collect::<Result<Vec<u64>, _>>()?;
    set.happened(start, "a client takes what it gets and acknowledges nothing");
    let worst = taken.iter().copied().max().unwrap_or(0);
    let windows = 1 + let_in_again(start.elapsed());
    let most = windows * u64::from(FIRST_WINDOW) * 64 * 1024;
    set.report.figures.insert("worst_loss_bytes", worst as f64);
    set.report.figures.insert("lost_bytes_of_all_seeders", taken.iter().sum::<u64>() as f64);
    let detail = format!(
        "{worst} bytes at one seeder, {windows} first windows at most in its time: {most}, over {TAKES} streams"
    );
    set.report.invariant("worst-loss", worst <= most && worst > 0, detail);

    let mut slow = Client::slow_options((options.bytes / 4).max(1 << 18));
    slow.limits.scheduler.stall_ms = 1000;
    let disturb = async |network: &mut Network, over: &CancellationToken, start: Instant| {
        tokio::select! {
            () = over.cancelled() => return Ok(Vec::new()),
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
        network.seeders.iter().take(2).filter_map(|seeder| seeder.line()).for_each(crate::Line::freeze);
        let events = vec![event(start, "seeders 0 and 1 fall silent, their connections stay open")];
        over.cancelled().await;
        network.seeders.iter().filter_map(|seeder| seeder.line()).for_each(crate::Line::mend);
        Ok(events)
    };
    Box::pin(set.deliver(&honest, &ticket, slow, disturb)).await?;
    set.end(&[id]).await
}

/// How often a client that acknowledges nothing may have been let in again within this time.
fn let_in_again(time: Duration) -> u64 {
    let mut waited = Duration::ZERO;
    (0..FORGIVE_TIMES)
        .take_while(|times| {
            let wait = FORGIVE_FIRST_MS.saturating_mul(1 << times).min(FORGIVE_LONGEST_MS);
            waited += Duration::from_millis(wait);
            waited <= time
        })
        .count() as u64
}

/// Everything that was said once is said again by those who may not: a ticket by another peer, a ticket with parts left
/// out or changed, and receipts in new outboxes.
pub(super) async fn replay(options: Options) -> Result<Report, ScenarioError> {
    let plan = Plan::new(3).manager(|config| config.close_grace_ms = 3000);
    let mut set = Set::build("replay", options, plan).await?;
    let (client, id, ticket) = set.sell("client").await?;
    let thief = set.network.client("thief").await?;
    let start = Instant::now();
    let at = set.network.seeders.last().map(crate::Seeder::at).transpose()?;
    let at = at.ok_or_else(|| NetworkError::Down("seeder".to_owned()))?;
    set.happened(start, "a ticket is shown by those who may not, or after it was changed");
    let mut shown = 0;
    for (who, tampering, wanted) in [
        (&thief, Tampering::None, "wrong-client"),
        (&client, Tampering::NoEndorsement, "bad-endorsement"),
        (&client, Tampering::ForgedLease, "bad-manager-signature"),
    ] {
        let said = said(present(who.home().keypair(), &ticket, tampering, &at).await)?;
        shown += u32::from(said == wanted);
    }
    set.report.invariant("no-byte-without-the-right", shown == 3, format!("{shown} of 3 refused by their names"));
    Box::pin(set.deliver(&client, &ticket, Client::options(), calm)).await?;
    let before = set.network.until_state(id, "settled").await?;

    // The very receipts that were paid, from the seeders that had them paid, as if they were new.
    let receipts = receipts_of(&set.network, id).await?;
    let crooks = crooks(&mut set.network, 3).await?;
    let mut again = 0;
    for crook in &crooks {
        let own: Vec<Receipt> = receipts.iter().filter(|r| is_to(r, crook)).cloned().collect();
        for _ in 0..3 {
            again += own.len();
            crook.report(own.clone()).await?;
        }
    }
    set.happened(start, format!("{again} receipts are sent again in outboxes that nobody has seen"));
    let after = set.network.transaction(id).await?;
    let paid = |sale: &Value| (seeder_sum(sale, "micros"), sale.pointer("/deliveries/0/cost").cloned());
    let detail = format!("paid {} millionths before and {} after", paid(&before).0, paid(&after).0);
    set.report.invariant("receipts-count-once", again > 0 && paid(&before) == paid(&after), detail);
    set.end(&[id]).await
}

/// Leases and acknowledgements of clocks that are off: a little is borne, more is refused with the refuser's clock.
pub(super) async fn clock_skew(options: Options) -> Result<Report, ScenarioError> {
    let plan = Plan::new(3).manager(|config| config.close_grace_ms = 3000);
    let mut set = Set::build("clock-skew", options, plan).await?;
    let (late, skewed, probe) = set.sell("probe").await?;
    let (client, id, ticket) = set.sell("client").await?;
    let at = set.network.seeders.first().map(crate::Seeder::at).transpose()?;
    let at = at.ok_or_else(|| NetworkError::Down("seeder".to_owned()))?;
    let key = set.network.manager.network_key(&probe.ticket.lease.signer())?;
    let now = probe.ticket.lease.peek()?.start;
    let mut right = Vec::new();
    for (start, end, wanted) in [
        (now + 5 * MINUTE, now + 60 * MINUTE, "served"),
        (now + 60 * MINUTE, now + 120 * MINUTE, "not-yet-valid"),
        (now.saturating_sub(60 * MINUTE), now.saturating_sub(5 * MINUTE), "served"),
        (now.saturating_sub(120 * MINUTE), now.saturating_sub(60 * MINUTE), "expired"),
    ] {
        let shifted = signed_anew(&probe, &key, |lease| (lease.start, lease.end) = (start, end))?;
        let outcome = present(late.home().keypair(), &shifted, Tampering::None, &at).await;
        let clock = match &outcome {
            Ok(Outcome::Refused(refusal)) => refusal.now > 0,
            _ => true,
        };
        right.push(said(outcome)? == wanted && clock);
    }
    let detail = "five minutes off are borne, an hour is refused by name and with the seeder's clock";
    set.report.invariant("grace-both-ways", right.iter().all(|right| *right), format!("{detail}: {right:?}"));

    // A client whose clock is an hour ahead signs its acknowledgements with that time: they count all the same.
    let start = Instant::now();
    let crooks = crooks(&mut set.network, 1).await?;
    let network = set.network.manager.running()?.manager().join_line().network();
    for crook in &crooks {
        let (key, chunks) = (late.home().keypair(), set.product.chunks);
        let claim = (ChunkSet::from_range(0..chunks), chunks);
        let receipt = false_receipt(key, network, &probe, crook.peer(), claim, 60 * MINUTE)?;
        crook.report(vec![receipt]).await?;
    }
    set.happened(start, "a client whose clock is an hour ahead acknowledges a delivery");
    Box::pin(set.deliver(&client, &ticket, Client::options(), calm)).await?;
    set.end(&[id, skewed]).await
}

/// The network falls apart: first one half of the seeders and the manager are away, then the other half.
pub(super) async fn partition(options: Options) -> Result<Report, ScenarioError> {
    let plan = Plan::new(4).speed(|_| Some(FAST)).manager(|config| config.close_grace_ms = 3000);
    let mut set = Set::build("partition", options, plan).await?;
    let (client, id, ticket) = set.sell("client").await?;
    let slow = Client::slow_options((options.bytes / 6).max(1 << 18));
    let disturb = async |network: &mut Network, over: &CancellationToken, start: Instant| {
        let mut events = Vec::new();
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        tick.tick().await;
        network.manager.crash().await;
        for round in 0..60usize {
            let (away, here) = ([0, 1], [2, 3]);
            let (away, here) = if round % 2 == 0 { (away, here) } else { (here, away) };
            // The connections that are open break: both sides find out only then that they are apart.
            lines(network, here).for_each(crate::Line::mend);
            lines(network, away).for_each(crate::Line::cut);
            events.push(event(start, format!("seeders {} and {} and the manager are away", away[0], away[1])));
            tokio::select! {
                biased;
                () = over.cancelled() => break,
                () = async { tick.tick().await; tick.tick().await; } => {}
            }
        }
        lines(network, [0, 1]).chain(lines(network, [2, 3])).for_each(crate::Line::mend);
        network.manager.start().await?;
        events.push(event(start, "everybody is back"));
        Ok(events)
    };
    Box::pin(set.deliver(&client, &ticket, slow, disturb)).await?;
    set.end(&[id]).await
}

fn lines(network: &Network, which: [usize; 2]) -> impl Iterator<Item = &crate::Line> {
    which.into_iter().filter_map(|number| network.seeders.get(number)?.line())
}

/// Stops the first seeders and hands out their keys.
async fn crooks(network: &mut Network, count: usize) -> Result<Vec<Crook>, ScenarioError> {
    let manager = network.manager.at()?;
    let mut crooks = Vec::new();
    for seeder in network.seeders.iter_mut().take(count) {
        seeder.stop().await?;
        let key: Keypair = seeder.keypair()?;
        crooks.push(Crook::new(key, manager.clone()));
    }
    Ok(crooks)
}

fn is_to(receipt: &Receipt, crook: &Crook) -> bool {
    receipt.ack.peek().is_ok_and(|ack| ack.seeder == crook.peer())
}

/// The receipts of a sale, out of the evidence that the manager keeps.
async fn receipts_of(network: &Network, id: TransactionId) -> Result<Vec<Receipt>, ScenarioError> {
    let path = network.dir().join(format!("{id}.evidence"));
    network.manager.control(json!({"cmd": "evidence", "id": id, "path": path})).await?;
    let pack = EvidencePack::from_bytes(&std::fs::read(&path)?).map_err(std::io::Error::other)?;
    let receipt = |ack| Receipt { ack, completion: pack.completions.first().cloned(), first_at: 0, last_at: 0 };
    Ok(pack.acks.iter().cloned().map(receipt).collect())
}

/// What a seeder said to a ticket: `served`, or the name of its refusal.
fn said(outcome: Result<Outcome, PresentError>) -> Result<String, ScenarioError> {
    Ok(match outcome? {
        Outcome::Served { .. } | Outcome::ShutOut { .. } => "served".to_owned(),
        Outcome::Refused(refusal) => refusal.code.as_str().to_owned(),
    })
}

fn seeder_sum(sale: &Value, name: &str) -> u64 {
    let deliveries = rows(sale, "deliveries");
    let seeders = deliveries.iter().flat_map(|delivery| rows(delivery, "seeders"));
    seeders.filter_map(|seeder| seeder.get(name)?.as_u64()).sum()
}
