//! What a merchant can show of an order: its own endorsement and the amounts behind the commitments, and, where the
//! manager can be reached, what clients signed of the delivery.

use std::io::Write;
use std::path::{Path, PathBuf};

use node::ControlError;
use protocol::api::{SalesRequest, SalesResponse};
use protocol::evidence::{EvidencePack, Exporter, OrderWords};
use serde_json::{Value, json};

use crate::clock::now_ms;
use crate::orders::Order;
use crate::shop::Shop;

/// Writes the file of one order; one that is there is not replaced.
pub(crate) async fn export(shop: &Shop, order: &Order, path: &Path) -> Result<Value, ControlError> {
    if !path.is_absolute() {
        return Err(ControlError::new("malformed", "the path of the file must be absolute"));
    }
    let (pack, manager) = gather(shop, order).await?;
    // The manager vouches for what a key signed that was revoked since; without its part a file may prove nothing at all.
    let proves_nothing = manager.is_some() && pack.verify(&shop.link.join().root).facts.transaction.is_none();
    let (bytes, place) = (pack.to_bytes(), path.to_owned());
    let length = bytes.len();
    let written = tokio::task::spawn_blocking(move || write(place, &bytes)).await;
    let failed = |error: String| ControlError::new("internal", format!("cannot write {}: {error}", path.display()));
    written.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
    Ok(json!({
        "path": path, "bytes": length, "order": order.id, "transaction": order.transaction(),
        "acknowledgements": pack.acks.len(), "completions": pack.completions.len(), "manager_missing_because": manager,
        "proves_nothing": proves_nothing,
    }))
}

/// The pack, and why the manager's part is missing, if it is.
async fn gather(shop: &Shop, order: &Order) -> Result<(EvidencePack, Option<String>), ControlError> {
    let (Some(data), Some(transaction)) = (order.data.clone(), order.transaction()) else {
        let text =
            format!("the order is {}: no transaction was formed, there is nothing to show", order.stage.as_str());
        return Err(ControlError::new("wrong-state", text));
    };
    let mut pack = EvidencePack::new(Exporter::Merchant, now_ms(), data);
    pack.endorsement.clone_from(&order.endorsement);
    pack.key_sets.extend(shop.link.trust().map(|trust| trust.signed_key_set().clone()));
    if let Ok(Some(ticket)) = shop.ticket(&order.id) {
        pack.leases.push(ticket.ticket.lease);
    }
    let manager = match shop.link.sales(SalesRequest::Evidence { transaction }).await {
        Ok(SalesResponse::Evidence(bytes)) => match EvidencePack::from_bytes(&bytes) {
            // Of another sale it proves nothing of this one.
            Ok(theirs) if theirs.data == pack.data => {
                let (mut about, endorsement) = (pack.about, pack.endorsement.take());
                about.left_out = theirs.about.left_out;
                pack = EvidencePack { about, ..theirs };
                pack.endorsement = pack.endorsement.or(endorsement);
                None
            }
            Ok(_) => Some("the manager answered with another transaction".to_owned()),
            Err(error) => Some(error.to_string()),
        },
        Ok(_) => Some("the manager answered something else".to_owned()),
        Err(error) => Some(error.to_string()),
    };
    pack.order = Some(OrderWords {
        order: order.id.to_string(),
        body: order.body(),
        amount: order.amount,
        price_salt: order.price_salt,
        payment_salt: order.payment_salt,
        authorisation: order.authorisation.to_string(),
    });
    Ok((pack, manager))
}

fn write(path: PathBuf, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist_noclobber(&path)?;
    Ok(())
}
