//! What a seeder counts, for `status`, for the metrics page and for tests, in one registry.

use node::Metrics;
use node::prometheus_client::metrics::counter::Counter;
use node::prometheus_client::metrics::gauge::Gauge;
use protocol::RefusalCode;

/// Counters and gauges; names get the prefix `willcall_`.
#[derive(Clone, Debug)]
pub(crate) struct Counts {
    pub(crate) refusals: node::CounterBy<1>,
    pub(crate) deliveries: Gauge,
    pub(crate) deliveries_begun: Counter,
    pub(crate) chunks_sent: Counter,
    pub(crate) bytes_sent: Counter,
    pub(crate) chunks_verified: Counter,
    pub(crate) damaged: Counter,
    pub(crate) batches: Counter,
    pub(crate) receipts: Counter,
    pub(crate) waiting: Gauge,
    pub(crate) replicated: Counter,
    pub(crate) collected: Counter,
    pub(crate) announced: Gauge,
    pub(crate) announcements_late: Gauge,
    pub(crate) gossip_refused: node::CounterBy<1>,
}

impl Counts {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        Counts {
            refusals: metrics.counter_by("refusals", "Refusals sent, by code", ["code"]),
            deliveries: metrics.gauge("seeder_deliveries", "Deliveries under way"),
            deliveries_begun: metrics.counter("seeder_deliveries_begun", "Tickets and orders admitted"),
            chunks_sent: metrics.counter("seeder_chunks_sent", "Chunks sent"),
            bytes_sent: metrics.counter("seeder_sent_bytes", "Bytes of chunks sent"),
            chunks_verified: metrics.counter("seeder_chunks_verified", "Chunks verified between the disk and a client"),
            damaged: metrics.counter("seeder_damaged_chunks", "Chunks that did not verify when read from disk"),
            batches: metrics.counter("seeder_receipt_batches", "Receipt batches made"),
            receipts: metrics.counter("seeder_receipts", "Receipts put into batches"),
            waiting: metrics.gauge("seeder_waiting_batches", "Receipt batches that the manager has not confirmed"),
            replicated: metrics.counter("seeder_replicated_bytes", "Bytes fetched from other seeders"),
            collected: metrics.counter("seeder_collected_bytes", "Bytes of content removed for want of room"),
            announced: metrics.gauge("seeder_announced_contents", "Contents announced in the DHT"),
            announcements_late: metrics.gauge("seeder_late_announcements", "Contents whose announcement is overdue"),
            gossip_refused: metrics.counter_by(
                "seeder_gossip_refused",
                "Gossip messages that were not forwarded, by refusal code",
                ["code"],
            ),
        }
    }

    /// Counts of refusals by code, those of 0 left out.
    pub(crate) fn refusals_by_code(&self) -> serde_json::Map<String, serde_json::Value> {
        let counted = RefusalCode::ALL.iter().map(|code| (code.as_str(), self.refusals.get([code.as_str()])));
        counted.filter(|(_, count)| *count > 0).map(|(code, count)| (code.to_owned(), count.into())).collect()
    }
}
