//! What every scenario is played with: a network with goods on sale, its buyers, and at the end the invariants that hold
//! whatever was done to it.

use std::collections::BTreeMap;

use client_node::{FetchOptions, Target};
use protocol::ticket::TicketEnvelope;
use protocol::{Amount, TransactionId};
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::report::{Event, Receipts, Report, Unpaid, causes, since};
use super::{Options, ScenarioError};
use crate::client::Client;
use crate::goods::Goods;
use crate::network::{Network, Terms, rows};
use crate::plan::Plan;

/// A healthy network fetches no larger part twice …
const MOST_TWICE: f64 = 0.02;
/// … of goods with at least so many chunks: the end game of a small delivery is most of it.
const MANY_CHUNKS: u32 = 500;
/// With so many chunks seeders of different speeds take so many times as long as their lines together need at most.
const MOST_OVER_IDEAL: f64 = 1.1;
/// Where somebody on this machine waited for a processor during so much of the time, a time that is longer says nothing of the
/// network.
const MACHINE_BUSY: f64 = 0.25;
/// Churn is that so many seeders leave …
const LEAVE: usize = 3;
/// … in a delivery that lasts so many seconds: copies take their time.
const CHURN_ROUNDS: usize = 6;
/// Notes of receipts that are looked at, the newest.
const LINES: usize = 1000;
/// Millionths in a minor unit.
const MICROS: u64 = 1_000_000;

/// A network with goods on sale.
pub(super) struct Set {
    pub(super) network: Network,
    pub(super) goods: Goods,
    pub(super) product: manager_node::Published,
    pub(super) report: Report,
    /// Every purchase, for the invariants at the end.
    sold: Vec<TransactionId>,
}

impl Set {
    pub(super) async fn build(name: &str, options: Options, plan: Plan) -> Result<Set, ScenarioError> {
        let network = Network::start(plan.goods_of(options.bytes)).await?;
        let goods = Goods::write(network.dir(), name, options.bytes, options.seed)?;
        let product = network.publish(&goods, &Terms::default()).await?;
        Ok(Set { network, goods, product, report: Report::new(name, options.seed), sold: Vec::new() })
    }

    /// A client that has met the network, and its ticket.
    pub(super) async fn sell(&mut self, name: &str) -> Result<(Client, TransactionId, TicketEnvelope), ScenarioError> {
        let client = self.network.client(name).await?;
        let (id, ticket) = self.network.ticket(&client, self.product.product).await?;
        client_node::inbox(client.home(), Some(&ticket.join), &client_node::LinkOptions::default()).await?;
        self.sold.push(id);
        Ok((client, id, ticket))
    }

    /// One delivery, during which `disturb` has the network.
    pub(super) async fn deliver<F>(
        &mut self,
        client: &Client,
        ticket: &TicketEnvelope,
        options: FetchOptions,
        disturb: F,
    ) -> Result<(), ScenarioError>
    where
        F: AsyncFnOnce(&mut Network, &CancellationToken, Instant) -> Result<Vec<Event>, ScenarioError>,
    {
        let (start, over) = (Instant::now(), CancellationToken::new());
        let waited_before = waited_for_processors_ms();
        let fetch = client.fetch(Target::Envelope(Box::new(ticket.clone())), options);
        let watching = causes(fetch.watch(), start);
        let fetching = async {
            let result = fetch.done().await;
            over.cancel();
            (result, since(start))
        };
        let ((result, time_ms), causes, events) =
            tokio::join!(fetching, watching, Box::pin(disturb(&mut self.network, &over, start)));
        self.report.time_ms += time_ms;
        if let (Some(before), Some(now)) = (waited_before, waited_for_processors_ms()) {
            *self.report.figures.entry("machine_busy_ms").or_default() += now - before;
        }
        self.report.causes.extend(causes);
        self.report.events.extend(events?);
        self.report.take(result, &self.goods)?;
        Ok(())
    }

    /// Notes something that was done to the network, `start` being the moment from which time is told.
    pub(super) fn happened(&mut self, start: Instant, what: impl Into<String>) {
        self.report.events.push(event(start, what));
    }

    /// Waits for the settlement of `settle`, checks what always holds, and ends the network.
    pub(super) async fn end(mut self, settle: &[TransactionId]) -> Result<Report, ScenarioError> {
        let mut unsettled = Vec::new();
        for id in settle {
            // One that does not is part of what is reported.
            if let Err(error) = self.network.until_state(*id, "settled").await {
                unsettled.push(error.to_string());
            }
        }
        let (settled, of) = (settle.len() - unsettled.len(), settle.len());
        if of > 0 {
            let detail =
                format!("{settled} of {of} sales{}", unsettled.iter().map(|e| format!("; {e}")).collect::<String>());
            self.report.invariant("sales-settle", unsettled.is_empty(), detail);
        }
        let (done, all) = (self.report.completed, self.report.deliveries);
        self.report.invariant("every-honest-buyer-complete", done == all, format!("{done} of {all} deliveries"));
        if self.network.manager.running().is_ok() {
            self.money().await?;
            self.report.receipts = Some(self.receipts().await?);
        }
        self.network.stop().await?;
        Ok(self.report.finish())
    }

