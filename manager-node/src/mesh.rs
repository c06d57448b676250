//! Answers seeders: enrolment, reports with placements, receipts, manifests; and anybody about keys and revocations,
//! which are public and signed.

use std::sync::Arc;

use node::{AcceptError, CallLimits, Protocol, Supervisor, serve_calls};
use protocol::api::{MESH_PROTOCOL, MeshRequest, MeshResponse, SeederReport};
use protocol::{PeerAddrs, PeerId, Refusal, RefusalCode};

use crate::context::{Context, now_ms};
use crate::enrol::{self, Refused};
use crate::sales::blocking;
use crate::transactions::SaleError;
use crate::{audit_fetch, handover, newer_keys, news, placement, reach, receipts, statements};

const PROTOCOL: Protocol = Protocol::new(MESH_PROTOCOL);
/// Calls at once: each waits for one group commit at most, so that 256 of them are some thousand reports a second.
const LIMITS: CallLimits = CallLimits { concurrent: 256, per_peer: 8, io_timeout: std::time::Duration::from_secs(10) };

/// Starts the service.
pub(crate) async fn start(ctx: &Arc<Context>, supervisor: &Supervisor) -> Result<(), AcceptError> {
    let ctx = Arc::clone(ctx);
    serve_calls(supervisor, &ctx.node.clone(), PROTOCOL, LIMITS, move |peer, request| {
        let ctx = Arc::clone(&ctx);
        async move {
            match answer(&ctx, peer, request).await {
                Ok(response) => response,
                Err(refusal) => {
                    ctx.refusals.inc(["mesh", refusal.code.as_str()]);
                    tracing::info!(%peer, code = %refusal.code, detail = refusal.detail, "mesh request refused");
                    MeshResponse::Refused(refusal)
                }
            }
        }
    })
    .await
}

/// Answers one request of a seeder.
pub(crate) async fn answer(ctx: &Arc<Context>, peer: PeerId, request: MeshRequest) -> Result<MeshResponse, Refusal> {
    let now = now_ms();
    match request {
        MeshRequest::KeySet => Ok(MeshResponse::KeySet(ctx.trust().signed_key_set().clone())),
        MeshRequest::Heartbeat => Ok(MeshResponse::Heartbeat(news::sign_heartbeat(ctx).map_err(Refused::from)?)),
        MeshRequest::Epochs { after } => {
            let epochs = ctx.revocations.after(after).map_err(Refused::from)?;
            Ok(MeshResponse::Epochs(epochs))
        }
        MeshRequest::Enrol { token, name, capacity, held } => {
            let cert = enrol::seeder(ctx, peer, token, name, capacity, held).await?;
            add_to_dht(ctx, peer).await;
            Ok(MeshResponse::Enrolled(cert))
        }
        MeshRequest::Report(report) => take_report(ctx, peer, report, now).await,
        MeshRequest::Receipts(batch) => {
            ctx.enrolled_seeder(&peer, now)?;
            Ok(MeshResponse::Mark(receipts::accept_batch(ctx, peer, batch).await?))
        }
        MeshRequest::Statement { after } => {
            // Also for those whose certificate is over: what they earned is theirs.
            let found = blocking(ctx, move |ctx| statements::after(ctx, peer, after)).await?;
            Ok(MeshResponse::Statement(found.map(Box::new)))
        }
        MeshRequest::Explain { receipt } => {
            let found = blocking(ctx, move |ctx| statements::explain(ctx, peer, receipt)).await?;
            Ok(MeshResponse::Explained(Box::new(found)))
        }
        MeshRequest::Release { contents, hand_over } => {
            ctx.enrolled_seeder(&peer, now)?;
            if contents.len() > SeederReport::MAX_HELD {
                return Err(Refusal::new(RefusalCode::TooLarge, "at most 1024 contents in one question"));
            }
            if ctx.registry.origin() == Some(peer) {
                let why = "this is the origin: it keeps everything, and cannot leave";
                return Err(Refusal::new(RefusalCode::WrongState, why));
            }
            let (contents, kept) =
                handover::release(ctx, peer, contents, hand_over, now).await.map_err(Refused::from)?;
            Ok(MeshResponse::Released { contents, kept })
        }
        MeshRequest::Stopping => {
            ctx.enrolled_seeder(&peer, now)?;
            ctx.registry.stops(peer, now).await.map_err(Refused::from)?;
            tracing::info!(%peer, "a seeder stops");
            Ok(MeshResponse::Noted)
        }
        MeshRequest::NewerKeySet(signed) => {
            newer_keys::shown(ctx, *signed).await?;
            Ok(MeshResponse::Noted)
        }
        MeshRequest::DialBack => {
            ctx.enrolled_seeder(&peer, now)?;
            Ok(MeshResponse::Reach(Box::pin(reach::dial_back(ctx, peer)).await?))
        }
        MeshRequest::Introduce { .. } => Err(Refusal::new(
            RefusalCode::NotEntitled,
            "seeders introduce themselves to seeders; a manager takes reports",
        )),
        MeshRequest::Manifest { digest } => {
            ctx.enrolled_seeder(&peer, now)?;
            let found = ctx.catalogue.manifest(&digest).map_err(Refused::from)?;
            found
                .map(MeshResponse::Manifest)
                .ok_or_else(|| Refusal::new(RefusalCode::ContentNotHeld, "no published manifest has this digest"))
        }
    }
}

