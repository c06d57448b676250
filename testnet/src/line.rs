//! The link to a seeder: what one machine's loopback does not have is a speed, and an end that can be pulled out. It
//! passes bytes on as they are, so that both ends still see each other's keys and nothing else.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use node::Supervisor;
use protocol::Address;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Read at once: small, so that several connections share a slow line evenly.
const PIECE: usize = 16 * 1024;
/// Timers and threads are late by some milliseconds: what a busy line lost to that it makes up for. Without this a line of
/// 3 MB/s, whose pieces take 5 ms each, would be a quarter slower than it says.
const LATE: Duration = Duration::from_millis(50);
/// Connections over one line; further ones wait in the listener's backlog.
const CONNECTIONS: usize = 256;

/// A TCP port in front of another.
pub struct Line {
    address: SocketAddr,
    inner: Arc<Inner>,
}

struct Inner {
    target: watch::Sender<Option<SocketAddr>>,
    bytes_per_second: Option<u64>,
    /// When the line is free again for bytes to the caller.
    free_at: Mutex<Instant>,
    /// Nothing passes in either direction while connections stay open.
    frozen: watch::Sender<bool>,
    /// Ends the connections of now when the line is cut.
    connections: Mutex<CancellationToken>,
    open: watch::Sender<bool>,
}

impl Line {
    /// Listens on loopback; passes nothing on before [`Line::lead_to`].
    ///
    /// # Errors
    /// The system's.
    pub async fn start(supervisor: &Supervisor, bytes_per_second: Option<u64>) -> std::io::Result<Line> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let inner = Arc::new(Inner {
            target: watch::Sender::new(None),
            bytes_per_second,
            free_at: Mutex::new(Instant::now()),
            frozen: watch::Sender::new(false),
            connections: Mutex::default(),
            open: watch::Sender::new(true),
        });
        let (accepting, token, owner) = (Arc::clone(&inner), supervisor.token(), supervisor.clone());
        let places = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS));
        supervisor.spawn("line", async move {
            loop {
                let accept = async {
                    let place = Arc::clone(&places).acquire_owned().await.ok()?;
                    Some((place, listener.accept().await.ok()?.0))
                };
                let accepted = tokio::select! {
                    () = token.cancelled() => return,
                    accepted = accept => accepted,
                };
                let Some((place, caller)) = accepted else { continue };
                let end = accepting.connections.lock().unwrap_or_else(PoisonError::into_inner).child_token();
                let (inner, token) = (Arc::clone(&accepting), token.clone());
                owner.spawn("line connection", async move {
                    let _place = place;
                    tokio::select! {
                        () = token.cancelled() => {}
                        () = end.cancelled() => {}
                        () = inner.pass(caller) => {}
                    }
                });
            }
        });
        Ok(Line { address, inner })
    }

    /// Where to connect to.
    pub fn address(&self) -> Option<Address> {
        Address::new(&format!("/ip4/{}/tcp/{}", self.address.ip(), self.address.port())).ok()
    }

    /// Where it leads: the first TCP address of these.
    pub fn lead_to(&self, addresses: &[Address]) {
        self.inner.target.send_replace(addresses.iter().find_map(socket_of));
    }

    /// Ends all connections and lets no new ones through.
    pub fn cut(&self) {
        self.inner.open.send_replace(false);
        let mut connections = self.inner.connections.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *connections).cancel();
    }

    /// Holds every byte back, in both directions, while all connections stay open: to both ends the other one has just
    /// become silent.
    pub fn freeze(&self) {
        self.inner.frozen.send_replace(true);
    }

    /// Lets connections through again, and bytes that were held back.
    pub fn mend(&self) {
        self.inner.open.send_replace(true);
        self.inner.frozen.send_replace(false);
    }
}

fn socket_of(address: &Address) -> Option<SocketAddr> {
    let mut parts = address.as_str().split('/').skip(1);
    let (ip, tcp) = match (parts.next()?, parts.next()?, parts.next()?) {
        ("ip4" | "ip6", ip, "tcp") => (ip.parse().ok()?, parts.next()?.parse().ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, tcp))
}

impl Inner {
    async fn pass(&self, caller: TcpStream) {
        let target = *self.target.borrow();
        let Some(target) = target.filter(|_| *self.open.borrow()) else { return };
        let Ok(callee) = TcpStream::connect(target).await else { return };
        // Without this small frames wait for the acknowledgement of earlier ones.
        let _ = (caller.set_nodelay(true), callee.set_nodelay(true));
        let ((from_caller, to_caller), (from_callee, to_callee)) = (caller.into_split(), callee.into_split());
        tokio::join!(self.copy(from_caller, to_callee, false), self.copy(from_callee, to_caller, true));
    }

    /// Takes the line for `bytes` and waits until they are through.
    async fn take(&self, bytes: usize) {
        let Some(rate) = self.bytes_per_second.filter(|rate| *rate > 0) else { return };
        let time = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = free_after(*free_at, Instant::now(), time);
            *free_at
        };
        tokio::time::sleep_until(until).await;
    }

    /// Passes one direction on; only towards the caller the line has a speed.
    async fn copy(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, paced: bool) {
        let mut piece = vec![0; PIECE];
        let mut frozen = self.frozen.subscribe();
        while let Ok(read @ 1..) = from.read(&mut piece).await {
            if paced {
                self.take(read).await;
            }
            // The sender lives as long as the line.
            let _ = frozen.wait_for(|frozen| !frozen).await;
            let Some(bytes) = piece.get(..read) else { break };
            if to.write_all(bytes).await.is_err() {
                break;
            }
        }
        // The other direction may still have something to say; an end that is gone already does not mind.
        let _ = to.shutdown().await;
    }
}

/// When a line is free again that is taken now for so long.
fn free_after(free_at: Instant, now: Instant, time: Duration) -> Instant {
    free_at.max(now.checked_sub(LATE).unwrap_or(now)) + time
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_line_is_as_fast_as_it_says_though_timers_are_late() {
        let (start, each) = (Instant::now(), Duration::from_millis(5));
        let (mut now, mut free_at) = (start, start);
        for _ in 0..1000 {
            free_at = free_after(free_at, now, each);
            // The timer is late by two milliseconds, whenever it has to be waited for.
            now = if free_at > now { free_at + Duration::from_millis(2) } else { now };
        }
        let took = now - start;
        assert!(took >= each * 990 && took <= each * 1010, "{took:?}");
        // What it did not use for long is gone.
        now += Duration::from_secs(10);
        assert_eq!(free_after(free_at, now, each), now - LATE + each);
    }
}
