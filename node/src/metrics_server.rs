//! Operators watch a node through `/metrics` and `/health` on a loopback port. It is loopback only because what a
//! seeder counts says what it earns, and there is no login here: a reverse proxy can add one.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::metrics::Metrics;
use crate::supervisor::Supervisor;

/// Connections at once; further ones wait in the listener's backlog. A scraper and a few curious people need no more.
const MAX_CONNECTIONS: usize = 16;
/// After the stop signal, connections have this long to finish their request.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// How a process is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Whether it does its work. `false` gives status 503.
    pub ok: bool,
    /// What is wrong, or worth knowing, one line each.
    pub reasons: Vec<String>,
}

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
pub enum MetricsServerError {
    /// The address can be reached from other machines.
    #[error("metrics address {address} is not a loopback address; use 127.0.0.1 and a reverse proxy with a login")]
    NotLoopback {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be listened on.
    #[error("cannot serve metrics on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// Serves `/metrics` and `/health`.
#[derive(Debug)]
pub struct MetricsServer {
    address: SocketAddr,
}

type HealthFn = Arc<dyn Fn() -> Health + Send + Sync>;

impl MetricsServer {
    /// Listens on a loopback address (port 0 lets the system choose) and serves under `supervisor` until it stops.
    /// `health` is asked at each request and must not block.
    ///
    /// # Errors
    /// [`MetricsServerError`].
    pub async fn start(
        supervisor: &Supervisor,
        address: SocketAddr,
        metrics: Metrics,
        health: impl Fn() -> Health + Send + Sync + 'static,
    ) -> Result<Self, MetricsServerError> {
        if !address.ip().is_loopback() {
            return Err(MetricsServerError::NotLoopback { address });
        }
        let failed = |source| MetricsServerError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let health: HealthFn = Arc::new(health);
        let app = Router::new()
            .route("/metrics", get(show_metrics).with_state(metrics))
            .route("/health", get(show_health).with_state(health));
        let token = supervisor.token();
        supervisor.spawn_critical("metrics server", async move {
            let listener = Bounded { listener, places: Arc::new(Semaphore::new(MAX_CONNECTIONS)) };
            let stop = token.clone().cancelled_owned();
            let serve = axum::serve(listener, app).with_graceful_shutdown(stop).into_future();
            tokio::select! {
                result = serve => result,
                () = async { token.cancelled().await; tokio::time::sleep(STOP_GRACE).await } => Ok(()),
            }
        });
        Ok(Self { address: bound })
    }

    /// The address served, with the port that the system chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn show_metrics(State(metrics): State<Metrics>) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], metrics.encode())
}

async fn show_health(State(health): State<HealthFn>) -> impl IntoResponse {
    let health = health();
    let status = if health.ok { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(health))
}

/// A listener that accepts only while there are places.
struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Placed;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Placed, SocketAddr) {
        // The semaphore is never closed.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, address) = axum::serve::Listener::accept(&mut self.listener).await;
        (Placed { stream, _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that gives its place back when it closes.
struct Placed {
    stream: TcpStream,
    _place: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for Placed {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Placed {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
