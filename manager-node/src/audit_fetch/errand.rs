//! What the manager shows to a seeder that it looks at: a ticket like any client's, for a purchase that the network pays
//! for. The seeder earns with it what it would earn with a real one, and its receipts count.

use bincode::{Decode, Encode};
use protocol::manifest::Manifest;
use protocol::receipt::DeliveryId;
use protocol::settling::{Counting, Layout};
use protocol::ticket::{
    Endorsement, Lease, Payer, Ticket, TransactionData, payment_commitment, remuneration_commitment,
};
use protocol::trust::KeyPurpose;
use protocol::{Digest, Keypair, Nonce, PeerId, Refusal, Signed, TransactionId, wire};
use rand::RngExt;
use store::Table;

use crate::catalogue;
use crate::context::Context;
use crate::ledger::{Split, Terms};
use crate::sales::allowance;
use crate::transactions::{Delivery, PAID_DELIVERY, SaleError, open_delivery};

/// The secret from which the shops are made in whose name the manager buys.
const HOUSE: Table<(), House> = Table::new("house-shops");

/// A shop sells for so long: a merchant of which every seeder sees exactly one sale would be known for what it is.
const SHOP_MS: u64 = 7 * 24 * 60 * 60 * 1000;

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
struct House {
    secret: [u8; 32],
}

wire!(House => 64);

/// One purchase.
pub(super) struct Errand {
    /// Whose it is: drawn for it alone.
    pub(super) client: Keypair,
    pub(super) ticket: Ticket,
    pub(super) delivery: DeliveryId,
    pub(super) signed: Signed<Manifest>,
    pub(super) manifest: Manifest,
}

/// Buys the content for a client that nobody has seen before. `None` where the seeder may not serve it any more. Blocks.
pub(super) fn make(ctx: &Context, seeder: PeerId, manifest: Digest, now: u64) -> Result<Option<Errand>, SaleError> {
    let Some(product) = ctx.catalogue.product_by_manifest(&manifest)? else { return Ok(None) };
    let signed = product.manifest.clone();
    let content = signed.peek().map_err(Refusal::from)?;
    let void = ctx.revocations.with(|revoked| revoked.has_peer(&seeder) || revoked.has_content(&content.content));
    // Also where the product has another manifest by now: a fetch of it would prove nothing about this one.
    let stale = product.info.manifest != manifest
        || catalogue::void(&ctx.trust(), &signed, content.published_at, now).is_some();
    if void || stale || product.withdrawn {
        return Ok(None);
    }
    let shop = shop(ctx, now)?;
    let client = Keypair::from_seed(&rand::rng().random());
    let id = TransactionId::new(now, rand::rng().random());
    let nonce = || Nonce::from_bytes(rand::rng().random());
    let price = product.info.price;
    let data = TransactionData {
        network: ctx.network(),
        transaction: id,
        product: product.info.id,
        manifest,
        client: client.peer_id(),
        merchant: shop.peer_id(),
        remuneration: remuneration_commitment(&nonce(), &price),
        formed_at: now,
    };
    let data = ctx.keys.sign(KeyPurpose::Ticket, &data);
    let endorsement = Endorsement {
        transaction_data: data.digest(),
        payment: payment_commitment(&nonce(), "house", &price),
        authorised_at: now,
    };
    let endorsement = Signed::sign(&endorsement, &shop);
    let split = Split::of(&Terms {
        price,
        shares: &product.shares,
        fee_millionths: ctx.config.fee_millionths,
        rate: product.rate,
        content_bytes: content.length,
        slack_millionths: ctx.config.ceiling_slack_millionths,
    });
    let sources = ctx.registry.sources_for(&manifest, now, Lease::MAX_SOURCES)?;
    let lease = Lease {
        transaction_data: data.digest(),
        endorsement: endorsement.digest(),
        client: client.peer_id(),
        generation: 0,
        delivery: PAID_DELIVERY,
        issued_at: now,
        start: now,
        end: now.saturating_add(product.lease_ms),
        allowance: allowance(content.length),
        sources: sources.into_iter().map(|source| source.peer).collect(),
        rate: split.rate,
        currency: price.currency,
        ceiling: split.ceiling,
        // As in every lease that a client has. Who really pays is in the books.
        payer: Payer::Merchant,
        staleness: product.staleness_ms,
    };
    let delivery = DeliveryId { transaction: id, delivery: PAID_DELIVERY };
    let counted = Delivery {
        client: client.peer_id(),
        manifest,
        layout: Layout::from(&content),
        rate: lease.rate,
        ceiling: lease.ceiling,
        currency: lease.currency,
        claim_limit: lease.allowance,
        payer: Payer::Network,
        due_at: now.saturating_add(ctx.config.close_grace_ms),
        counting: Counting::default(),
        closed: None,
    };
    ctx.db.write_blocking(move |txn| open_delivery(txn, delivery, &counted))?;
    let ticket = Ticket { data, endorsement: Some(endorsement), lease: ctx.keys.sign(KeyPurpose::Ticket, &lease) };
    Ok(Some(Errand { client, ticket, delivery, signed, manifest: content }))
}

/// The shop of this week.
fn shop(ctx: &Context, now: u64) -> Result<Keypair, SaleError> {
    let house = match ctx.db.read(|txn| HOUSE.get(txn, &()))? {
        Some(house) => house,
        None => {
            let house = House { secret: rand::rng().random() };
            let stored = house.clone();
            ctx.db.write_blocking(move |txn| HOUSE.put(txn, &(), &stored))?;
            house
        }
    };
    let week = (now / SHOP_MS).to_le_bytes();
    let seed = Digest::of("willcall 2026-11 house shop", &[&house.secret, &week]);
    Ok(Keypair::from_seed(seed.as_bytes()))
}
