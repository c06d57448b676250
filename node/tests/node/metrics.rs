//! The metrics page and the health page, as an operator's tools see them.

use node::{Health, Metrics, MetricsServer, MetricsServerError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(stream.read_to_string(&mut answer)).await.unwrap();
    answer
}

#[tokio::test]
async fn metrics_and_health_are_served_on_loopback_only() {
    let supervisor = Supervisor::new();
    let metrics = Metrics::new();
    metrics.counter("sales", "Sales").inc_by(3);
    let outside = MetricsServer::start(&supervisor, "0.0.0.0:0".parse().unwrap(), metrics.clone(), Health::default);
    assert!(matches!(outside.await.unwrap_err(), MetricsServerError::NotLoopback { .. }));
    let (set, health) = tokio::sync::watch::channel(Health { ok: true, reasons: vec![] });
    let loopback = "127.0.0.1:0".parse().unwrap();
    let server =
        MetricsServer::start(&supervisor, loopback, metrics.clone(), move || health.borrow().clone()).await.unwrap();
    let page = get(server.address(), "/metrics").await;
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("willcall_sales_total 3"), "{page}");
    assert!(get(server.address(), "/health").await.starts_with("HTTP/1.1 200"));
    set.send_replace(Health { ok: false, reasons: vec!["disk full".to_owned()] });
    let page = get(server.address(), "/health").await;
    assert!(page.starts_with("HTTP/1.1 503") && page.contains("disk full"), "{page}");
    let taken = MetricsServer::start(&supervisor, server.address(), metrics, Health::default).await.unwrap_err();
    assert!(matches!(taken, MetricsServerError::Listen { .. }), "{taken}");
    // A client that never finishes its request does not hold up the stop.
    let mut half = tokio::net::TcpStream::connect(server.address()).await.unwrap();
    half.write_all(b"GET /met").await.unwrap();
    supervisor.shutdown(Duration::from_secs(20)).await.unwrap();
}
