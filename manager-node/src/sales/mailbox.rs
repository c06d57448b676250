//! The will-call window: a client asks for what was bought for it, and gets it only as the peer that its connection
//! proves (step 8). Here leases are renewed, and keys of on-completion sales change hands.

use std::sync::Arc;
use std::time::Duration;

use bincode::{Decode, Encode};
use node::{CallLimits, Protocol, Supervisor, serve_calls};
use protocol::api::{self, MailItem, MailboxRequest, MailboxResponse, TransactionState};
use protocol::manifest::KeyPolicy;
use protocol::receipt::{Completion, DeliveryId};
use protocol::ticket::Lease;
use protocol::trust::KeyPurpose;
use protocol::utc::Utc;
use protocol::{PeerId, Refusal, RefusalCode, Signed, TransactionId, wire};
use store::{Step, Table};
use tracing::{info, warn};

use super::lease::{self, Terms};
use super::{blocking, moving, withheld};
use crate::StartError;
use crate::archive::Seen;
use crate::catalogue::Product;
use crate::context::{Context, now_ms};
use crate::transactions::{
    COMPLETIONS, MAILBOX, PAID_DELIVERY, Release, SALES, Sale, SaleError, after_count, delivery_of, get_delivery,
    move_due, open_delivery, put_delivery, put_sale,
};
use crate::{archive, evidence};

const MAILBOX_PROTOCOL: Protocol = Protocol::new(api::MAILBOX_PROTOCOL);

/// A client asks now and then, and waits for the answer: few at once from one peer.
const LIMITS: CallLimits = CallLimits { concurrent: 256, per_peer: 8, io_timeout: Duration::from_secs(10) };

/// Complaints of clients.
const COMPLAINTS: Table<(TransactionId, u32), Complaint> = Table::new("complaints");
/// Most complaints kept of one transaction: they are hints, and a handful says as much as thousands.
const MAX_COMPLAINTS: usize = 64;

/// A client's word that a seeder sent a bad chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
struct Complaint {
    at: u64,
    seeder: PeerId,
    chunk: u32,
}

wire!(Complaint => 64);

pub(super) async fn start(ctx: &Arc<Context>, supervisor: &Supervisor) -> Result<(), StartError> {
    let service = Arc::clone(ctx);
    serve_calls(supervisor, &ctx.node, MAILBOX_PROTOCOL, LIMITS, move |peer, request| {
        let ctx = Arc::clone(&service);
        async move {
            answer(&ctx, peer, request).await.unwrap_or_else(|refusal| {
                info!(client = %peer, code = %refusal.code, detail = refusal.detail, "mailbox request refused");
                MailboxResponse::Refused(refusal)
            })
        }
    })
    .await?;
    Ok(())
}

/// Answers one request of a client.
pub(crate) async fn answer(
    ctx: &Arc<Context>,
    client: PeerId,
    request: MailboxRequest,
) -> Result<MailboxResponse, Refusal> {
    let now = now_ms();
    let request = match request {
        MailboxRequest::Move { word } => {
            let generation = blocking(ctx, move |ctx| moving::by_holder(ctx, client, word, now)).await?;
            ctx.announcing.nudge();
            return Ok(MailboxResponse::Moved { generation });
        }
        request => request,
    };
    let answer = blocking(ctx, move |ctx| match request {
        MailboxRequest::List { before } => list(ctx, client, before),
        MailboxRequest::Ticket { transaction, instead_of } => ticket(ctx, client, transaction, instead_of, now),
        MailboxRequest::Complete { completion } => complete(ctx, client, completion, now),
        MailboxRequest::Complain { transaction, seeder, chunk } => {
            complain(ctx, client, transaction, Complaint { at: now, seeder, chunk })
        }
        // Answered before they get here.
        MailboxRequest::Move { .. } => Err(Refusal::new(RefusalCode::Internal, "answered elsewhere").into()),
    })
    .await;
    // Seeders hear of what was given back.
    if answer.as_ref().is_err_and(|refusal| refusal.code == RefusalCode::Revoked) {
        ctx.announcing.nudge();
    }
    answer
}

