//! What a fetch could not give to a seeder at its end, because the seeder was away just then, it is given later: the last
//! acknowledgement, by which the seeder is paid.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use protocol::deliver::Credential;
use protocol::fetching::SessionTerms;
use protocol::receipt::{Completion, DeliveryId};
use protocol::trust::{RevocationState, Trust};
use protocol::{Digest, Keypair, PeerAddrs, Signed};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::buffers::Buffers;
use super::incoming::Pulse;
use super::session::{Ending, SessionId, SessionTask, Shared};
use super::{AckStore, Connect, FetchLimits};

/// What is owed, and to whom.
pub struct SettleJob {
    /// Opens streams.
    pub connect: Arc<dyn Connect>,
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// The right by which it was fetched.
    pub credential: Credential,
    /// What it is counted under.
    pub delivery: DeliveryId,
    /// Signs for the client.
    pub keypair: Keypair,
    /// Those who are owed.
    pub seeders: Vec<PeerAddrs>,
    /// The network's keys.
    pub trust: Arc<Trust>,
    /// What is revoked.
    pub revoked: Arc<RevocationState>,
    /// Has the acknowledgements.
    pub acks: Arc<dyn AckStore>,
    /// The client's word that all of it is here.
    pub completion: Option<Signed<Completion>>,
    /// Of these, those on time and on the number of streams.
    pub limits: FetchLimits,
}

/// Connects once to each seeder that is owed something. Returns within [`FetchLimits::finish_timeout`] with those that
/// could not be told; one that will never take it is not among them.
pub async fn settle(job: SettleJob) -> Vec<PeerAddrs> {
    let limits = job.limits;
    let seeder = job.keypair.peer_id();
    let terms = SessionTerms { network: job.trust.network(), delivery: job.delivery, manifest: job.manifest, seeder };
    let shared = Arc::new(Shared {
        connect: job.connect,
        credential: watch::channel(job.credential).1,
        terms,
        keypair: job.keypair,
        trust: job.trust,
        revoked: job.revoked,
        acks: job.acks,
        buffers: Buffers::new(limits.buffer_bytes),
        pacing: limits.own_pacing(),
        places: limits.places(),
        looked_for: Mutex::default(),
        cancel: CancellationToken::new(),
        limits: limits.clone(),
    });
    let content = watch::Sender::new(None);
    let ending = watch::Sender::new(Ending::Finish(job.completion));
    // Nothing is reported on such a stream.
    let (reports, _unread) = mpsc::channel(1);
    let mut owed: BTreeMap<_, _> = job.seeders.into_iter().map(|seeder| (seeder.peer, seeder)).collect();
    let mut sessions = JoinSet::new();
    for (peer, target) in &owed {
        let task = SessionTask {
            id: SessionId { peer: *peer, number: 1 },
            target: target.clone(),
            shared: Arc::clone(&shared),
            content: content.subscribe(),
            ending: ending.subscribe(),
            last_word: true,
            close: CancellationToken::new(),
            commands: mpsc::channel(1).1,
            reports: reports.clone(),
            pulse: Arc::new(Pulse::default()),
        };
        sessions.spawn(Box::pin(task.run()));
    }
    let telling = async {
        while let Some(ended) = sessions.join_next().await {
            match ended {
                Ok((id, reason)) if reason.takes_no_more() => {
                    tracing::info!(seeder = %id.peer, %reason, "last acknowledgement given to the seeder");
                    owed.remove(&id.peer);
                }
                Ok((id, reason)) => tracing::debug!(seeder = %id.peer, %reason, "last acknowledgement not given"),
                Err(error) => tracing::error!(%error, "a session failed"),
            }
        }
    };
    if tokio::time::timeout(limits.finish_timeout, telling).await.is_err() {
        sessions.shutdown().await;
    }
    owed.into_values().collect()
}
