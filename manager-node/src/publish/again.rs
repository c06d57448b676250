//! Publishes a product again whose manifest is void because the key that signed it was revoked: the same ciphertext, which
//! lies at the origin, under a manifest that the present key signs. The product stays what it is to merchants; its content
//! has a new name, so seeders make their copies anew, and what was sold under the old name cannot be fetched.

use std::sync::Arc;

use delivery::FinishError;
use protocol::ProductId;
use protocol::trust::KeyPurpose;
use serde::Serialize;

use super::{OriginState, PublishError, wait_for_origin};
use crate::catalogue::{self, Product};
use crate::context::{Context, now_ms};
use protocol::Digest;

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) struct Again {
    product: ProductId,
    title: String,
    /// Digest of the manifest that it has now.
    manifest: Digest,
    /// The one before; absent where that one holds, and nothing was to be done.
    replaced: Option<Digest>,
    origin: OriginState,
}

/// Publishes the product again, unless its manifest holds.
pub(crate) async fn again(ctx: &Arc<Context>, id: ProductId) -> Result<Again, PublishError> {
    // In turn with publications, so that two calls for one product do not both make a content.
    let _turn = ctx.publishing.lock().await;
    let working = Arc::clone(ctx);
    let mut again = tokio::task::spawn_blocking(move || again_blocking(&working, id))
        .await
        .map_err(|e| PublishError::Thread(e.to_string()))??;
    if let Some(before) = again.replaced {
        tracing::warn!(product = %id, manifest = %again.manifest, %before, "published again");
        ctx.placements.wake();
    }
    again.origin = wait_for_origin(ctx, &again.manifest).await?;
    Ok(again)
}

fn again_blocking(ctx: &Context, id: ProductId) -> Result<Again, PublishError> {
    let product = ctx.catalogue.any_product(&id)?.ok_or(PublishError::NoProduct(id))?;
    let Product { info, manifest: signed, withdrawn, .. } = product;
    let unreadable = |e: protocol::codec::CodecError| PublishError::Thread(e.to_string());
    let mut manifest = signed.peek().map_err(unreadable)?;
    if withdrawn || ctx.revocations.with(|revoked| revoked.has_content(&manifest.content)) {
        return Err(PublishError::OffSale(id));
    }
    let now = now_ms();
    let mut answer =
        Again { product: id, title: info.title, manifest: info.manifest, replaced: None, origin: OriginState::None };
    if catalogue::void(&ctx.trust(), &signed, manifest.published_at, now).is_none() {
        return Ok(answer);
    }
    let missing = || PublishError::NoContent { product: id, manifest: info.manifest };
    let held = ctx.content.get(&info.manifest).ok_or_else(missing)?;
    manifest.published_at = now;
    super::may_sign(ctx)?;
    let again = ctx.keys.sign(KeyPurpose::Catalogue, &manifest);
    // Durable and whole before anybody can buy it. What lies under the old name stays: a buyer's client is told by its
    // manifest why there is nothing to be had, and the bytes are the same ones.
    match ctx.content.name_again(&held, &again, &manifest) {
        Err(FinishError::Manifest(_)) => return Err(missing()),
        named => named.map(drop)?,
    }
    let digest = again.digest();
    match ctx.catalogue.replace_manifest_blocking(id, info.manifest, again, now) {
        Ok(true) => {
            answer.manifest = digest;
            answer.replaced = Some(info.manifest);
            Ok(answer)
        }
        other => {
            if let Err(error) = ctx.content.remove(&digest) {
                tracing::warn!(%digest, %error, "content of a failed publication left");
            }
            other?;
            Err(PublishError::OffSale(id))
        }
    }
}
