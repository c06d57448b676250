//! Buying: the one request that moves money. Whatever happens to the connection, a repeated request under the same
//! idempotency key buys nothing twice and gets the first answer to the byte.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use protocol::Nonce;
use protocol::api::ProductInfo;
use serde::Serialize;
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody, ErrorDetail};
use super::open::{Purchase, PurchaseRequest};
use super::read::{AmountBody, can_sell};
use crate::clock::now_ms;
use crate::orders::{Order, OrderError, OrderId, Stage};
use crate::payments::PaymentError;
use crate::shop::Shop;
use crate::tables::{Answer, KEYS, KeyRecord};

/// A purchase.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct PurchaseBody {
    /// The order: whoever knows it can read the ticket.
    id: String,
    /// The transaction, once the manager formed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    transaction: Option<String>,
    /// `pending`, `released`, `declined`, `cancelled`, `expired` or `refunded`.
    state: &'static str,
    /// Peer ID of the client that receives the goods.
    client: String,
    /// The product.
    product: String,
    /// What it cost.
    amount: AmountBody,
    /// `none`, `held`, `captured` or `returned`.
    payment: &'static str,
    /// The ticket, one line of text for the client.
    #[serde(skip_serializing_if = "Option::is_none")]
    ticket: Option<String>,
    /// Why it is pending.
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting: Option<String>,
    /// Why it came to nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorDetail>,
}

impl PurchaseBody {
    fn of(order: &Order, ticket: Option<String>, waiting: Option<String>) -> Self {
        let state = match order.stage {
            Stage::Received | Stage::Authorised | Stage::Reserved => "pending",
            Stage::Released | Stage::AwaitingCompletion | Stage::Completed | Stage::Done => "released",
            Stage::Refunding if order.before_refund.is_some() => "refunded",
            Stage::Refunding | Stage::Voiding => order.ends_as.map_or("cancelled", Stage::as_str),
            stage => stage.as_str(),
        };
        let payment = match order.stage {
            Stage::Received | Stage::Declined => "none",
            Stage::Done => "captured",
            Stage::Cancelled | Stage::Expired | Stage::Refunded => "returned",
            _ => "held",
        };
        PurchaseBody {
            id: order.id.to_string(),
            transaction: order.transaction().map(|id| id.to_string()),
            state,
            client: order.client.to_string(),
            product: order.product.to_string(),
            amount: order.amount.into(),
            payment,
            ticket: ticket.filter(|_| state == "released"),
            waiting: waiting.filter(|_| state == "pending"),
            error: order.failure.as_ref().map(|f| ErrorDetail { code: f.code.clone(), message: f.message.clone() }),
        }
    }
}

/// Buys a product for a client (steps 1 to 3); the answer carries its ticket (step 8).
///
/// Send `Idempotency-Key`, 1 to 64 printable ASCII characters: the same key with the same request gives the first
/// answer again, to the byte; with another request it is refused.
#[utoipa::path(
    post,
    path = "/v1/purchases",
    params(("Idempotency-Key" = String, Header, description = "New for each purchase, the same when trying again")),
    request_body = PurchaseRequest,
    responses(
        (status = 201, description = "Sold: the answer holds the ticket", body = PurchaseBody),
        (status = 202, description = "Taken: the manager is away, the order goes on by itself", body = PurchaseBody),
        (status = 400, description = "Malformed, or the client's peer ID is not usable", body = ErrorBody),
        (status = 402, description = "The payment was declined", body = ErrorBody),
        (status = 404, description = "No such product", body = ErrorBody),
        (status = 409, description = "The price has changed", body = ErrorBody),
        (status = 413, description = "Body over 64 KiB", body = ErrorBody),
        (status = 415, description = "Not JSON", body = ErrorBody),
        (status = 422, description = "The idempotency key was used with another request", body = ErrorBody),
        (status = 429, description = "Too many purchases at once", body = ErrorBody),
        (status = 502, description = "The manager refused, or its answer does not hold: the order is closed", body = ErrorBody),
        (status = 503, description = "Nothing can be sold now, and there is no order: try again with the same key", body = ErrorBody),
    )
)]
pub(super) async fn buy(State(shop): State<Arc<Shop>>, request: Request) -> Response {
    let stopping = shop.supervisor.token();
    let outcome = tokio::select! {
        outcome = Box::pin(purchase(&shop, request)) => outcome,
        () = stopping.cancelled() => Err(stops()),
    };
    match outcome {
        Ok((order, answer)) => {
            shop.counts.purchases.inc([match answer.status {
                201 => "released",
                202 => "pending",
                402 => "declined",
                _ => "refused",
            }]);
            respond(order, answer)
        }
        Err(error) => {
            tracing::info!(code = error.code(), "purchase request refused");
            shop.counts.purchases.inc(["refused"]);
            error.into_response()
        }
    }
}