fn list(ctx: &Context, client: PeerId, before: Option<TransactionId>) -> Result<MailboxResponse, SaleError> {
    let first = TransactionId::from_bytes([0; 16]);
    let mut before = before.unwrap_or(TransactionId::from_bytes([0xff; 16]));
    ctx.db.read(|txn| {
        let mut items = Vec::new();
        // Fewer than a page would say that this was all.
        loop {
            let missing = MailboxResponse::PAGE.saturating_sub(items.len());
            let page = MAILBOX.range_back(txn, (client, first)..(client, before), missing)?;
            let Some(((_, last), _)) = page.last() else { return Ok(MailboxResponse::List(items)) };
            before = *last;
            for ((_, transaction), _) in page {
                // One whose record is damaged hides no other.
                let Some(Seen::Whole(sale)) = ctx.archive.seen(txn, &transaction)? else { continue };
                let generation = moving::generation(ctx, &transaction, &sale);
                items.push(MailItem {
                    transaction,
                    title: sale.title,
                    state: sale.state,
                    released_at: sale.release.map_or(0, |release| release.at),
                    plain_bytes: sale.plain_bytes,
                    generation,
                });
            }
        }
    })
}

/// The released sale of this client; what is not its own looks like what does not exist.
pub(super) fn entitled(sale: Option<Sale>, client: &PeerId) -> Result<(Sale, Release), Refusal> {
    let refused = || Refusal::new(RefusalCode::NotEntitled, "there is no such ticket for this peer");
    let sale = sale.filter(|sale| sale.client == *client).ok_or_else(refused)?;
    let release = sale.release.clone().ok_or_else(refused)?;
    match sale.state {
        TransactionState::Refunded | TransactionState::Revoked => {
            let detail = format!("the purchase was {}", sale.state.as_str());
            Err(Refusal::new(RefusalCode::Revoked, detail))
        }
        _ => Ok((sale, release)),
    }
}

/// The same, in the store for what is to be changed: one that moved out is brought back.
pub(super) fn present(ctx: &Context, id: TransactionId, client: &PeerId) -> Result<(Sale, Release), SaleError> {
    let sale = ctx.db.read(|txn| ctx.archive.sale(txn, &id))?;
    let found = entitled(sale.clone(), client).or_else(|refusal| match sale {
        // Why it was taken back is told with it.
        Some(sale) if refusal.code == RefusalCode::Revoked && withheld::is_taken_down(ctx, &sale)? => {
            let detail = format!("this content was taken down, and {}", refusal.detail);
            Err(SaleError::from(Refusal::new(refusal.code, detail)))
        }
        Some(sale) if refusal.code == RefusalCode::Revoked && is_overclaimed(ctx, id, &sale)? => {
            Err(SaleError::from(Refusal::new(refusal.code, OVERCLAIMED)))
        }
        _ => Err(refusal.into()),
    })?;
    archive::bring_back(ctx, id)?;
    Ok(found)
}

/// Whoever lost downloads looks in the books like somebody who shares a key.
const OVERCLAIMED: &str = "more was acknowledged than one purchase allows, as by downloads that were lost or a home that \
                           was copied, before it was paid for: what was held is given back, and it can be bought again";

/// Was it taken back for that, with its payment held?
fn is_overclaimed(ctx: &Context, id: TransactionId, sale: &Sale) -> Result<bool, SaleError> {
    let held = sale.release.as_ref().is_some_and(|release| !release.captured);
    if sale.state != TransactionState::Revoked || !held {
        return Ok(false);
    }
    let paid = ctx.db.read(|txn| get_delivery(txn, DeliveryId { transaction: id, delivery: PAID_DELIVERY }))?;
    Ok(paid.is_some_and(|paid| paid.counting.claimed_bytes(&paid.layout) > paid.claim_limit))
}

