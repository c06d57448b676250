//! A request from outside, checked part by part before anything is done about it, each fault under its own name.

use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use futures::StreamExt;
use protocol::{Digest, PeerId, ProductId};
use serde::Deserialize;
use utoipa::ToSchema;

use super::MAX_BODY;
use super::error::ApiError;

/// A body comes within this time or not at all.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Of a body that is too large, so much is read and thrown away, so that its sender gets to read the answer.
const DRAINED: usize = 1024 * 1024;
/// Longest payment token, bytes.
const MAX_TOKEN: usize = 4 * 1024;
/// Longest idempotency key, bytes.
const MAX_KEY: usize = 64;

/// Body of a purchase request.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PurchaseRequest {
    /// The product's id, a UUID.
    #[schema(example = "0190a8f2-7c1e-7d3a-9b5f-2f1d6c0e4a77")]
    pub(crate) product: String,
    /// Peer ID of the client that receives the goods; the buyer may be somebody else.
    #[schema(example = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq")]
    pub(crate) client: String,
    /// How it is paid.
    pub(crate) payment: PaymentRequest,
}

/// How a purchase is paid.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct PaymentRequest {
    /// Name of the payment provider.
    #[schema(example = "prepaid")]
    pub(crate) provider: String,
    /// What the provider takes as payment, e.g. a voucher code.
    pub(crate) token: String,
}

/// A purchase request in which every part is what it should be.
pub(crate) struct Purchase {
    pub(crate) key: String,
    pub(crate) product: ProductId,
    pub(crate) client: PeerId,
    pub(crate) provider: String,
    pub(crate) token: String,
}

impl Purchase {
    /// Digest of what is asked: the same for two requests that mean the same.
    pub(crate) fn digest(&self) -> Digest {
        Digest::of(
            "willcall 2026-11 purchase request",
            &[self.product.as_bytes(), self.client.as_bytes(), self.provider.as_bytes(), self.token.as_bytes()],
        )
    }

    pub(crate) async fn read(headers: &HeaderMap, body: Body) -> Result<Self, ApiError> {
        let key = idempotency_key(headers)?;
        json_only(headers)?;
        let bytes = limited(headers, body).await?;
        let request: PurchaseRequest = serde_json::from_slice(&bytes)
            .map_err(|error| ApiError::bad("malformed", format!("the body is not the JSON of a purchase: {error}")))?;
        let product = request
            .product
            .parse()
            .map_err(|e: protocol::ids::IdError| ApiError::bad("invalid-product", e.to_string()))?;
        let client: PeerId = request
            .client
            .parse()
            .map_err(|e: protocol::ids::IdError| ApiError::bad("invalid-client", e.to_string()))?;
        if !protocol::keys::is_usable(&client) {
            let message = "the client's peer ID is well formed but names no usable Ed25519 key (not a point of the \
                           prime-order group in canonical form): nothing could be sealed to it";
            return Err(ApiError::bad("invalid-client", message));
        }
        if request.payment.token.len() > MAX_TOKEN {
            return Err(ApiError::bad("malformed", format!("a payment token has at most {MAX_TOKEN} bytes")));
        }
        Ok(Purchase { key, product, client, provider: request.payment.provider, token: request.payment.token })
    }
}

fn idempotency_key(headers: &HeaderMap) -> Result<String, ApiError> {
    let mut values = headers.get_all("idempotency-key").iter();
    let missing = "the header Idempotency-Key is required: a new one for each purchase, the same when trying again";
    let value = values.next().ok_or_else(|| ApiError::bad("missing-idempotency-key", missing))?;
    let text = value.to_str().ok().filter(|t| (1..=MAX_KEY).contains(&t.len()));
    let text = text.filter(|t| values.next().is_none() && t.bytes().all(|b| (0x20..0x7f).contains(&b)));
    let bad = "Idempotency-Key must be one value of 1 to 64 printable ASCII characters";
    text.map(str::to_owned).ok_or_else(|| ApiError::bad("bad-idempotency-key", bad))
}

fn json_only(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let essence = kind.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = "send the purchase as JSON with Content-Type: application/json";
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type", message))
}

async fn limited(headers: &HeaderMap, body: Body) -> Result<Vec<u8>, ApiError> {
    let message = format!("a purchase has at most {MAX_BODY} bytes");
    let too_large = ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too-large", message);
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > DRAINED) {
        return Err(too_large);
    }
    let reading = async {
        let mut stream = body.into_data_stream();
        let mut bytes = Vec::new();
        let mut total = 0usize;
        while let Some(part) = stream.next().await {
            let part = part.map_err(|error| ApiError::bad("malformed", format!("the body was cut off: {error}")))?;
            total = total.saturating_add(part.len());
            if total > DRAINED {
                break;
            }
            if total <= MAX_BODY {
                bytes.extend_from_slice(&part);
            }
        }
        if total > MAX_BODY { Err(too_large) } else { Ok(bytes) }
    };
    let late = || ApiError::new(StatusCode::REQUEST_TIMEOUT, "idle", "the body did not come within 10 seconds");
    tokio::time::timeout(BODY_TIMEOUT, reading).await.unwrap_or_else(|_| Err(late()))
}
