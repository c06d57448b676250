//! What the operator asks of sales and money through the control socket: looking at them, refunds, and payments that
//! moved outside of Willcall and have to be in the books.

use std::ops::Bound;
use std::sync::Arc;

use node::ControlError;
use protocol::amount::{Amount, Currency};
use protocol::api::TransactionState;
use protocol::replication::ReplicationOrder;
use protocol::statement::PaymentLine;
use protocol::{Refusal, RefusalCode, TransactionId};
use serde::Deserialize;
use serde_json::{Value, json};
use store::{Step, StoreError, Txn, WriteTransaction};

use super::{
    DELIVERIES, Delivery, Event, MOVES, MoveRecord, SALES, Sale, SaleError, Word, exposure, internal, take_back,
};
use crate::context::{Context, now_ms};
use crate::ledger::{self, Account, Posting, balance};
use crate::tables::MERCHANTS;
use crate::{archive, audit, evidence, receipts, statements};

/// Lines in an answer where the command does not say how many, and at most.
const LINES: usize = 100;
const MOST_LINES: usize = 1000;

const COMMANDS: [&str; 16] = [
    "archive",
    "audit",
    "audit-cut",
    "transactions",
    "transaction",
    "ledger",
    "receipts",
    "refund",
    "revoke-transaction",
    "record-payment",
    "credit",
    "statements",
    "statements-make",
    "statement-file",
    "payouts",
    "evidence",
];

#[derive(Deserialize)]
struct Listing {
    limit: Option<usize>,
    before: Option<TransactionId>,
    state: Option<TransactionState>,
    seeder: Option<protocol::PeerId>,
}

#[derive(Deserialize)]
struct Archive {
    #[serde(default)]
    verify: bool,
}

#[derive(Deserialize)]
struct AuditPage {
    after: Option<u64>,
}

#[derive(Deserialize)]
struct AuditCut {
    through: u64,
    digest: protocol::Digest,
}

#[derive(Deserialize)]
struct PayoutPage {
    limit: Option<usize>,
    after: Option<protocol::PeerId>,
}

#[derive(Deserialize)]
struct LedgerPage {
    limit: Option<usize>,
    /// Postings before this number.
    before: Option<u64>,
}

#[derive(Deserialize)]
struct StatementPage {
    limit: Option<usize>,
    /// Only of this one.
    seeder: Option<protocol::PeerId>,
    after: Option<statements::After>,
}

#[derive(Deserialize)]
struct One {
    id: TransactionId,
}

#[derive(Deserialize)]
struct Revoke {
    id: TransactionId,
    /// Although this manager knows no such transaction.
    #[serde(default)]
    unknown: bool,
}

#[derive(Deserialize)]
struct Credit {
    merchant: protocol::PeerId,
    currency: String,
    /// The merchant's own limit from now on, minor units of every currency.
    limit_minor: Option<u64>,
}

/// Who pays or is paid outside.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Party {
    /// A merchant pays what it owes.
    MerchantDue,
    /// A merchant is paid what it earned.
    MerchantEarned,
    /// A seeder is paid.
    Seeder,
    /// A rights holder is paid.
    RightsHolder,
}

#[derive(Clone, Deserialize)]
struct Payment {
    account: Party,
    /// A peer ID, or a rights holder's name.
    party: String,
    minor: u64,
    currency: String,
    /// Of the bank transfer; a second payment under one reference is refused.
    reference: String,
    /// Made before a restore, which lost what it was owed for, too: it may go beyond what is owed by the books as they are.
    #[serde(default)]
    again: bool,
}

/// Answers a control command about sales, receipts or money; `None` when it is none of these.
pub(crate) async fn control(ctx: &Arc<Context>, cmd: &str, request: &Value) -> Option<Result<Value, ControlError>> {
    if !COMMANDS.contains(&cmd) {
        return None;
    }
    let (work, cmd, request) = (Arc::clone(ctx), cmd.to_owned(), request.clone());
    let done = tokio::task::spawn_blocking(move || run(&work, &cmd, request)).await;
    let result = done.unwrap_or_else(|panic| Err(internal(&panic).into()));
    ctx.announcing.nudge();
    Some(result.map_err(|error| match error {
        SaleError::Refused(refusal) => ControlError::new(refusal.code.as_str(), refusal.detail),
        // The operator is told what failed, not only that something did.
        other => ControlError::new(RefusalCode::Internal.as_str(), other.to_string()),
    }))
}