/// The key that signed the lease was revoked, or is over, or is no key of the network's: no seeder takes it.
fn is_void(ctx: &Context, release: &Release, now: u64) -> bool {
    let opened = ctx.trust().open(&release.lease, KeyPurpose::Ticket, |lease: &Lease| lease.issued_at, now);
    opened.is_err_and(|refusal| matches!(refusal.code, RefusalCode::KeyRetired | RefusalCode::UnknownKey))
}

/// No seeder takes it yet: this manager's clock was ahead when it was signed, and was set right since.
fn is_early(ctx: &Context, release: &Release, now: u64) -> bool {
    release.lease_start > now.saturating_add(ctx.trust().grace_ms())
}

/// The paid delivery of a purchase gets new leases for so long after its release at least, milliseconds …
const PAID_MS: u64 = 28 * DAY_MS;
/// … or for the time of so many leases, where that is longer.
const PAID_LEASES: u64 = 4;
/// So many deliveries a purchase has at once, and so many more as it is days old: what is asked for is stored. Each change
/// of hands, and each lease that became void, has one of its own besides.
pub(super) const DELIVERIES: u64 = 64;
const DAY_MS: u64 = 86_400_000;

/// Its seeders are paid when the paid delivery is closed, and the merchant's credit is bound until then: a client that
/// never completes it is not to keep it open for ever. It goes on unpaid, from the origin.
fn is_paid_for(release: &Release, now: u64) -> bool {
    let leases = release.lease_end.saturating_sub(release.lease_start).saturating_mul(PAID_LEASES);
    now < release.at.saturating_add(leases.max(PAID_MS))
}

/// May another delivery be opened already?
fn check_further(sale: &Sale, release: &Release, now: u64) -> Result<(), Refusal> {
    let number = u64::from(release.delivery).saturating_add(1);
    let days = number.saturating_sub(DELIVERIES.saturating_add(u64::from(sale.generation)));
    let from = release.at.saturating_add(days.saturating_mul(DAY_MS));
    if days == 0 || now >= from {
        return Ok(());
    }
    let detail = format!(
        "this purchase was fetched {} times; the next delivery of it is begun at {} at the earliest",
        release.delivery,
        Utc(from)
    );
    Err(Refusal::new(RefusalCode::LimitReached, detail).retry_after(from - now))
}

/// The newest lease, or a new one where that is past half its life, void, begins later, or its delivery is over. The
/// client may give up the newest delivery for a further one, `instead_of` it: what it lost half-way no seeder sends again
/// in the same one. What was delivered until then is paid as ever.
pub(super) fn ticket(
    ctx: &Context,
    client: PeerId,
    id: TransactionId,
    instead_of: Option<u32>,
    now: u64,
) -> Result<MailboxResponse, SaleError> {
    let (sale, release) = present(ctx, id, &client)?;
    withheld::check(ctx, id, client, &sale, now)?;
    let half = release.lease_start.saturating_add(release.lease_end.saturating_sub(release.lease_start) / 2);
    let current = DeliveryId { transaction: id, delivery: release.delivery };
    let delivery = ctx.db.read(|txn| get_delivery(txn, current))?;
    // A completed one waits for receipts, and so does one whose lease was ended; who downloads again needs another.
    let open = delivery.is_some_and(|delivery| delivery.closed.is_none() && !delivery.counting.is_completed());
    let open = open && !sale.lease_ended(&release);
    // A buyer's payment cannot be held for ever: an on-completion sale is completed within its one lease, or refunded.
    let renewable = sale.policy == KeyPolicy::AtRelease || release.captured;
    let given_up = open && renewable && instead_of == Some(release.delivery);
    let open = open && !given_up;
    // Where the key that signed it was given up, or it begins later, another lease takes its place for the time that was left.
    let end = (!renewable).then(|| release.held_until(now));
    let useless = is_void(ctx, &release, now) || is_early(ctx, &release, now);
    let replace = useless && (renewable || open && now < release.lease_end);
    // By a clock that is known to be ahead nothing is signed: no seeder would take it, nor the client, and the delivery would
    // be closed as late as that. The lease that there is does while it lasts.
    if let Some(by) = ctx.clock_ahead()
        && (replace || !open || now.saturating_sub(by) >= release.lease_end)
    {
        ctx.clock_lets_sell()?;
    }
    let renewable = renewable && ctx.clock_ahead().is_none();
    // Where there is no key to sign another one with, the one that there is may do for a while.
    let renewable = renewable && ctx.may_sign(KeyPurpose::Ticket).is_ok();
    let (sale, release) = if replace || renewable && (now >= half || !open) {
        let sale = renew(ctx, id, client, (&sale, &release), Renewal { open, end }, now)?;
        entitled(Some(sale), &client)?
    } else {
        // Also for content that was taken down since.
        key_product_of(ctx, &sale)?;
        (sale, release)
    };
    let (sale, release) = with_grant(ctx, id, sale, release)?;
    info!(step = 8, transaction = %id, %client, delivery = release.delivery, "ticket to the client");
    Ok(MailboxResponse::Ticket(Box::new(lease::envelope(ctx, &sale, &release)?)))
}

