//! The lease, which the manager signs last, and the envelope in which a client gets it; made at release and again at
//! every renewal, by the same rules.

use protocol::signed::Signed;
use protocol::ticket::{KeyGrant, Lease, Payer, Ticket, TicketEnvelope};
use protocol::trust::KeyPurpose;
use protocol::{Digest, PeerAddrs, PeerId, Refusal, RefusalCode};

use crate::catalogue::Product;
use crate::context::Context;
use crate::transactions::{Release, Sale, SaleError, internal};

/// Addresses of one source in an envelope: 32 sources of four long addresses each stay below its 64 KiB.
const SOURCE_ADDRS: usize = 4;

/// What a lease is for, where it differs from one to the next.
pub(super) struct Terms {
    /// Digest of the signed endorsement.
    pub(super) endorsement: Digest,
    /// Which delivery.
    pub(super) delivery: u32,
    /// Millionths of the minor unit per MiB.
    pub(super) rate: u64,
    /// Millionths of the minor unit.
    pub(super) ceiling: u64,
    /// Who may serve it with a large window.
    pub(super) sources: Vec<PeerId>,
    /// When it ends, unix milliseconds; `None` for the product's time from now.
    pub(super) end: Option<u64>,
}

/// The product of a sale, whatever became of it since.
pub(super) fn any_product_of(ctx: &Context, sale: &Sale) -> Result<Product, SaleError> {
    let product = ctx.catalogue.any_product(&sale.request.product)?;
    Ok(product.ok_or_else(|| internal(&format!("product {} of a sale is missing", sale.request.product)))?)
}

/// The product of a sale, which may be withdrawn since, but not taken down.
pub(super) fn product_of(ctx: &Context, sale: &Sale) -> Result<Product, SaleError> {
    let product = any_product_of(ctx, sale)?;
    let content = product.manifest.peek().map_err(Refusal::from)?.content;
    if ctx.revocations.with(|revoked| revoked.has_content(&content)) {
        return Err(Refusal::new(RefusalCode::Revoked, "this content was taken down").into());
    }
    Ok(product)
}

/// Bytes that one seeder, and for all practical ends all of them together, may send for content of this length: a
/// quarter more than the content, and 16 MiB that small contents need for chunks asked for twice.
pub(crate) fn allowance(length: u64) -> u64 {
    length.saturating_add(length / 4).saturating_add(16 * 1024 * 1024)
}

/// Signs a lease from now on.
pub(super) fn sign(ctx: &Context, sale: &Sale, product: &Product, terms: Terms, now: u64) -> (Signed<Lease>, Lease) {
    let lease = Lease {
        transaction_data: sale.data.digest(),
        endorsement: terms.endorsement,
        client: sale.client,
        generation: sale.generation,
        delivery: terms.delivery,
        issued_at: now,
        start: now,
        end: terms.end.unwrap_or(now.saturating_add(product.lease_ms)),
        allowance: allowance(sale.layout.length),
        sources: terms.sources,
        rate: terms.rate,
        currency: sale.price().currency,
        ceiling: terms.ceiling,
        payer: Payer::Merchant,
        staleness: product.staleness_ms,
    };
    (ctx.keys.sign(KeyPurpose::Ticket, &lease), lease)
}

/// Seals the content key to the lease's client.
pub(super) fn grant(product: &Product, sale: &Sale, lease: &Lease) -> Result<KeyGrant, SaleError> {
    let data = sale.data.peek().map_err(Refusal::from)?;
    let rng = &mut rand::rng();
    // The designated client's key was checked at the reservation; that of a client it was moved to, is here.
    let sealed = match lease.client == data.client {
        true => KeyGrant::seal_to_checked(&product.secret, &data, lease, rng),
        false => KeyGrant::seal(&product.secret, &data, lease, rng),
    };
    sealed.map_err(|e| Refusal::new(RefusalCode::Malformed, format!("the client's key: {e}")).into())
}

/// What the client gets, with the addresses of the sources as they are known now.
pub(super) fn envelope(ctx: &Context, sale: &Sale, release: &Release) -> Result<TicketEnvelope, SaleError> {
    let lease = release.lease.peek().map_err(Refusal::from)?;
    let sources: Result<Vec<PeerAddrs>, _> = lease.sources.iter().map(|peer| ctx.registry.addresses(peer)).collect();
    Ok(envelope_with(ctx, sale, release, sources?))
}

/// The same for a lease whose sources were just looked up.
pub(super) fn envelope_with(
    ctx: &Context,
    sale: &Sale,
    release: &Release,
    mut sources: Vec<PeerAddrs>,
) -> TicketEnvelope {
    sources.iter_mut().for_each(|known| known.addrs.truncate(SOURCE_ADDRS));
    TicketEnvelope {
        ticket: Ticket {
            data: sale.data.clone(),
            endorsement: Some(release.endorsement.clone()),
            lease: release.lease.clone(),
        },
        grant: release.grant.clone(),
        join: ctx.join_line(),
        sources,
        title: sale.title.clone(),
    }
}
