//! Disturbances that a mesh has to live with, each run over real nodes and told as a report that programs can read: how
//! much was moved, how much of it twice, how long it took, and why it stood still when it did.

mod attacks;
mod plots;
mod report;
mod set;

pub use report::{Event, Fate, Invariant, NotJudged, Receipts, Report, Unpaid};

use crate::network::NetworkError;

/// The scenarios, each with what happens in it.
pub const SCENARIOS: [(&str, &str); 10] = [
    ("churn", "a seeder leaves and another joins every second; the origin is gone"),
    ("partial-holders", "no seeder holds everything: each chunk is at two of four; origin and manager are gone"),
    ("mixed-links", "seeders behind links of 1, 4 and 16 units of speed; the origin is gone"),
    ("corrupt-seeder", "one of eight seeders sends something else than the goods"),
    ("manager-away", "the manager and its origin are away while six clients fetch"),
    ("collusion", "a client and two seeders claim ten times what was sent, and three a delivery that never happened"),
    ("withhold", "a client takes and never acknowledges; two of four seeders fall silent in mid-delivery"),
    ("replay", "a stolen ticket, tampered tickets, and receipts that were paid already"),
    ("clock-skew", "leases and acknowledgements of clocks that are off by minutes and by an hour"),
    ("partition", "half of the seeders and the manager are away, then the other half"),
];

/// How big, and with which chances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Chooses what is left to chance: the goods, and which seeder it hits.
    pub seed: u64,
    /// Bytes of the goods.
    pub bytes: u64,
}

/// Bytes of the goods of a scenario, where nobody says how many: enough for everything that it is to judge.
pub fn usual_bytes(name: &str) -> u64 {
    let mib = match name {
        "partial-holders" | "mixed-links" => 32,
        _ => 16,
    };
    mib * 1024 * 1024
}

/// Why a scenario gave no report.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// No such scenario.
    #[error("there is no scenario '{name}'; there are {}", SCENARIOS.map(|(name, _)| name).join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The network around it failed.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A node's network part ended.
    #[error(transparent)]
    Stopped(#[from] node::Stopped),
    /// A client's mailbox could not be read.
    #[error(transparent)]
    Inbox(#[from] client_node::InboxError),
    /// Files could not be compared or damaged.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A seeder's disk.
    #[error(transparent)]
    Content(#[from] delivery::FileError),
    /// An attacker could not do its part.
    #[error(transparent)]
    Present(#[from] crate::adversary::PresentError),
    /// A false report did not get through.
    #[error(transparent)]
    Crook(#[from] crate::adversary::CrookError),
    /// A document that cannot be read.
    #[error(transparent)]
    Codec(#[from] protocol::codec::CodecError),
}

/// Runs a scenario in a network of its own, which is gone afterwards. A delivery that failed is told in the report.
///
/// # Errors
/// [`ScenarioError`] when it could not be played to its end.
pub async fn run(name: &str, options: Options) -> Result<Report, ScenarioError> {
    match name {
        "churn" => Box::pin(plots::churn(options)).await,
        "partial-holders" => Box::pin(plots::partial_holders(options)).await,
        "mixed-links" => Box::pin(plots::mixed_links(options)).await,
        "corrupt-seeder" => Box::pin(plots::corrupt_seeder(options)).await,
        "manager-away" => Box::pin(plots::manager_away(options)).await,
        "collusion" => Box::pin(attacks::collusion(options)).await,
        "withhold" => Box::pin(attacks::withhold(options)).await,
        "replay" => Box::pin(attacks::replay(options)).await,
        "clock-skew" => Box::pin(attacks::clock_skew(options)).await,
        "partition" => Box::pin(attacks::partition(options)).await,
        _ => Err(ScenarioError::Unknown { name: name.to_owned() }),
    }
}