/// What kind of lease takes the place of another.
struct Renewal {
    /// For the delivery that is under way.
    open: bool,
    /// When it ends, where that is not to be later than before.
    end: Option<u64>,
}

/// Signs and stores a new lease: for the same delivery while that is open; after it was closed and paid, or was open for as
/// long as one is paid for, for a further one, which nobody pays for and which therefore names the origin alone.
fn renew(
    ctx: &Context,
    id: TransactionId,
    client: PeerId,
    (sale, release): (&Sale, &Release),
    Renewal { open, end }: Renewal,
    now: u64,
) -> Result<Sale, SaleError> {
    ctx.may_sign(KeyPurpose::Ticket)?;
    ctx.clock_lets_sell()?;
    let product = key_product_of(ctx, sale)?;
    let old_lease = release.lease.peek().map_err(Refusal::from)?;
    // One whose time is fixed is over by itself.
    let open = open && (end.is_some() || release.delivery != PAID_DELIVERY || is_paid_for(release, now));
    if !open {
        check_further(sale, release, now)?;
    }
    let paid = open && release.delivery == PAID_DELIVERY;
    let sources: Vec<PeerId> = if paid {
        ctx.demand.asked(sale.manifest, now);
        let sources = ctx.registry.sources_for(&sale.manifest, now, Lease::MAX_SOURCES)?;
        sources.into_iter().map(|source| source.peer).collect()
    } else {
        ctx.registry.origin().into_iter().collect()
    };
    let terms = Terms {
        endorsement: release.endorsement.digest(),
        delivery: if open { release.delivery } else { release.delivery.saturating_add(1) },
        rate: if open { old_lease.rate } else { 0 },
        ceiling: if open { old_lease.ceiling } else { 0 },
        sources,
        end,
    };
    let (signed, leased) = lease::sign(ctx, sale, &product, terms, now);
    let due_at = leased.end.saturating_add(ctx.config.close_grace_ms);
    let (seen, generation_before) = (release.lease.digest(), old_lease.generation);
    let next = DeliveryId { transaction: id, delivery: leased.delivery };
    ctx.db.write_step_blocking(Step::ManagerRenew, move |txn| {
        // Looked at again: a refund may have come in between.
        let (mut sale, _) = entitled(SALES.get(txn, &id)?, &client)?;
        let Some(release) = sale.release.as_mut().filter(|release| release.lease.digest() == seen) else {
            // Renewed by another call meanwhile: that lease is as good.
            return Ok(sale);
        };
        if sale.generation != leased.generation {
            let detail = "the purchase's lease was ended at the same moment";
            return Err(Refusal::new(RefusalCode::Overloaded, detail).retry_after(100).into());
        }
        match get_delivery(txn, next)? {
            Some(delivery) if delivery.closed.is_some() => {
                return Err(Refusal::new(RefusalCode::Overloaded, "the delivery is being closed")
                    .retry_after(100)
                    .into());
            }
            Some(mut delivery) => {
                // A completed one waits for receipts only, which need no longer lease.
                if !delivery.counting.is_completed() {
                    move_due(txn, next, &mut delivery, due_at)?;
                    put_delivery(txn, next, &delivery)?;
                }
            }
            None => open_delivery(txn, next, &delivery_of(&leased, sale.manifest, sale.layout, due_at))?,
        }
        // The key is sealed to a generation; whoever downloads again has it sealed anew.
        if !open || generation_before != leased.generation {
            release.grant = None;
        }
        release.lease = signed.clone();
        release.lease_start = leased.start;
        release.lease_end = leased.end;
        release.delivery = leased.delivery;
        put_sale(txn, &id, Some(sale.state), &sale)?;
        Ok::<_, SaleError>(sale)
    })
}