fn parse<T: serde::de::DeserializeOwned>(request: Value) -> Result<T, Refusal> {
    serde_json::from_value(request).map_err(|e| Refusal::new(RefusalCode::Malformed, e.to_string()))
}

fn lines(limit: Option<usize>) -> usize {
    limit.unwrap_or(LINES).min(MOST_LINES)
}

fn run(ctx: &Context, cmd: &str, request: Value) -> Result<Value, SaleError> {
    match cmd {
        "transaction" => {
            let One { id } = parse(request)?;
            ctx.db.read(|txn| one(ctx, txn, id))
        }
        "refund" => {
            let One { id } = parse(request)?;
            archive::bring_back(ctx, id)?;
            let late_ms = ctx.config.close_grace_ms;
            let state = ctx.db.write_step_blocking(Step::ManagerRefund, move |txn| {
                take_back_by_id(txn, id, Event::Refund, late_ms)?.ok_or_else(|| SaleError::from(unknown(id)))
            })?;
            Ok(json!({"id": id, "state": state}))
        }
        "revoke-transaction" => {
            let Revoke { id, unknown: lost } = parse(request)?;
            archive::bring_back(ctx, id)?;
            // An id without a sale is a replication order's; or a sale's that a restore lost, where the operator says so.
            let may_lack = lost || ctx.placements.order(&id)?.is_some();
            let late_ms = ctx.config.close_grace_ms;
            let state = ctx.db.write_blocking(move |txn| match take_back_by_id(txn, id, Event::Revoke, late_ms)? {
                None if !may_lack => Err(SaleError::from(unknown(id))),
                state => Ok(state),
            })?;
            Ok(json!({"id": id, "state": state}))
        }
        "credit" => credit(ctx, parse(request)?),
        "statements-make" => statements::make_now(ctx, parse(request)?),
        "statement-file" => statements::file(ctx, parse(request)?),
        "evidence" => evidence::control(ctx, parse(request)?),
        "audit" => {
            let AuditPage { after } = parse(request)?;
            Ok(ctx.db.read(|txn| audit::page(&ctx.archive, txn, after.unwrap_or(0)))?)
        }
        "audit-cut" => {
            let AuditCut { through, digest } = parse(request)?;
            Ok(json!({"removed": audit::cut(ctx, through, digest, now_ms())?}))
        }
        "payouts" => {
            let page: PayoutPage = parse(request)?;
            ctx.db.read(|txn| statements::payouts(txn, page.after, page.limit.unwrap_or(MOST_LINES)))
        }
        "archive" => {
            let Archive { verify } = parse(request)?;
            Ok(archive::report(ctx, verify)?)
        }
        "ledger" => {
            let LedgerPage { limit, before } = parse(request)?;
            Ok(ctx.db.read(|txn| ledger::to_json(txn, before, lines(limit)))?)
        }
        "statements" => {
            let StatementPage { limit, seeder, after } = parse(request)?;
            ctx.db.read(|txn| statements::list(ctx, txn, seeder, after, lines(limit)))
        }
        "record-payment" => record_payment(ctx, parse(request)?),
        _ => {
            let listing: Listing = parse(request)?;
            let limit = lines(listing.limit);
            ctx.db.read(|txn| match cmd {
                "receipts" => Ok(receipts::to_json(txn, listing.seeder, limit)?),
                _ => Ok(list(ctx, txn, &listing, limit)?),
            })
        }
    }
}