async fn take_report(
    ctx: &Arc<Context>,
    peer: PeerId,
    mut report: SeederReport,
    now: u64,
) -> Result<MeshResponse, Refusal> {
    let not_known = || Refusal::new(RefusalCode::NotEnrolled, "this peer is no enrolled seeder");
    // Before what is judged by a clock: this one may be wrong by more than a certificate lasts.
    let known = ctx.registry.seeder(&peer).map_err(Refused::from)?.is_some();
    if known && ctx.registry.origin() != Some(peer) && !ctx.revocations.with(|revoked| revoked.has_peer(&peer)) {
        note_clock(ctx, peer, report.now, now);
    }
    let before = ctx.enrolled_seeder(&peer, now)?;
    let long = report.held.len() > SeederReport::MAX_HELD
        || report.damaged.len() > SeederReport::MAX_DAMAGED
        || report.moving.len() > SeederReport::MAX_MOVING
        || report.unwanted.len() > SeederReport::MAX_UNWANTED;
    if long {
        let detail = "a report names at most 1024 contents, 64 damaged ones, 32 to be copied elsewhere and 256 that are \
                      not wanted";
        return Err(Refusal::new(RefusalCode::TooLarge, detail));
    }
    // What a node listens on without knowing its own address leads nowhere from elsewhere.
    report.addrs.retain(|address| !["/ip4/0.0.0.0/", "/ip6/::/"].iter().any(|any| address.as_str().starts_with(any)));
    // The most useful ones come first. Whoever has more, on a machine with many networks, is not to be in none for it.
    report.addrs = PeerAddrs::new(peer, report.addrs).addrs;
    if ctx.registry.origin() == Some(peer) {
        // It keeps everything, and cannot leave.
        report.leaving = false;
        report.moving.clear();
        report.unwanted.clear();
    }
    let moved = report.addrs != before.addrs;
    // While it was away the table dropped the addresses at which a dial failed, and takes none back by itself.
    let is_back = now.saturating_sub(before.last_report) > ctx.config.seeder_away_ms;
    let (held, damaged) = (report.held.clone(), std::mem::take(&mut report.damaged));
    if report.first {
        ctx.demand.turned_away(peer, report.turned_away, now);
    }
    let damaged = match damaged.is_empty() {
        true => damaged,
        false => blocking(ctx, move |ctx| Ok::<_, SaleError>(placement::had(ctx, peer, damaged)?)).await?,
    };
    let outcome = ctx.registry.report(peer, report, now).await.map_err(Refused::from)?.ok_or_else(not_known)?;
    if outcome.lost_content || outcome.turned_down {
        ctx.placements.wake();
    } else if outcome.gained_room {
        ctx.placements.room_gained();
    }
    if ctx.registry.introduce(peer) || moved || is_back {
        add_to_dht(ctx, peer).await;
    }
    placement::repair(ctx, peer, damaged, now).await.map_err(Refused::from)?;
    if outcome.gained_content || audit_fetch::is_in_doubt(ctx, &peer) {
        let told = move |ctx: &Context| {
            if outcome.gained_content {
                audit_fetch::mended(ctx, peer, &held)?;
            }
            Ok::<_, SaleError>(audit_fetch::reported(ctx, peer, &held)?)
        };
        blocking(ctx, told).await?;
    }
    let placements = placement::for_seeder(ctx, peer, now).await.map_err(Refused::from)?;
    Ok(MeshResponse::Placements(placements))
}

/// The origin, which runs on this machine, knows nothing about clocks that this manager does not.
fn note_clock(ctx: &Context, seeder: PeerId, theirs: u64, now: u64) {
    let grace_ms = ctx.config.clock_grace_ms;
    if theirs == 0 {
        return;
    }
    let before = ctx.registry.clocks.state(now, grace_ms);
    ctx.registry.clocks.note(seeder, theirs, now);
    let after = ctx.registry.clocks.state(now, grace_ms);
    if after.is_off() && !before.is_off() {
        tracing::error!("this manager's clock is {after} by those of its seeders: they refuse its tickets; set it");
    }
}

/// Only enrolled peers take part in the DHT, and get a slot where this manager relays.
async fn add_to_dht(ctx: &Context, peer: PeerId) {
    match ctx.registry.addresses(&peer) {
        Ok(addrs) => {
            if let Err(error) = ctx.node.add_dht_peer(addrs).await {
                tracing::debug!(%peer, %error, "seeder not added to the DHT");
            }
        }
        Err(error) => tracing::warn!(%peer, %error, "seeder not added to the DHT"),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use protocol::Address;

    use super::*;
    use crate::sales::tests::shop::{Shop, Terms};

    #[tokio::test]
    async fn of_a_seeder_on_a_machine_with_many_networks_the_first_addresses_are_taken() {
        let shop = Shop::open(Terms::default()).await;
        let peer = shop.seeders.first().unwrap().peer_id();
        let address = |n: usize| Address::new(&format!("/ip4/172.17.{n}.1/tcp/4602")).unwrap();
        let addrs: Vec<_> = (0..40).map(address).collect();
        let report = SeederReport { addrs: addrs.clone(), first: true, ..SeederReport::default() };
        let answer = shop.running.mesh(peer, MeshRequest::Report(report)).await.unwrap();
        assert!(matches!(answer, MeshResponse::Placements(_)), "{answer:?}");
        assert_eq!(shop.ctx.registry.addresses(&peer).unwrap().addrs, addrs[..PeerAddrs::MAX_ADDRS]);
        shop.close().await;
    }
}
