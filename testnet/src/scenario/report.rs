//! What a scenario tells.

use std::collections::BTreeMap;

use client_node::{FetchError, FetchOutcome, FetchProgress};
use delivery::SourceReport;
use protocol::{Digest, PeerId};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::books::Books;
use crate::goods::{Goods, identical};

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Event {
    /// Milliseconds since the first delivery began.
    pub at_ms: u64,
    /// What, for people; of a cause, its name.
    pub what: String,
}

/// A receipt and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Fate {
    /// Which seeder handed it in.
    pub seeder: PeerId,
    /// The receipt's name.
    pub receipt: Digest,
    /// What it claims, for people.
    pub claim: String,
    /// `accepted`, `duplicate`, `unknown` or `rejected`.
    pub fate: &'static str,
    /// In one sentence, with what was paid.
    pub why: String,
}

/// Something that must hold, and whether it did.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Invariant {
    /// Its name.
    pub name: &'static str,
    /// Did it hold?
    pub held: bool,
    /// What was found, for people.
    pub detail: String,
}

/// Something that must hold, and that this run says nothing of.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct NotJudged {
    /// The invariant's name.
    pub name: &'static str,
    /// Why, for people.
    pub why: String,
}

/// What a seeder did and is not paid for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Unpaid {
    /// Which seeder.
    pub seeder: String,
    /// Ciphertext bytes.
    pub bytes: u64,
    /// Why.
    pub because: &'static str,
}

/// What the manager's books say of the receipts of all sales.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Receipts {
    /// Bytes that clients acknowledged, over all seeders.
    pub acknowledged_bytes: u64,
    /// Bytes that are paid for.
    pub paid_bytes: u64,
    /// Bytes that seeders sent or had acknowledged beyond that, and why.
    pub unpaid: Vec<Unpaid>,
    /// Receipts that did not count, by the manager's reason.
    pub rejected: BTreeMap<String, u64>,
}

/// A scenario's report, in JSON by `serde`.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Report {
    /// Which scenario.
    pub scenario: String,
    /// What its chances came from.
    pub seed: u64,
    /// Everything arrived as it was sold, and nothing is in `problems`.
    pub ok: bool,
    /// From the beginning of the first delivery to the end of the last, milliseconds.
    pub time_ms: u64,
    /// Deliveries to honest buyers.
    pub deliveries: u64,
    /// Those that arrived as they were sold.
    pub completed: u64,
    /// Ciphertext bytes fetched, over all deliveries.
    pub bytes: u64,
    /// Bytes of chunks that came twice.
    pub duplicate_bytes: u64,
    /// The same as a share of `bytes`.
    pub duplicate_share: f64,
    /// Each seeder's part, of every delivery.
    pub sources: Vec<SourceReport>,
    /// Why a delivery was not moving, whenever that changed.
    pub causes: Vec<Event>,
    /// What was done to the network.
    pub events: Vec<Event>,
    /// What became of receipts that were handed in by those who lie, by the manager's own word.
    pub fates: Vec<Fate>,
    /// Further figures of this scenario.
    pub figures: BTreeMap<&'static str, f64>,
    /// The manager's books at the end, where it was there.
    pub books: Option<Books>,
    /// The receipts in them, and what of them is unpaid.
    pub receipts: Option<Receipts>,
    /// What was checked.
    pub invariants: Vec<Invariant>,
    /// What was not, although it belongs to this scenario.
    pub not_judged: Vec<NotJudged>,
    /// What should not have been, the invariants that did not hold among it.
    pub problems: Vec<String>,
}

impl Report {
    pub(super) fn new(scenario: &str, seed: u64) -> Report {
        Report {
            scenario: scenario.to_owned(),
            seed,
            ok: false,
            time_ms: 0,
            deliveries: 0,
            completed: 0,
            bytes: 0,
            duplicate_bytes: 0,
            duplicate_share: 0.0,
            sources: Vec::new(),
            causes: Vec::new(),
            events: Vec::new(),
            fates: Vec::new(),
            figures: BTreeMap::new(),
            books: None,
            receipts: None,
            invariants: Vec::new(),
            not_judged: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// Takes a delivery in.
    pub(super) fn take(&mut self, result: Result<FetchOutcome, FetchError>, goods: &Goods) -> std::io::Result<()> {
        self.deliveries += 1;
        match result {
            Ok(outcome) => {
                self.bytes += outcome.bytes;
                self.duplicate_bytes += outcome.duplicate_bytes;
                if let Some(ms) = outcome.first_chunk_ms {
                    self.figures.insert("first_chunk_ms", ms as f64);
                }
                match identical(&goods.path, &outcome.path)? {
                    true => self.completed += 1,
                    false => self.problems.push(format!("{} is not what was sold", outcome.path.display())),
                }
                self.sources.extend(outcome.sources);
            }
            Err(error) => self.problems.push(format!("a delivery failed ({}): {error}", error.cause())),
        }
        Ok(())
    }

    /// Notes whether something held that must hold.
    pub(super) fn invariant(&mut self, name: &'static str, held: bool, detail: impl Into<String>) {
        let detail = detail.into();
        if !held {
            self.problems.push(format!("{name} does not hold: {detail}"));
        }
        self.invariants.push(Invariant { name, held, detail });
    }

    /// Notes that this run is no trial of something that must hold.
    pub(super) fn not_judged(&mut self, name: &'static str, why: impl Into<String>) {
        self.not_judged.push(NotJudged { name, why: why.into() });
    }

    pub(super) fn finish(mut self) -> Report {
        if self.bytes > 0 {
            self.duplicate_share = self.duplicate_bytes as f64 / self.bytes as f64;
        }
        self.ok = self.problems.is_empty();
        self
    }
}

/// Milliseconds since `start`.
pub(super) fn since(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Notes each change of the cause for which a fetch stands still, until it is over.
pub(super) async fn causes(mut progress: watch::Receiver<FetchProgress>, start: Instant) -> Vec<Event> {
    let (mut seen, mut last) = (Vec::new(), None);
    while progress.changed().await.is_ok() {
        let cause = {
            let now = progress.borrow_and_update();
            let waiting = now.waiting.as_ref().map(|waiting| waiting.cause.clone());
            waiting.or_else(|| now.transfer.stalled.as_ref().map(|stall| stall.cause.clone()))
        };
        if cause != last {
            let what = cause.as_ref().map_or_else(|| "moving".to_owned(), name_of);
            seen.push(Event { at_ms: since(start), what });
            last = cause;
        }
    }
    seen
}

/// The name by which programs know a cause.
fn name_of(cause: &delivery::StallCause) -> String {
    let value = serde_json::to_value(cause).unwrap_or_default();
    value.get("cause").and_then(serde_json::Value::as_str).unwrap_or("unknown").to_owned()
}
