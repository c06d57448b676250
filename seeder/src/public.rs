//! What is public of a network, anybody may ask of any seeder: its keys, its revocations, and the manager's newest sign
//! of life, each as it was signed. So a client that has never met the network needs one node of it that is up, and it
//! need not be the manager. Other seeders introduce themselves here.

use std::sync::Arc;
use std::time::Duration;

use node::{AcceptError, CallLimits, Protocol, serve_calls};
use protocol::api::{MESH_PROTOCOL, MeshRequest, MeshResponse};
use protocol::{PeerId, Refusal, RefusalCode};
use store::{Db, StoreError};

use crate::acquaintance;
use crate::context::Seeder;
use crate::network::epochs_from;
use crate::tables::HEARTBEAT;

const MESH: Protocol = Protocol::new(MESH_PROTOCOL);
/// Each costs a read of the database; deliveries come first.
const LIMITS: CallLimits = CallLimits { concurrent: 32, per_peer: 4, io_timeout: Duration::from_secs(10) };

/// Starts the service.
pub(crate) async fn serve(seeder: &Arc<Seeder>) -> Result<(), AcceptError> {
    let shared = Arc::clone(seeder);
    let respond = move |peer, request: MeshRequest| {
        let seeder = Arc::clone(&shared);
        async move {
            let answered = answer(&seeder, peer, request).await;
            answered.unwrap_or_else(|refusal| {
                seeder.counts.refusals.inc([refusal.code.as_str()]);
                MeshResponse::Refused(refusal)
            })
        }
    };
    serve_calls(&seeder.supervisor, &seeder.node, MESH, LIMITS, respond).await
}

async fn answer(seeder: &Seeder, peer: PeerId, request: MeshRequest) -> Result<MeshResponse, Refusal> {
    let not_yet = || Refusal::new(RefusalCode::NotEnrolled, "not known to this seeder yet").retry_after(30_000);
    match request {
        MeshRequest::KeySet => {
            let trust = seeder.network.trust().ok_or_else(not_yet)?;
            Ok(MeshResponse::KeySet(trust.signed_key_set().clone()))
        }
        MeshRequest::Heartbeat => {
            let newest = read(seeder, |db| db.read(|txn| HEARTBEAT.get(txn, &()))).await?;
            newest.map(MeshResponse::Heartbeat).ok_or_else(not_yet)
        }
        MeshRequest::Epochs { after } => {
            let from = after.saturating_add(1).max(seeder.network.chain());
            Ok(MeshResponse::Epochs(read(seeder, move |db| epochs_from(db, from)).await?))
        }
        MeshRequest::Introduce { certificate, addrs } => {
            Box::pin(acquaintance::meet(seeder, peer, certificate, addrs)).await
        }
        _ => Err(Refusal::new(RefusalCode::NotEntitled, "a seeder answers for what is public; ask the manager")),
    }
}

async fn read<T: Send + 'static>(
    seeder: &Seeder,
    work: impl FnOnce(&Db) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Refusal> {
    let db = seeder.db.clone();
    let failed = |error: &dyn std::fmt::Display| {
        tracing::error!(%error, "cannot read what is public");
        Refusal::new(RefusalCode::Internal, "this seeder's database failed")
    };
    match tokio::task::spawn_blocking(move || work(&db)).await {
        Ok(read) => read.map_err(|error| failed(&error)),
        Err(error) => Err(failed(&error)),
    }
}
