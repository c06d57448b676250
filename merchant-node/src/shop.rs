//! What the HTTP API, the control socket and the chores of one merchant share.

use std::collections::BTreeMap;
use std::sync::Arc;

use node::{CounterBy, Health, Metrics, Supervisor};
use protocol::{Keypair, PeerId};
use store::Db;
use tokio::sync::Semaphore;

use crate::clock::now_ms;
use crate::config::Config;
use crate::link::Link;
use crate::orders::Desk;
use crate::payments::{PaymentProvider, Prepaid};

/// A running merchant.
pub(crate) struct Shop {
    pub(crate) config: Config,
    pub(crate) keypair: Keypair,
    pub(crate) db: Db,
    pub(crate) link: Arc<Link>,
    pub(crate) desk: Desk,
    pub(crate) prepaid: Prepaid,
    pub(crate) providers: BTreeMap<&'static str, Arc<dyn PaymentProvider>>,
    /// Places of purchases being worked on.
    pub(crate) places: Arc<Semaphore>,
    pub(crate) counts: Counts,
    /// When it came back from a backup, if it ever did, unix milliseconds.
    pub(crate) restored_at: Option<u64>,
    pub(crate) supervisor: Supervisor,
}

/// What a merchant counts.
pub(crate) struct Counts {
    /// Answers to purchase requests, by what they say.
    pub(crate) purchases: CounterBy<1>,
    /// Orders, by the final stage that they reached.
    pub(crate) orders: CounterBy<1>,
}

impl Counts {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        Counts {
            purchases: metrics.counter_by(
                "merchant_purchases",
                "Answers to purchase requests, by HTTP status class or name",
                ["answer"],
            ),
            orders: metrics.counter_by("merchant_orders", "Orders, by the final stage reached", ["stage"]),
        }
    }
}

impl Shop {
    /// This merchant.
    pub(crate) fn me(&self) -> PeerId {
        self.keypair.peer_id()
    }

    /// How it is: not well while it cannot sell.
    pub(crate) fn health(&self) -> Health {
        let mut reasons = Vec::new();
        if let Some(why) = self.link.not_ready() {
            reasons.push(why);
        } else if let Some(until) = self.link.certificate().map(|certificate| certificate.until)
            && until < now_ms()
        {
            reasons.push(
                "this merchant's certificate has ended, and the manager has not given it another one yet".to_owned(),
            );
        }
        if let Some(why) = self.link.revoked() {
            reasons.push(format!("revoked: the manager sells nothing through this merchant any more ({why})"));
        }
        if let Some(why) = self.db.failed() {
            reasons.push(why);
        }
        let ok = reasons.is_empty();
        if let (true, Some(why)) = (ok, self.link.trouble()) {
            reasons.push(format!("purchases wait for the manager: {why}"));
        }
        Health { ok, reasons }
    }
}