/// The product whose key a sale is to have. One that was paid for on completion is fetched already: its key is given out
/// after a takedown, too, where the payment was taken before.
fn key_product_of(ctx: &Context, sale: &Sale) -> Result<Product, SaleError> {
    match sale.policy {
        KeyPolicy::OnCompletion if sale.release.as_ref().is_some_and(|release| release.captured) => {
            lease::any_product_of(ctx, sale)
        }
        _ => lease::product_of(ctx, sale),
    }
}

/// Makes the key grant of a sale that was completed and has none yet, and stores it. One for a lease that was ended opens
/// what was downloaded under that lease, and is not stored: with the next lease it opens nothing.
fn with_grant(
    ctx: &Context,
    id: TransactionId,
    sale: Sale,
    mut release: Release,
) -> Result<(Sale, Release), SaleError> {
    if release.grant.is_some() || !release.captured {
        return Ok((sale, release));
    }
    let product = key_product_of(ctx, &sale)?;
    let lease = release.lease.peek().map_err(Refusal::from)?;
    let grant = lease::grant(&product, &sale, &lease)?;
    if sale.lease_ended(&release) {
        release.grant = Some(grant);
        return Ok((sale, release));
    }
    let client = sale.client;
    let sale = ctx.db.write_step_blocking(Step::ManagerGrant, move |txn| {
        let (mut sale, mut release) = entitled(SALES.get(txn, &id)?, &client)?;
        // The lease may have been ended since, or another one have taken its place.
        let newest = release.lease.peek().map_err(Refusal::from)?.generation;
        if release.grant.is_none() && [sale.generation, newest] == [lease.generation; 2] {
            release.grant = Some(grant.clone());
            sale.release = Some(release);
            put_sale(txn, &id, Some(sale.state), &sale)?;
        }
        Ok::<_, SaleError>(sale)
    })?;
    Ok(entitled(Some(sale), &client)?)
}

fn complete(ctx: &Context, client: PeerId, signed: Signed<Completion>, now: u64) -> Result<MailboxResponse, SaleError> {
    let said = signed.clone();
    let answer = try_complete(ctx, client, signed, now);
    if answer.is_err() {
        heard_in_vain(ctx, client, &said, now)?;
    }
    answer
}

/// It changes nothing, of a sale that was taken back for instance; that it came in is so all the same.
fn heard_in_vain(ctx: &Context, client: PeerId, said: &Signed<Completion>, now: u64) -> Result<(), SaleError> {
    let Ok(delivery) = said.peek().map(|said| said.delivery) else { return Ok(()) };
    let id = delivery.transaction;
    let sale = ctx.db.read(|txn| ctx.archive.sale(txn, &id))?.filter(|sale| sale.client == client);
    let holds = |sale: &Sale| Completion::check(said, &client, &ctx.network(), delivery, &sale.manifest).is_ok();
    if sale.as_ref().is_some_and(holds) && ctx.db.read(|txn| evidence::first_at(txn, &id))?.is_none() {
        ctx.db.write_blocking(move |txn| evidence::heard(txn, id, now))?;
    }
    Ok(())
}

