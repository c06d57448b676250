//! The storefront's HTTP API, where a sale begins: steps 1 to 3 arrive in one request, step 8 leaves in its answer.

mod error;
mod listener;
mod open;
mod purchases;
mod read;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::shop::Shop;
use error::ApiError;

pub(crate) use listener::{Bounded, STOP_GRACE};

/// Largest body of a purchase request, bytes.
const MAX_BODY: usize = 64 * 1024;

#[derive(OpenApi)]
#[openapi(info(
    title = "Willcall merchant",
    description = "Sells digital products: a purchase names the peer that receives the goods and how it is paid, and \
                   its answer carries the ticket. Every error is `{\"error\":{\"code\",\"message\"}}`."
))]
struct Document;

/// The whole API.
pub(crate) fn router(shop: Arc<Shop>) -> Router {
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(read::products))
        .routes(routes!(purchases::buy))
        .routes(routes!(purchases::show))
        .routes(routes!(read::health))
        .split_for_parts();
    // Written once: the document does not change while the process runs.
    let document: Arc<str> = document.to_json().unwrap_or_default().into();
    router
        .route("/openapi.json", get(move || open_api(Arc::clone(&document))))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .with_state(shop)
}

fn open_api(document: Arc<str>) -> std::future::Ready<Response> {
    let json = [(header::CONTENT_TYPE, "application/json")];
    std::future::ready((json, document.to_string()).into_response())
}

fn not_found(State(_): State<Arc<Shop>>) -> std::future::Ready<ApiError> {
    let message = "there is nothing here; GET /openapi.json lists what there is";
    std::future::ready(ApiError::new(StatusCode::NOT_FOUND, "not-found", message))
}

fn not_allowed(State(_): State<Arc<Shop>>) -> std::future::Ready<ApiError> {
    let message = "this method cannot be used here; GET /openapi.json lists what can";
    std::future::ready(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", message))
}
