//! One registry for everything a process counts, behind a type that cannot be given a peer ID as a label: labels are
//! static strings, so that no stranger can make the number of time series grow.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Metric, Registry};

use crate::counted::Traffic;
use crate::door::TurnedAway;
use crate::streams::{ConnInfo, Transport};

/// The metrics of a process. Clones share one registry; every name gets the prefix `willcall_`.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// An empty registry.
    pub fn new() -> Self {
        Self { registry: Arc::new(Mutex::new(Registry::with_prefix("willcall"))) }
    }

    /// Registers a counter; its exposed name ends in `_total`. Register each name once per process.
    pub fn counter(&self, name: &str, help: &str) -> Counter {
        self.register(name, help, Counter::default())
    }

    /// Registers a counter for each combination of values of `labels`.
    pub fn counter_by<const N: usize>(&self, name: &str, help: &str, labels: [&'static str; N]) -> CounterBy<N> {
        let family = self.register(name, help, Family::default());
        CounterBy { labels, family }
    }

    /// Registers a gauge.
    pub fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.register(name, help, Gauge::default())
    }

    /// Registers a histogram with the given upper bounds of its buckets, ascending.
    pub fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.register(name, help, Histogram::new(buckets.iter().copied()))
    }

    /// All metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = encode(&mut text, &self.registry.lock().unwrap_or_else(PoisonError::into_inner));
        text
    }

    fn register<M: Metric + Clone>(&self, name: &str, help: &str, metric: M) -> M {
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        registry.register(name, help, metric.clone());
        metric
    }
}

/// Counters told apart by label values, which are static strings.
#[derive(Clone, Debug)]
pub struct CounterBy<const N: usize> {
    labels: [&'static str; N],
    family: Family<Vec<(&'static str, &'static str)>, Counter>,
}

impl<const N: usize> CounterBy<N> {
    /// Adds one to the counter with these label values, in the order of the labels.
    pub fn inc(&self, values: [&'static str; N]) {
        self.inc_by(values, 1);
    }

    /// Adds `n` to the counter with these label values.
    pub fn inc_by(&self, values: [&'static str; N], n: u64) {
        self.family.get_or_create(&self.key(values)).inc_by(n);
    }

    /// The count for these label values.
    pub fn get(&self, values: [&'static str; N]) -> u64 {
        self.family.get(&self.key(values)).map_or(0, |counter| counter.get())
    }

    fn key(&self, values: [&'static str; N]) -> Vec<(&'static str, &'static str)> {
        self.labels.into_iter().zip(values).collect()
    }
}

/// Established connections by kind.
#[derive(Clone, Debug)]
pub(crate) struct Connections(Family<Vec<(&'static str, &'static str)>, Gauge>);

impl Connections {
    pub(crate) fn change(&self, info: ConnInfo, by: i64) {
        let path = if info.relayed { "relayed" } else { "direct" };
        let transport = match info.transport {
            Transport::Tcp => "tcp",
            Transport::Quic => "quic",
            Transport::Other => "other",
        };
        self.0.get_or_create(&vec![("path", path), ("transport", transport)]).inc_by(by);
    }
}

/// What the network part of a node counts.
#[derive(Clone, Debug)]
pub(crate) struct NodeMetrics {
    pub(crate) connections: Connections,
    pub(crate) reachability: Gauge,
    pub(crate) relay_slots: Gauge,
    pub(crate) hole_punches: CounterBy<1>,
    pub(crate) dial_backs: CounterBy<1>,
    pub(crate) relayed: CounterBy<1>,
    pub(crate) streams_refused: CounterBy<2>,
    pub(crate) dials_failed: Counter,
    pub(crate) connections_refused: CounterBy<1>,
    pub(crate) turned_away: TurnedAway,
    pub(crate) streams_opened: CounterBy<1>,
    pub(crate) streams_accepted: CounterBy<1>,
    pub(crate) streams_dropped: CounterBy<2>,
    pub(crate) calls_failed: CounterBy<2>,
    pub(crate) gossip: CounterBy<1>,
    pub(crate) traffic: Traffic,
}

impl NodeMetrics {
    pub(crate) fn register(metrics: &Metrics) -> Self {
        Self {
            connections: Connections(metrics.register(
                "node_connections",
                "Established connections, by the way they take and what carries them",
                Family::default(),
            )),
            reachability: metrics.gauge("node_reachability", "Whether others get through: 0 unknown, 1 no, 2 yes"),
            relay_slots: metrics.gauge("node_relay_slots", "Slots that this node holds at relays"),
            hole_punches: metrics.counter_by(
                "node_hole_punches",
                "Relayed connections that were to become direct, and what came of it",
                ["result"],
            ),
            dial_backs: metrics.counter_by(
                "node_dial_backs",
                "Peers that asked whether they can be reached, by whether they got an answer",
                ["result"],
            ),
            relayed: metrics.counter_by("node_relayed", "What this node did as a relay", ["event"]),
            streams_refused: metrics.counter_by(
                "node_streams_refused",
                "Streams that this node wanted to open and could not, by reason",
                ["protocol", "reason"],
            ),
            dials_failed: metrics.counter("node_dials_failed", "Connection attempts that failed"),
            connections_refused: metrics.counter_by(
                "node_connections_refused",
                "Connections refused by this node, by reason",
                ["reason"],
            ),
            turned_away: TurnedAway::default(),
            streams_opened: metrics.counter_by("node_streams_opened", "Streams opened to peers", ["protocol"]),
            streams_accepted: metrics.counter_by("node_streams_accepted", "Streams accepted from peers", ["protocol"]),
            streams_dropped: metrics.counter_by(
                "node_streams_dropped",
                "Streams of peers that were dropped, by reason",
                ["protocol", "reason"],
            ),
            calls_failed: metrics.counter_by(
                "node_calls_failed",
                "Calls of peers that got no answer, by reason",
                ["protocol", "reason"],
            ),
            gossip: metrics.counter_by("node_gossip", "Gossip messages received, by what became of them", ["result"]),
            traffic: Traffic {
                received: metrics.counter("node_tcp_received_bytes", "Bytes received over TCP connections"),
                sent: metrics.counter("node_tcp_sent_bytes", "Bytes sent over TCP connections"),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_shown() {
        let metrics = Metrics::new();
        let by = metrics.counter_by("refused", "Refusals", ["service", "reason"]);
        by.inc(["deliver", "expired"]);
        by.inc(["deliver", "expired"]);
        assert_eq!(by.get(["deliver", "expired"]), 2);
        let text = metrics.encode();
        assert!(text.contains("willcall_refused_total{service=\"deliver\",reason=\"expired\"} 2"), "{text}");
    }
}