fn list(ctx: &Context, txn: &impl Txn, listing: &Listing, limit: usize) -> Result<Value, StoreError> {
    let mut lines = Vec::new();
    let mut before = listing.before.map_or(Bound::Unbounded, Bound::Excluded);
    // Newest first; pages, because only some may be of the state asked for.
    loop {
        let present = SALES.range_back(txn, (Bound::Unbounded, before), MOST_LINES)?;
        let mut page: Vec<(TransactionId, TransactionState, Option<Sale>)> =
            present.into_iter().map(|(id, sale)| (id, sale.state, Some(sale))).collect();
        let archived = archive::archived_before(txn, before, MOST_LINES)?;
        page.extend(archived.into_iter().map(|(id, state)| (id, state, None)));
        page.sort_by_key(|(id, ..)| std::cmp::Reverse(*id));
        page.truncate(MOST_LINES);
        let full = page.len() == MOST_LINES;
        for (id, state, sale) in page {
            before = Bound::Excluded(id);
            if listing.state.is_none_or(|wanted| wanted == state) {
                match sale.map_or_else(|| ctx.archive.sale(txn, &id), |sale| Ok(Some(sale))) {
                    Ok(sale) => lines.extend(sale.map(|sale| line(id, &sale))),
                    // One record that cannot be read does not hide the others.
                    Err(error) => lines.push(json!({"id": id, "state": state, "error": error.to_string()})),
                }
            }
            if lines.len() == limit {
                return Ok(json!({"transactions": lines}));
            }
        }
        if !full {
            return Ok(json!({"transactions": lines}));
        }
    }
}

fn line(id: TransactionId, sale: &Sale) -> Value {
    json!({
        "id": id, "state": sale.state, "order": sale.request.order, "product": sale.request.product,
        "title": sale.title, "price": sale.price(), "merchant": sale.merchant, "client": sale.client,
        "generation": sale.generation,
        "policy": sale.policy, "formed_at": sale.formed_at, "changed_at": sale.changed_at,
    })
}

fn one(ctx: &Context, txn: &impl Txn, id: TransactionId) -> Result<Value, SaleError> {
    let shown = |postings: Vec<(u64, ledger::Posting)>| -> Vec<Value> {
        postings.iter().map(|(number, posting)| posting.to_json(*number)).collect()
    };
    let Some(whole) = ctx.archive.whole(txn, &id)? else {
        let deliveries = DELIVERIES.prefix(txn, &id, LINES)?;
        if deliveries.is_empty() {
            return Err(unknown(id).into());
        }
        // Replications and audit fetches are counted under their own id, without a sale.
        let replication = deliveries.iter().any(|((_, number), _)| *number == ReplicationOrder::DELIVERY);
        let lines: Vec<Value> =
            deliveries.iter().map(|((_, number), delivery)| delivery_json(*number, delivery, false)).collect();
        let postings = shown(ledger::numbered_postings_of(txn, &id)?);
        return Ok(json!({
            "id": id, "replication": replication, "audit": !replication, "deliveries": lines, "postings": postings,
        }));
    };
    let completed = |number: u32| whole.completions.iter().any(|(n, _)| *n == number);
    let deliveries = whole.deliveries.iter().take(LINES);
    let lines: Vec<Value> =
        deliveries.map(|(number, delivery)| delivery_json(*number, delivery, completed(*number))).collect();
    let sale = &whole.sale;
    let mut value = line(id, sale);
    let data = sale.data.peek().map_err(Refusal::from)?;
    let release = sale.release.as_ref().map(|release| {
        let split = &release.split;
        json!({
            "at": release.at, "lease_start": release.lease_start, "lease_end": release.lease_end,
            "delivery": release.delivery, "captured": release.captured, "completed_at": release.completed_at,
            "delivery_cost": release.charged,
            "split": {
                "rights": split.rights.iter().map(|(name, minor)| json!({"name": name, "minor": minor})).collect::<Vec<_>>(),
                "fee": split.fee, "delivery": split.escrow, "merchant": split.merchant,
            },
        })
    });
    if let Some(fields) = value.as_object_mut() {
        fields.insert("manifest".to_owned(), json!(data.manifest));
        fields.insert("reservation_expires_at".to_owned(), json!(sale.expires_at));
        fields.insert("release".to_owned(), json!(release));
        fields.insert("deliveries".to_owned(), json!(lines));
        fields.insert("moves".to_owned(), json!(moves(txn, id)?));
        fields.insert("archived".to_owned(), json!(!SALES.contains(txn, &id)?));
        fields.insert("postings".to_owned(), json!(shown(whole.postings)));
    }
    Ok(value)
}