fn respond(order: OrderId, answer: Answer) -> Response {
    let status = StatusCode::from_u16(answer.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, answer.body).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let (true, Ok(place)) = (status.is_success(), HeaderValue::from_str(&format!("/v1/purchases/{order}"))) {
        headers.insert(header::LOCATION, place);
    }
    response
}

async fn purchase(shop: &Arc<Shop>, request: Request) -> Result<(OrderId, Answer), ApiError> {
    let (head, body) = request.into_parts();
    let purchase = Purchase::read(&head.headers, body).await?;
    let digest = purchase.digest();

    let known = shop.key(&purchase.key)?;
    if let Some(record) = &known {
        if record.request != digest {
            return Err(conflict());
        }
        if let Some(answer) = &record.answer {
            return Ok((record.order, answer.clone()));
        }
    }
    // What is asked of the manager is asked before a place is taken: anybody can ask for what is not on sale.
    let asked = match known {
        Some(record) => Asked::Before(record.order),
        None => Asked::New(Box::new(on_sale(shop, &purchase).await?)),
    };
    let _place = Arc::clone(&shop.places).try_acquire_owned().map_err(|_| {
        let message = "too many purchases are under way; try again in a moment, with the same Idempotency-Key";
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message).retry_after(1)
    })?;
    let id = match asked {
        Asked::Before(order) => order,
        Asked::New(product) => place(shop, &purchase, *product).await?,
    };

    let mut driven = shop.drive(id);
    let limit = Duration::from_millis(shop.config.answer_ms);
    // However that ended, the stored order says what to answer.
    let _ = tokio::time::timeout(limit, driven.wait_for(|done| *done)).await;
    // An order that was put down because the shop stops is pending only until the next start: that must not become
    // the answer which this key gets for ever.
    if shop.supervisor.token().is_cancelled() {
        return Err(stops());
    }
    let answer = first_answer(shop, &purchase.key, id).await?;
    Ok((id, answer))
}

fn stops() -> ApiError {
    let message = "this shop is stopping; try again in a moment, with the same Idempotency-Key";
    ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "shutting-down", message).retry_after(5)
}

/// What a request for a purchase comes to before it has a place.
enum Asked {
    /// Its key stands for this order.
    Before(OrderId),
    /// It buys this.
    New(Box<ProductInfo>),
}

/// The product, if it can be sold now.
async fn on_sale(shop: &Shop, purchase: &Purchase) -> Result<ProductInfo, ApiError> {
    can_sell(shop).await?;
    shop.link.product(purchase.product).await.ok_or_else(|| {
        let message = format!("there is no product {} on offer; GET /v1/products lists them", purchase.product);
        ApiError::new(StatusCode::NOT_FOUND, "unknown-product", message)
    })
}

/// Checks what can be checked beforehand, and stores the order.
async fn place(shop: &Arc<Shop>, purchase: &Purchase, product: ProductInfo) -> Result<OrderId, ApiError> {
    let Some(provider) = shop.providers.get(purchase.provider.as_str()) else {
        let names: Vec<_> = shop.providers.keys().copied().collect();
        let message = format!("there is no such payment provider here; there is: {}", names.join(", "));
        return Err(ApiError::bad("unknown-payment-provider", message));
    };
    let reference = provider.reference(&purchase.token).map_err(payment_error)?;
    // A request that got in before this one may hold the money for the same purchase: then it is not short.
    if let Err(error) = provider.check(&reference, product.price).await {
        return match shop.key(&purchase.key)? {
            Some(record) if record.request == purchase.digest() => Ok(record.order),
            _ => Err(payment_error(error)),
        };
    }

    let now = now_ms();
    let order = Order {
        id: Nonce::from_bytes(rand::random()),
        key: purchase.key.clone(),
        created_at: now,
        updated_at: now,
        product: product.id,
        client: purchase.client,
        amount: product.price,
        provider: purchase.provider.clone(),
        reference,
        authorisation: Nonce::from_bytes(rand::random()),
        authorised_at: 0,
        price_salt: Nonce::from_bytes(rand::random()),
        payment_salt: Nonce::from_bytes(rand::random()),
        stage: Stage::Received,
        ends_as: None,
        before_refund: None,
        policy: None,
        data: None,
        expires_at: 0,
        endorsement: None,
        failure: None,
    };
    let id = order.id;
    let (client, amount) = (order.client, order.amount);
    let record = KeyRecord { request: purchase.digest(), order: id, answer: None };
    let placed = shop.place(order, record).await.map_err(order_error)?;
    if placed == id {
        tracing::info!(step = 1, order = %id, product = %product.id, "purchase request");
        tracing::info!(step = 2, order = %id, %client, "the buyer designates the client");
        tracing::info!(step = 3, order = %id, provider = purchase.provider, %amount, "payment data");
    }
    Ok(placed)
}

