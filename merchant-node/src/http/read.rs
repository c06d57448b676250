//! What can be looked at without buying: the catalogue, and whether the shop is open.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use protocol::Amount;
use protocol::api::ProductInfo;
use serde::Serialize;
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use crate::shop::Shop;

/// Products in one answer: about 400 bytes each.
const PAGE: usize = 1_000;

/// An amount of money.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct AmountBody {
    /// Minor units (cents).
    pub(crate) minor: u64,
    /// ISO 4217 code.
    #[schema(example = "USD")]
    pub(crate) currency: String,
}

impl From<Amount> for AmountBody {
    fn from(amount: Amount) -> Self {
        AmountBody { minor: amount.minor, currency: amount.currency.to_string() }
    }
}

/// A product on offer.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ProductBody {
    /// UUID.
    id: String,
    /// For people.
    title: String,
    /// What it costs.
    price: AmountBody,
    /// `at-release` or `on-completion`: when key and money move.
    policy: String,
    /// Bytes of all files.
    plain_bytes: u64,
    /// Bytes that are fetched.
    content_bytes: u64,
    /// Number of files.
    files: u32,
    /// Digest of the signed manifest, hexadecimal.
    manifest: String,
}

impl From<ProductInfo> for ProductBody {
    fn from(product: ProductInfo) -> Self {
        ProductBody {
            id: product.id.to_string(),
            title: product.title,
            price: product.price.into(),
            policy: product.policy.as_str().to_owned(),
            plain_bytes: product.plain_bytes,
            content_bytes: product.content_bytes,
            files: product.files,
            manifest: product.manifest.to_string(),
        }
    }
}

/// A page of the catalogue.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ProductsBody {
    products: Vec<ProductBody>,
    /// Give this as `after` for the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
    /// When the catalogue was fetched from the manager, unix milliseconds; 0 when not since the start.
    fetched_at: u64,
}

/// How the shop is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct HealthBody {
    /// Whether it can sell.
    ok: bool,
    /// What is wrong, or worth knowing.
    reasons: Vec<String>,
}

/// The products on offer, a thousand at a time.
#[utoipa::path(
    get,
    path = "/v1/products",
    params(("after" = Option<String>, Query, description = "`next` of the page before")),
    responses(
        (status = 200, description = "Products in the order of their ids", body = ProductsBody),
        (status = 400, description = "`after` is no product id", body = ErrorBody),
        (status = 503, description = "Not enrolled yet", body = ErrorBody),
    )
)]
pub(super) async fn products(
    State(shop): State<Arc<Shop>>,
    RawQuery(query): RawQuery,
) -> Result<Json<ProductsBody>, ApiError> {
    shop.link.freshen().await;
    page(&shop, query.as_deref())
}

fn page(shop: &Shop, query: Option<&str>) -> Result<Json<ProductsBody>, ApiError> {
    ready(shop)?;
    let after = match query.filter(|q| !q.is_empty()) {
        None => None,
        Some(query) => {
            let id = query.strip_prefix("after=").and_then(|id| id.parse().ok());
            Some(id.ok_or_else(|| ApiError::bad("malformed", "the query can only be after=PRODUCT-ID"))?)
        }
    };
    let products = shop.link.page(after, PAGE);
    let next = (products.len() == PAGE).then(|| products.last().map(|p| p.id.to_string())).flatten();
    let fetched_at = shop.link.catalogue().fetched_at;
    Ok(Json(ProductsBody { products: products.into_iter().map(Into::into).collect(), next, fetched_at }))
}

/// Nothing is shown before the shop is enrolled.
fn ready(shop: &Shop) -> Result<(), ApiError> {
    match shop.link.not_ready() {
        None => Ok(()),
        Some(why) => Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "not-enrolled", why).retry_after(5)),
    }
}

/// No money is held for what the manager would refuse: not before the shop is enrolled, and not after its certificate
/// was revoked, also while the manager is away. A revocation that was taken back is heard of at once.
pub(super) async fn can_sell(shop: &Shop) -> Result<(), ApiError> {
    ready(shop)?;
    if shop.link.revoked().is_some() {
        shop.link.freshen().await;
    }
    match shop.link.revoked() {
        None => Ok(()),
        Some(why) => {
            let message = format!("the manager sells nothing through this shop any more ({why}); nothing was paid");
            Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "revoked", message))
        }
    }
}

/// Whether the shop can sell.
#[utoipa::path(
    get,
    path = "/health",
    responses(
        (status = 200, description = "It can sell", body = HealthBody),
        (status = 503, description = "It cannot; the reasons say why", body = HealthBody),
    )
)]
pub(super) fn health(State(shop): State<Arc<Shop>>) -> std::future::Ready<Response> {
    let health = shop.health();
    let status = if health.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    std::future::ready((status, Json(HealthBody { ok: health.ok, reasons: health.reasons })).into_response())
}