/// Every change of hands.
fn moves(txn: &impl Txn, id: TransactionId) -> Result<Vec<Value>, StoreError> {
    let line = |generation: u32, moved: &MoveRecord| {
        let by = match moved.word {
            Word::Holder(_) => "holder",
            Word::Merchant(_) => "merchant",
        };
        json!({"generation": generation, "at": moved.at, "from": moved.from, "to": moved.to, "by": by})
    };
    let moves = MOVES.prefix(txn, &id, LINES)?;
    Ok(moves.iter().map(|((_, generation), moved)| line(*generation, moved)).collect())
}

fn delivery_json(number: u32, delivery: &Delivery, completion: bool) -> Value {
    let payouts = delivery.counting.payouts(&delivery.layout, delivery.rate, delivery.ceiling);
    let seeders: Vec<Value> = delivery
        .counting
        .acked()
        .zip(&payouts.lines)
        .map(|((seeder, chunks), line)| {
            json!({
                "seeder": seeder, "chunks": chunks.len(), "acknowledged_bytes": delivery.layout.bytes(chunks),
                "paid_bytes": line.bytes, "micros": line.micros(),
            })
        })
        .collect();
    json!({
        "number": number, "client": delivery.client, "rate": delivery.rate, "ceiling_micros": delivery.ceiling,
        "currency": delivery.currency, "chunks": delivery.layout.chunks(), "bytes": delivery.layout.length,
        "whole": delivery.counting.is_whole(&delivery.layout), "completed": delivery.counting.is_completed(),
        "completion": completion, "due_at": delivery.due_at,
        "closed_at": delivery.closed.as_ref().map(|closed| closed.at),
        "cost": delivery.closed.as_ref().map(|closed| closed.charged),
        "capped": payouts.capped, "seeders": seeders,
    })
}

fn unknown(id: TransactionId) -> Refusal {
    Refusal::new(RefusalCode::NotEntitled, format!("there is no transaction {id}"))
}

fn take_back_by_id(
    txn: &WriteTransaction<'_>,
    id: TransactionId,
    event: Event,
    late_ms: u64,
) -> Result<Option<TransactionState>, SaleError> {
    let Some(mut sale) = SALES.get(txn, &id)? else { return Ok(None) };
    take_back(txn, id, &mut sale, event, now_ms(), late_ms)?;
    Ok(Some(sale.state))
}

/// What a merchant owes and earned by the ledger, and what it may come to owe for deliveries, against its limit.
fn credit(ctx: &Context, asked: Credit) -> Result<Value, SaleError> {
    let currency =
        asked.currency.parse().map_err(|e| Refusal::new(RefusalCode::Malformed, format!("currency: {e}")))?;
    if let Some(limit) = asked.limit_minor {
        set_limit(ctx, asked.merchant, limit)?;
    }
    let limit = ctx.registry.merchant(&asked.merchant)?.and_then(|record| record.credit_limit);
    let (found, due, earned) = ctx.db.read(|txn| {
        let due = balance(txn, &Account::MerchantDue(asked.merchant), currency)?;
        let earned = balance(txn, &Account::MerchantEarned(asked.merchant), currency)?;
        Ok::<_, SaleError>((exposure::credit(txn, &asked.merchant, currency)?, due, earned))
    })?;
    let limit = limit.unwrap_or(ctx.config.credit_limit);
    Ok(json!({
        "merchant": asked.merchant, "currency": currency, "due": due, "earned": -earned, "open": found.open,
        "owed": found.owed, "deposit": found.deposit, "promised": found.promised, "limit": limit,
    }))
}

fn set_limit(ctx: &Context, merchant: protocol::PeerId, limit: u64) -> Result<(), SaleError> {
    ctx.db.write_blocking(move |txn| {
        let unknown = || Refusal::new(RefusalCode::NotEnrolled, format!("{merchant} is no enrolled merchant"));
        let mut record = MERCHANTS.get(txn, &merchant)?.ok_or_else(unknown)?;
        record.credit_limit = Some(limit);
        audit::note(txn, now_ms(), "merchant", merchant, format!("credit limit {limit} minor units"))?;
        Ok(MERCHANTS.put(txn, &merchant, &record)?)
    })
}

