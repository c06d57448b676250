//! What the operator may ask of the running merchant over its control socket: vouchers, orders, refunds, status.

use std::path::PathBuf;
use std::sync::Arc;

use node::ControlError;
use protocol::{Amount, Currency, Digest, PeerId};
use serde::Deserialize;
use serde_json::{Value, json};
use store::StoreError;

use crate::clock::now_ms;
use crate::orders::{Order, OrderId, RefundError};
use crate::payments::{IssueError, VoucherInfo};
use crate::recovery::RecoverError;
use crate::running::Addresses;
use crate::shop::Shop;
use crate::{backup, evidence};

/// Lines in one answer, unless fewer are asked for; an answer is one line of at most 1 MiB.
const MAX_LINES: usize = 1_000;

#[derive(Debug, Deserialize)]
#[serde(tag = "cmd", rename_all = "kebab-case", deny_unknown_fields)]
enum Command {
    Status,
    VouchersIssue {
        /// In the currency's major unit, e.g. `"9.99"`.
        amount: String,
        currency: Currency,
        #[serde(default = "one")]
        count: u32,
    },
    VouchersList {
        #[serde(default)]
        after: Option<Digest>,
        #[serde(default)]
        limit: Option<usize>,
    },
    Orders {
        #[serde(default)]
        limit: Option<usize>,
    },
    Order {
        #[serde(deserialize_with = "order_id")]
        order: OrderId,
    },
    Refund {
        #[serde(deserialize_with = "order_id")]
        order: OrderId,
    },
    /// Gives what was bought to another peer, for a buyer whose key is lost.
    Recover {
        #[serde(deserialize_with = "order_id")]
        order: OrderId,
        to: PeerId,
    },
    /// Everything that is signed of an order, in one file.
    Evidence {
        #[serde(deserialize_with = "order_id")]
        order: OrderId,
        /// Absolute.
        path: PathBuf,
    },
    /// Database, key and configuration, in one file.
    Backup {
        /// Absolute.
        path: PathBuf,
        /// A file that is there may be replaced.
        #[serde(default)]
        replace: bool,
    },
}

fn one() -> u32 {
    1
}

/// Says what an order id is, which is to the parser only a number of 16 bytes.
fn order_id<'de, D: serde::Deserializer<'de>>(from: D) -> Result<OrderId, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(|_| {
        let shown = text.escape_debug().take(80).collect::<String>();
        serde::de::Error::custom(format!("'{shown}' is no order id; `willcall merchant orders` lists them"))
    })
}

fn failed(error: &StoreError) -> ControlError {
    ControlError::new("internal", error.to_string())
}

/// Answers one command.
pub(crate) async fn answer(shop: Arc<Shop>, addresses: Addresses, request: Value) -> Result<Value, ControlError> {
    let command = serde_json::from_value(request).map_err(|error| {
        ControlError::new("malformed", format!("a merchant does not understand this request: {error}"))
    })?;
    match command {
        Command::Status => status(&shop, &addresses),
        Command::VouchersIssue { amount, currency, count } => issue(&shop, &amount, currency, count).await,
        Command::VouchersList { after, limit } => {
            let limit = limit.unwrap_or(MAX_LINES).min(MAX_LINES);
            let vouchers = shop.prepaid.list(after, limit).map_err(|e| failed(&e))?;
            let next = vouchers.last().filter(|_| vouchers.len() == limit).map(|voucher| voucher.id);
            Ok(json!({ "vouchers": vouchers.iter().map(voucher).collect::<Vec<_>>(), "next": next }))
        }
        Command::Orders { limit } => {
            let orders = shop.newest(limit.unwrap_or(100).min(MAX_LINES)).map_err(|e| failed(&e))?;
            Ok(json!({ "orders": orders.iter().map(|order| line(&shop, order)).collect::<Vec<_>>() }))
        }
        Command::Order { order } => {
            let found = shop.order(&order).map_err(|e| failed(&e))?;
            let found = found.ok_or_else(|| refund_error(&RefundError::Unknown(order)))?;
            let ticket = shop.ticket(&order).map_err(|e| failed(&e))?;
            let mut shown = line(&shop, &found);
            if let Value::Object(fields) = &mut shown {
                fields.insert("key".into(), json!(found.key));
                fields
                    .insert("reservation_expires_at".into(), json!((found.expires_at > 0).then_some(found.expires_at)));
                fields.insert("policy".into(), json!(found.policy.map(protocol::manifest::KeyPolicy::as_str)));
                fields.insert("ticket".into(), json!(ticket.map(|ticket| ticket.to_string())));
            }
            Ok(shown)
        }
        Command::Backup { path, replace } => backup::write(&shop, path, replace).await,
        Command::Evidence { order, path } => {
            let found = shop.order(&order).map_err(|e| failed(&e))?;
            let found = found.ok_or_else(|| refund_error(&RefundError::Unknown(order)))?;
            evidence::export(&shop, &found, &path).await
        }
        Command::Recover { order, to } => {
            let moved = shop.recover(order, to).await.map_err(|error| recover_error(&error))?;
            Ok(json!({
                "order": order, "transaction": moved.transaction, "client": moved.client,
                "generation": moved.generation,
            }))
        }
        Command::Refund { order } => {
            let order = shop.refund(order).await.map_err(|error| refund_error(&error))?;
            Ok(line(&shop, &order))
        }
    }
}