    /// Of every sale no chunk is paid twice and nobody is paid beyond the ceiling; and the books are even.
    async fn money(&mut self) -> Result<(), ScenarioError> {
        let (mut paid_bytes, mut twice, mut micros, mut over) = (0, 0, 0, 0);
        for id in &self.sold {
            let sale = self.network.transaction(*id).await?;
            for delivery in rows(&sale, "deliveries") {
                let number = |name: &str| delivery.get(name).and_then(Value::as_u64).unwrap_or(0);
                let seeders = rows(&delivery, "seeders");
                let sum = |name: &str| seeders.iter().filter_map(|s| s.get(name)?.as_u64()).sum::<u64>();
                let (bytes, pay, ceiling) = (sum("paid_bytes"), sum("micros"), number("ceiling_micros"));
                paid_bytes += bytes;
                micros += pay;
                twice += u64::from(bytes > number("bytes"));
                // What is charged is rounded up to the minor unit at most.
                over += u64::from(pay > ceiling || number("cost") > ceiling.div_ceil(MICROS));
            }
        }
        let sold = self.sold.len();
        self.report.invariant("no-double-pay", twice == 0, format!("{paid_bytes} bytes are paid for in {sold} sales"));
        let paid = Amount { minor: micros / MICROS, currency: protocol::Currency::USD };
        self.report.invariant(
            "cap-held",
            over == 0,
            format!("{over} of {sold} sales above their ceiling, {paid} paid in all"),
        );
        match self.network.books().await {
            Ok(books) => {
                let (debits, credits) = (books.debits, books.credits);
                self.report.invariant("books-even", true, format!("debits {debits} = credits {credits}, in cents"));
                self.report.books = Some(books);
            }
            Err(error) => self.report.invariant("books-even", false, error.to_string()),
        }
        Ok(())
    }

    /// What seeders sent, what of it was acknowledged and paid, and why the rest is not.
    async fn receipts(&self) -> Result<Receipts, ScenarioError> {
        let (mut receipts, mut seeders) = (Receipts::default(), BTreeMap::<String, (u64, u64, u64, bool)>::new());
        for source in &self.report.sources {
            seeders.entry(source.peer.to_string()).or_default().0 += source.bytes;
        }
        for id in &self.sold {
            let sale = self.network.transaction(*id).await?;
            for delivery in rows(&sale, "deliveries") {
                let capped = delivery.get("capped") == Some(&Value::Bool(true));
                for line in rows(&delivery, "seeders") {
                    let number = |name: &str| line.get(name).and_then(Value::as_u64).unwrap_or(0);
                    let name = line.get("seeder").and_then(Value::as_str).unwrap_or_default().to_owned();
                    let (_, acknowledged, paid, over) = seeders.entry(name).or_default();
                    *acknowledged += number("acknowledged_bytes");
                    *paid += number("paid_bytes");
                    *over |= capped;
                }
            }
        }
        for (seeder, (sent, acknowledged, paid, capped)) in seeders {
            receipts.acknowledged_bytes += acknowledged;
            receipts.paid_bytes += paid;
            let shared = match capped {
                true => "the delivery's ceiling was reached",
                false => "acknowledged to another seeder, too: paid once",
            };
            // A client's acknowledgement that does not come is one that the seeder had no receipt to make of.
            let silent = "no receipt of it came before the delivery was closed";
            for (bytes, because) in
                [(acknowledged.saturating_sub(paid), shared), (sent.saturating_sub(acknowledged), silent)]
            {
                if bytes > 0 {
                    receipts.unpaid.push(Unpaid { seeder: seeder.clone(), bytes, because });
                }
            }
        }
        let noted = self.network.manager.control(serde_json::json!({"cmd": "receipts", "limit": LINES})).await?;
        let sold: Vec<String> = self.sold.iter().map(ToString::to_string).collect();
        for note in rows(&noted, "receipts") {
            let field = |name: &str| note.get(name).and_then(Value::as_str).unwrap_or_default();
            if ["rejected", "unknown"].contains(&field("status")) && sold.iter().any(|id| id == field("transaction")) {
                *receipts.rejected.entry(format!("{}: {}", field("code"), field("reason"))).or_default() += 1;
            }
        }
        Ok(receipts)
    }