/// The answer under the key: what is stored, or else what the order says now, which is then stored.
async fn first_answer(shop: &Arc<Shop>, key: &str, id: OrderId) -> Result<Answer, ApiError> {
    let order = shop.order(&id)?.ok_or_else(|| ApiError::new(StatusCode::NOT_FOUND, "unknown-purchase", "gone"))?;
    let answer = answer_of(shop, &order)?;
    let key = key.to_owned();
    let stored = shop
        .db
        .write_step(store::Step::MerchantAnswer, move |txn| {
            let Some(mut record) = KEYS.get(txn, &key)? else { return Ok(answer.clone()) };
            if let Some(first) = record.answer {
                return Ok(first);
            }
            record.answer = Some(answer.clone());
            KEYS.put(txn, &key, &record)?;
            Ok::<_, store::StoreError>(answer.clone())
        })
        .await?;
    Ok(stored)
}

fn answer_of(shop: &Shop, order: &Order) -> Result<Answer, ApiError> {
    let ticket = shop.ticket(&order.id)?.map(|ticket| ticket.to_string());
    let body = PurchaseBody::of(order, ticket, shop.desk.why(&order.id));
    match (body.state, &order.failure) {
        ("released", _) => json(201, &body),
        ("pending", _) => json(202, &body),
        (_, Some(failure)) => {
            let error = ErrorDetail { code: failure.code.clone(), message: failure.message.clone() };
            json(failure.status, &ErrorBody { error })
        }
        (state, None) => {
            let error = ErrorDetail { code: state.to_owned(), message: format!("this purchase is {state}") };
            json(410, &ErrorBody { error })
        }
    }
}

fn json<T: Serialize>(status: u16, body: &T) -> Result<Answer, ApiError> {
    let body = serde_json::to_vec(body).map_err(|error| {
        tracing::error!(%error, "answer not written");
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "no answer could be written")
    })?;
    Ok(Answer { status, body })
}

/// A purchase, by its id: pending ones go on by themselves and show their ticket here.
#[utoipa::path(
    get,
    path = "/v1/purchases/{id}",
    params(("id" = String, Path, description = "`id` of the answer to the purchase")),
    responses(
        (status = 200, description = "The purchase as it is now", body = PurchaseBody),
        (status = 404, description = "No such purchase", body = ErrorBody),
    )
)]
pub(super) fn show(
    State(shop): State<Arc<Shop>>,
    Path(id): Path<String>,
) -> std::future::Ready<Result<Response, ApiError>> {
    std::future::ready(shown(&shop, &id))
}

fn shown(shop: &Shop, id: &str) -> Result<Response, ApiError> {
    // One answer for text that is no id and for ids that are not there: ids are the secret.
    let unknown = || ApiError::new(StatusCode::NOT_FOUND, "unknown-purchase", "there is no such purchase");
    let id: OrderId = id.parse().map_err(|_| unknown())?;
    let order = shop.order(&id)?.ok_or_else(unknown)?;
    let ticket = shop.ticket(&id)?.map(|ticket| ticket.to_string());
    let body = PurchaseBody::of(&order, ticket, shop.desk.why(&id));
    Ok(([(header::CACHE_CONTROL, "no-store")], Json(body)).into_response())
}

fn conflict() -> ApiError {
    let message = "this Idempotency-Key was used before with another request; use a new one for a new purchase";
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "idempotency-conflict", message)
}

fn order_error(error: OrderError) -> ApiError {
    match error {
        OrderError::KeyConflict => conflict(),
        OrderError::Store(error) => error.into(),
        full @ (OrderError::TooManyOpen(_) | OrderError::Full(_)) => {
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "limit-reached", full.to_string()).retry_after(60)
        }
    }
}

fn payment_error(error: PaymentError) -> ApiError {
    match error {
        PaymentError::Unavailable(_) => {
            tracing::warn!(%error, "payment not checked");
            let message = "the payment cannot be checked right now; try again in a moment";
            ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "payment-unavailable", message).retry_after(5)
        }
        other => ApiError::new(StatusCode::PAYMENT_REQUIRED, "payment-declined", other.to_string()),
    }
}
