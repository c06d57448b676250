//! Disturbances that a mesh has to live with, each run over real nodes and told as a report that programs can read: how
//! much was moved, how much of it twice, how long it took, and why it stood still when it did.

mod plots;
mod report;

pub use report::{Event, Report};

use crate::network::NetworkError;

/// The scenarios.
pub const NAMES: [&str; 5] = ["churn", "partial-holders", "mixed-links", "corrupt-seeder", "manager-away"];

/// How big, and with which chances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Chooses what is left to chance: the goods, and which seeder it hits.
    pub seed: u64,
    /// Bytes of the goods.
    pub bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { seed: 1, bytes: 16 * 1024 * 1024 }
    }
}

/// Why a scenario gave no report.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// No such scenario.
    #[error("there is no scenario '{name}'; there are {}", NAMES.join(", "))]
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
        _ => Err(ScenarioError::Unknown { name: name.to_owned() }),
    }
}