    /// Nobody's line was idle for long: from the first chunk to the end it took hardly longer than `ideal_ms`, which all lines
    /// together need for the bytes. What comes before is told and not judged: connections, the ticket, the first chunk.
    pub(super) fn expect_near_ideal(&mut self, ideal_ms: f64) {
        let first = self.report.figures.get("first_chunk_ms").copied().unwrap_or(0.0);
        let took = (self.report.time_ms as f64 - first).max(0.0);
        self.report.figures.insert("ideal_ms", ideal_ms);
        self.report.figures.insert("time_to_ideal", took / ideal_ms);
        if self.has_many_chunks("near-ideal") {
            let detail = format!(
                "{took:.0} ms from the first chunk to the end, where all lines together need {ideal_ms:.0} ms; {first:.0} ms \
                 before it"
            );
            let near = took <= ideal_ms * MOST_OVER_IDEAL;
            let busy = self.report.figures.get("machine_busy_ms").copied().unwrap_or(0.0);
            // With other work beside it a machine is no judge of what the lines could do, unless they did it.
            if !near && says_nothing(self.report.time_ms as f64, busy, took - ideal_ms * MOST_OVER_IDEAL) {
                let why = format!("this machine's processors were waited for during {busy:.0} ms; {detail}");
                self.report.not_judged("near-ideal", why);
            } else {
                self.report.invariant("near-ideal", near, detail);
            }
        }
    }

    /// Are there enough of them for this invariant? If not, the report says so.
    fn has_many_chunks(&mut self, invariant: &'static str) -> bool {
        let chunks = self.product.chunks;
        if chunks < MANY_CHUNKS {
            self.report
                .not_judged(invariant, format!("the goods have {chunks} chunks, and it holds from {MANY_CHUNKS} on"));
        }
        chunks >= MANY_CHUNKS
    }

    /// So many left while goods were on their way; of a delivery that was over too soon for that nothing is said.
    pub(super) fn expect_left(&mut self, left: usize, rounds: usize) {
        self.report.figures.insert("seeders_left", left as f64);
        if rounds < CHURN_ROUNDS {
            self.report.not_judged("seeders-left", format!("the delivery was over after {rounds} seconds"));
        } else {
            let detail = format!("{left} seeders left while goods were on their way, {LEAVE} at least had to");
            self.report.invariant("seeders-left", left >= LEAVE, detail);
        }
    }

    pub(super) fn expect_few_duplicates(&mut self) {
        let (twice, all) = (self.report.duplicate_bytes as f64, self.report.bytes as f64);
        if self.has_many_chunks("few-duplicates") {
            let detail = format!("{:.1} % of the bytes came twice", 100.0 * twice / all);
            self.report.invariant("few-duplicates", twice <= all * MOST_TWICE, detail);
        }
    }
}

/// Does it say nothing of the network that a delivery of `time_ms` took `over_ms` too long, where for `busy_ms` of it a processor
/// was waited for? Only where that is much of the time, and explains all that was too long.
fn says_nothing(time_ms: f64, busy_ms: f64, over_ms: f64) -> bool {
    busy_ms >= time_ms * MACHINE_BUSY && busy_ms >= over_ms
}

/// For how long anything that runs on this machine has waited for a processor since its start, in milliseconds, where the system
/// tells it.
fn waited_for_processors_ms() -> Option<f64> {
    // The file system of the kernel: nothing is waited for.
    total_of(&std::fs::read_to_string("/proc/pressure/cpu").ok()?)
}

fn total_of(pressure: &str) -> Option<f64> {
    let some = pressure.lines().find(|line| line.starts_with("some "))?;
    let micros: u64 = some.split_once("total=")?.1.trim().parse().ok()?;
    Some(micros as f64 / 1000.0)
}

/// Nothing is done to the network.
pub(super) async fn calm(_: &mut Network, _: &CancellationToken, _: Instant) -> Result<Vec<Event>, ScenarioError> {
    Ok(Vec::new())
}

pub(super) fn event(start: Instant, what: impl Into<String>) -> Event {
    Event { at_ms: since(start), what: what.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_time_says_nothing_only_where_the_machine_was_busy_for_as_long() {
        assert!(says_nothing(12_000.0, 9_000.0, 3_000.0));
        assert!(!says_nothing(12_000.0, 1_000.0, 500.0), "an idle machine judges");
        assert!(!says_nothing(40_000.0, 15_000.0, 30_000.0), "that is not the machine");
        let told = "some avg10=91.33 avg60=84.85 avg300=82.15 total=8120443976\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(total_of(told), Some(8_120_443.976));
        assert_eq!((total_of(""), total_of("some total=x")), (None, None));
    }
}