fn try_complete(
    ctx: &Context,
    client: PeerId,
    signed: Signed<Completion>,
    now: u64,
) -> Result<MailboxResponse, SaleError> {
    let id = signed.peek().map_err(Refusal::from)?.delivery.transaction;
    let (sale, _) = present(ctx, id, &client)?;
    let number = signed.peek().map_err(Refusal::from)?.delivery.delivery;
    let delivery_id = DeliveryId { transaction: id, delivery: number };
    Completion::check(&signed, &client, &ctx.network(), delivery_id, &sale.manifest)?;
    withheld::check(ctx, id, client, &sale, now)?;
    let grace_ms = ctx.config.close_grace_ms;
    let forgetful_before = ctx.forgetful_before(now);
    let sale = ctx.db.write_step_blocking(Step::ManagerComplete, move |txn| {
        let (mut sale, mut release) = entitled(SALES.get(txn, &id)?, &client)?;
        let mut delivery = get_delivery(txn, delivery_id)?
            .ok_or_else(|| Refusal::new(RefusalCode::BadReceipt, "there is no such delivery of this purchase"))?;
        // Whoever has the purchase now completes its own downloads: of another peer's it knows nothing.
        if delivery.client != client {
            return Err(Refusal::new(RefusalCode::BadReceipt, "that delivery is another peer's").into());
        }
        if release.completed_at.is_none() {
            release.completed_at = Some(now);
            sale.release = Some(release);
        }
        if delivery.counting.complete() {
            COMPLETIONS.put(txn, &(id, number), &signed)?;
            evidence::heard(txn, id, now)?;
            after_count(txn, delivery_id, &mut delivery, Some(&mut sale), now, grace_ms, forgetful_before)?;
        }
        Ok::<_, SaleError>(sale)
    })?;
    info!(step = 12, transaction = %id, %client, "completion from the client");
    let (sale, release) = entitled(Some(sale), &client)?;
    let (_, release) = with_grant(ctx, id, sale, release)?;
    Ok(MailboxResponse::Completed { grant: release.grant })
}

/// Kept as a hint: anybody can accuse a seeder, and a seeder is judged by what an audit fetch finds.
fn complain(
    ctx: &Context,
    client: PeerId,
    id: TransactionId,
    complaint: Complaint,
) -> Result<MailboxResponse, SaleError> {
    let (sale, _) = present(ctx, id, &client)?;
    if complaint.chunk >= sale.layout.chunks() {
        return Err(Refusal::new(RefusalCode::BadWant, "the content has no such chunk").into());
    }
    ctx.db.write_blocking(move |txn| {
        let kept = COMPLAINTS.prefix(txn, &id, MAX_COMPLAINTS)?.len();
        if kept >= MAX_COMPLAINTS {
            let detail = "64 complaints of this purchase are kept already";
            return Err(SaleError::from(Refusal::new(RefusalCode::LimitReached, detail)));
        }
        Ok(COMPLAINTS.put(txn, &(id, u32::try_from(kept).unwrap_or(u32::MAX)), &complaint)?)
    })?;
    // Whoever does not hold it cannot have sent it; and the origin is this manager's own.
    if ctx.registry.holds(&complaint.seeder, &sale.manifest)? && ctx.registry.origin() != Some(complaint.seeder) {
        ctx.audits.suspect(complaint.seeder, sale.manifest, Some(complaint.chunk));
    }
    warn!(transaction = %id, seeder = %complaint.seeder, chunk = complaint.chunk, "client complains of a bad chunk");
    Ok(MailboxResponse::Noted)
}