fn record_payment(ctx: &Context, payment: Payment) -> Result<Value, SaleError> {
    let malformed = |detail: String| Refusal::new(RefusalCode::Malformed, detail);
    let currency: Currency = payment.currency.parse().map_err(|e| malformed(format!("currency: {e}")))?;
    if payment.minor == 0 || payment.minor > Amount::MAX_MINOR {
        return Err(malformed(format!("minor is from 1 to {}", Amount::MAX_MINOR)).into());
    }
    if payment.reference.is_empty() || payment.reference.len() > 128 || payment.party.len() > 256 {
        return Err(malformed("reference has 1 to 128 bytes, party at most 256".to_owned()).into());
    }
    let peer = || payment.party.parse::<protocol::PeerId>().map_err(|e| malformed(format!("party: {e}")));
    let (account, pays_in) = match payment.account {
        Party::MerchantDue => (Account::MerchantDue(peer()?), true),
        Party::MerchantEarned => (Account::MerchantEarned(peer()?), false),
        Party::Seeder => (Account::Seeder(peer()?), false),
        Party::RightsHolder => (Account::RightsHolder(payment.party.clone()), false),
    };
    let was_restored = ctx.restored_at.is_some();
    if payment.again && !was_restored {
        let detail = "this manager never came back from a backup: no payment was lost that could be booked again";
        return Err(malformed(detail.to_owned()).into());
    }
    let amount = Amount { minor: payment.minor, currency };
    ctx.db.write_step_blocking(Step::ManagerPayment, move |txn| {
        if let Account::MerchantDue(peer) | Account::MerchantEarned(peer) = &account
            && !MERCHANTS.contains(txn, peer)?
        {
            let detail = format!("{peer} is no merchant of this network; `willcall manager merchants` lists them");
            return Err(Refusal::new(RefusalCode::NotEnrolled, detail).into());
        }
        let memo = format!("{amount} {}", if pays_in { "paid in" } else { "paid out" });
        let mut posting = Posting::new(format!("payment:{}", payment.reference), now_ms(), None, memo);
        let (from, to) = if pays_in { (&account, &Account::Bank) } else { (&Account::Bank, &account) };
        posting.debit(to.clone(), amount.minor, currency)?;
        posting.credit(from.clone(), amount.minor, currency)?;
        let owed = -i128::from(ledger::balance(txn, &account, currency)?);
        let beyond = !pays_in && i128::from(amount.minor) > owed;
        if beyond && !payment.again {
            let owed = Amount { minor: u64::try_from(owed).unwrap_or(0), currency };
            let hint = if was_restored { "; one from before a restore is booked with --again" } else { "" };
            let detail = format!("only {owed} are owed to {account}{hint}");
            return Err(Refusal::new(RefusalCode::LimitReached, detail).into());
        }
        if !ledger::post(txn, &posting)? {
            let detail = format!("a payment with reference {} is in the books already", payment.reference);
            return Err(Refusal::new(RefusalCode::IdempotencyConflict, detail).into());
        }
        if let Account::MerchantDue(merchant) = &account {
            exposure::paid_in(txn, merchant, amount)?;
        }
        // What a restore forgets, the log that was exported before it still tells.
        let why = if beyond { "; again, more than was owed after the restore" } else { "" };
        let detail = format!("{}, reference {}{why}", posting.memo, payment.reference);
        audit::note(txn, now_ms(), "payment", &account, detail)?;
        if let Account::Seeder(seeder) = &account {
            let line =
                PaymentLine { at: now_ms(), minor: amount.minor, currency, reference: payment.reference.clone() };
            statements::paid(txn, seeder, line)?;
        }
        let balance = ledger::balance(txn, &account, currency)?;
        Ok(json!({"account": account.to_string(), "balance": balance, "currency": currency}))
    })
}