fn refund_error(error: &RefundError) -> ControlError {
    let code = match error {
        RefundError::Unknown(_) => "unknown-order",
        RefundError::Stage(_) => "wrong-state",
        RefundError::Waits(_) => "pending",
        RefundError::Refused(_) => "refused",
        RefundError::Store(_) => "internal",
    };
    ControlError::new(code, error.to_string())
}

fn recover_error(error: &RecoverError) -> ControlError {
    let code = match error {
        RecoverError::Unknown(_) => "unknown-order",
        RecoverError::Stage(_) => "wrong-state",
        RecoverError::Away(_) => "manager-away",
        RecoverError::Refused(refusal) => refusal.code.as_str(),
        RecoverError::Store(_) => "internal",
    };
    ControlError::new(code, error.to_string())
}

async fn issue(shop: &Shop, amount: &str, currency: Currency, count: u32) -> Result<Value, ControlError> {
    let bad = |message: String| ControlError::new("malformed", message);
    let amount = Amount::parse(amount, currency).map_err(|error| bad(error.to_string()))?;
    let codes = shop.prepaid.issue(amount, count, now_ms()).await.map_err(|error| match error {
        IssueError::Store(error) => failed(&error),
        IssueError::Full => ControlError::new("limit-reached", error.to_string()),
        error => bad(error.to_string()),
    })?;
    tracing::info!(count, %amount, "vouchers issued");
    Ok(json!({ "amount": amount, "codes": codes.iter().map(ToString::to_string).collect::<Vec<_>>() }))
}

fn voucher(voucher: &VoucherInfo) -> Value {
    json!({
        "id": voucher.id,
        "issued": voucher.issued,
        "available": voucher.available,
        "held": voucher.held,
        "spent": voucher.spent,
        "issued_at": voucher.issued_at,
    })
}

fn line(shop: &Shop, order: &Order) -> Value {
    json!({
        "order": order.id,
        "transaction": order.transaction(),
        "stage": order.stage,
        "product": order.product,
        "client": order.client,
        "amount": order.amount,
        "provider": order.provider,
        "created_at": order.created_at,
        "updated_at": order.updated_at,
        "waits": shop.desk.why(&order.id),
        "error": order.failure.as_ref().map(|f| json!({ "code": f.code, "message": f.message })),
    })
}

fn status(shop: &Shop, addresses: &Addresses) -> Result<Value, ControlError> {
    let (orders, open) = shop.order_counts().map_err(|e| failed(&e))?;
    let vouchers = shop.prepaid.count().map_err(|e| failed(&e))?;
    let catalogue = shop.link.catalogue();
    let certificate = shop.link.certificate();
    let revoked = shop.link.revoked();
    let reachable = *shop.link.reachable().borrow();
    let (waiting, waits) = shop.desk.waiting();
    Ok(json!({
        "role": "merchant",
        "peer": shop.me(),
        "name": shop.config.name,
        "network": shop.link.join().network(),
        "addresses": addresses.node,
        "http": addresses.http,
        "metrics": addresses.metrics,
        "enrolled": certificate.is_some() && revoked.is_none(),
        "revoked": revoked,
        "certificate_until": certificate.map(|c| c.until),
        "key_set_version": shop.link.trust().map(|trust| trust.key_set().version),
        "manager": {
            "reachable": reachable,
            "last_contact": shop.link.last_contact(),
            "trouble": shop.link.trouble(),
        },
        "products": catalogue.products.len(),
        "products_fetched_at": catalogue.fetched_at,
        "orders": { "total": orders, "open": open, "waiting": waiting, "waits": waits },
        "vouchers": vouchers,
        "health": shop.health(),
    }))
}
