//! What a receipt is about and whether its signatures hold, found out before the database's writer is involved. A bad
//! receipt does not fail its batch: it is kept with the reason, and the others count.

use protocol::receipt::{Ack, Completion, DeliveryId, Receipt, ReceiptBatch};
use protocol::replication::ReplicationOrder;
use protocol::settling::{Counting, Layout};
use protocol::ticket::Payer;
use protocol::{PeerId, Refusal, RefusalCode, Signed, TransactionId};

use store::StoreError;
use tracing::error;

use crate::archive;
use crate::context::Context;
use crate::sales::withheld::{Withheld, withheld};
use crate::transactions::{Delivery, SALES, Sale, SaleError, get_delivery};

/// Why a receipt is about nothing: there is no such delivery …
pub(super) const UNKNOWN_DELIVERY: &str =
    "no such delivery is known here: it was never released, or forgotten in a restore";
/// … or replication.
const NO_ORDER: &str = "there is no such replication order";

/// Nothing of a sale counts any more once it moved out, damaged or not. It is no word that the receipt is good either.
const DAMAGED: &str = "the manager's record of this sale moved out and is damaged: its delivery was closed, nothing of it \
                       counts any more";

/// Is it a receipt about nothing that this manager knows?
pub(super) fn is_unknown(code: RefusalCode, reason: &str) -> bool {
    code == RefusalCode::BadReceipt && [UNKNOWN_DELIVERY, NO_ORDER].contains(&reason)
}

/// A receipt whose signatures hold.
#[derive(Clone, Debug)]
pub(super) struct Good {
    /// What is counted under.
    pub(super) delivery: DeliveryId,
    /// What the client signed.
    pub(super) ack: Ack,
    /// The completion, where the receipt carries one that holds.
    pub(super) completion: Option<Signed<Completion>>,
    /// No key is given out for what it completes, and the payment is not taken.
    pub(super) withheld: Option<Withheld>,
    /// The generation that the purchase is in by the revocation epochs.
    pub(super) generation: u32,
    /// Of a sale formed before then, all may not be known yet of what was completed: this manager came back from a backup.
    pub(super) forgetful_before: Option<u64>,
    /// A replication whose first receipt this may be: its count as it begins.
    pub(super) replication: Option<Delivery>,
    /// The delivery, where it was closed and may have moved out of the store.
    pub(super) archived: Option<Delivery>,
}

/// A receipt and what was found.
#[derive(Clone, Debug)]
pub(super) struct Checked {
    pub(super) receipt: Receipt,
    pub(super) found: Result<Good, Refusal>,
    /// The transaction of which the client's signature under the acknowledgement is a word, whether it counts or not;
    /// none where it is known elsewhere when the first one came.
    pub(super) heard: Option<TransactionId>,
}

/// Checks every receipt of a batch; fails only where this manager does.
pub(super) fn all(ctx: &Context, seeder: PeerId, batch: ReceiptBatch, now: u64) -> Result<Vec<Checked>, SaleError> {
    batch
        .receipts
        .into_iter()
        .map(|receipt| {
            let mut heard = None;
            match check(ctx, seeder, &receipt, now, &mut heard) {
                Ok(good) => Ok(Checked { receipt, found: Ok(good), heard }),
                Err(SaleError::Refused(refusal)) => Ok(Checked { receipt, found: Err(refusal), heard }),
                Err(error) => Err(error),
            }
        })
        .collect()
}

fn check(
    ctx: &Context,
    seeder: PeerId,
    receipt: &Receipt,
    now: u64,
    heard: &mut Option<TransactionId>,
) -> Result<Good, SaleError> {
    let bad = |detail: &str| Refusal::new(RefusalCode::BadReceipt, detail);
    let id = receipt.ack.peek().map_err(Refusal::from)?.delivery;
    let (known, first_at) = ctx.db.read(|txn| match get_delivery(txn, id)? {
        Some(delivery) => Ok::<_, SaleError>((Some(delivery), None)),
        // A late one is judged by what moved out: its delivery was closed, so that it can change nothing there.
        None => match ctx.archive.archived(txn, &id.transaction) {
            Ok(Some(whole)) => Ok((whole.delivery(id.delivery).cloned(), whole.first_at)),
            Ok(None) => Ok((None, None)),
            // It concerns this receipt, and not all that its seeder ever sends. What it says is kept for what it may be.
            Err(error @ StoreError::Corrupt { .. }) if archive::is_archived(txn, &id.transaction)? => {
                error!(transaction = %id.transaction, %seeder, %error, "a receipt's sale cannot be read: restore its segment");
                *heard = Some(id.transaction);
                Err(Refusal::new(RefusalCode::WrongState, DAMAGED).into())
            }
            Err(error) => Err(error.into()),
        },
    })?;
    let replication = match (&known, id.delivery) {
        (None, ReplicationOrder::DELIVERY) => Some(replication(ctx, id, now)?),
        (None, _) => return Err(bad(UNKNOWN_DELIVERY).into()),
        (Some(_), _) => None,
    };
    let delivery = known.as_ref().or(replication.as_ref()).ok_or_else(|| bad("no such delivery"))?;
    let network = ctx.network();
    let ack = Ack::check(&receipt.ack, &delivery.client, &network, id, &delivery.manifest, &seeder)?;
    *heard = Some(id.transaction).filter(|_| first_at.is_none());
    if delivery.client == seeder {
        return Err(bad("a seeder is not paid for delivering to itself").into());
    }
    let completion = receipt
        .completion
        .as_ref()
        .map(|signed| {
            Completion::check(signed, &delivery.client, &network, id, &delivery.manifest).map(|_| signed.clone())
        })
        .transpose()?;
    let sale = match completion {
        Some(_) => ctx.db.read(|txn| SALES.get(txn, &id.transaction))?.filter(Sale::awaits_completion),
        None => None,
    };
    let withheld = sale.map_or(Ok(None), |sale| withheld(ctx, &id.transaction, &sale, now))?;
    let archived = known.filter(|delivery| delivery.closed.is_some());
    let generation = ctx.revocations.with(|revoked| revoked.generation(&id.transaction));
    let forgetful_before = ctx.forgetful_before(now);
    Ok(Good { delivery: id, ack, completion, withheld, generation, forgetful_before, replication, archived })
}

/// The count of a replication at its beginning, by the order that this manager signed.
fn replication(ctx: &Context, id: DeliveryId, now: u64) -> Result<Delivery, SaleError> {
    let unknown = || Refusal::new(RefusalCode::BadReceipt, NO_ORDER);
    let order = ctx.placements.order(&id.transaction)?.ok_or_else(unknown)?.peek().map_err(Refusal::from)?;
    let product = ctx.catalogue.product_by_manifest(&order.manifest)?.ok_or_else(unknown)?;
    let manifest = product.manifest.peek().map_err(Refusal::from)?;
    Ok(Delivery {
        client: order.seeder,
        manifest: order.manifest,
        layout: Layout::from(&manifest),
        rate: order.rate,
        ceiling: order.ceiling,
        currency: order.currency,
        claim_limit: u64::MAX,
        payer: Payer::Network,
        // The order may be renewed, and its receipts be late: counted from now rather than from its end.
        due_at: order.until.max(now).saturating_add(ctx.config.close_grace_ms),
        counting: Counting::default(),
        closed: None,
    })
}
