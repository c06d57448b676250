//! Most services between nodes are one question and one answer. Here that is a stream per call with a limit on its
//! size and its time, and a server in which a slow or malformed caller costs only its own call.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use protocol::api::Answer;
use protocol::codec::{CodecError, Wire};
use protocol::{PeerAddrs, PeerId, Refusal, RefusalCode};
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::frame::{FrameError, read_message, write_message};
use crate::hall::Hall;
use crate::handle::NodeHandle;
use crate::metrics::NodeMetrics;
use crate::streams::{AcceptError, AcceptLimits, OpenError, Protocol, Stream};
use crate::supervisor::Supervisor;

/// Why a call got no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// No stream to the peer.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It took longer than the caller allowed.
    #[error("{peer} did not answer {protocol} within {limit:?}")]
    Timeout {
        /// The peer.
        peer: PeerId,
        /// The protocol.
        protocol: Protocol,
        /// The time allowed.
        limit: Duration,
    },
    /// The peer does not speak the protocol.
    #[error("{peer} does not speak {protocol}")]
    Unsupported {
        /// The peer.
        peer: PeerId,
        /// The protocol.
        protocol: Protocol,
    },
    /// The peer closed the stream without an answer: it is overloaded or found the request malformed.
    #[error("{peer} closed the stream without an answer on {protocol}")]
    NoAnswer {
        /// The peer.
        peer: PeerId,
        /// The protocol.
        protocol: Protocol,
    },
    /// Our request or the answer is longer than the protocol allows.
    #[error("message of {len} bytes on {protocol}, at most {max} are allowed")]
    TooLarge {
        /// The protocol.
        protocol: Protocol,
        /// Length, bytes.
        len: usize,
        /// Limit, bytes.
        max: usize,
    },
    /// The answer is not one.
    #[error("{peer} sent a malformed answer on {protocol}: {source}")]
    Malformed {
        /// The peer.
        peer: PeerId,
        /// The protocol.
        protocol: Protocol,
        /// What is wrong with it.
        source: CodecError,
    },
}

/// Bounds of a service that answers calls.
#[derive(Clone, Copy, Debug)]
pub struct CallLimits {
    /// Calls being answered at once; further ones wait for half a second and are then answered `overloaded`. Four times
    /// as many streams may be open in all. Beyond that, one gives way whose request is still to come, or whose answer nobody
    /// takes; where there is none such, streams wait in a queue and are then dropped.
    pub concurrent: usize,
    /// Calls of one peer being answered at once; further ones are answered `overloaded`. Keep it well below
    /// `concurrent`: that is what stops one peer from taking all places.
    pub per_peer: usize,
    /// The time a caller has to take the answer. (To send its request it has that, and three seconds at most.)
    pub io_timeout: Duration,
}

impl Default for CallLimits {
    fn default() -> Self {
        Self { concurrent: 64, per_peer: 8, io_timeout: Duration::from_secs(10) }
    }
}

impl NodeHandle {
    /// Asks a peer: opens a stream, sends `request`, reads the answer.
    ///
    /// # Errors
    /// [`CallError`]; within `timeout` in any case.
    pub async fn call<Req, Resp>(
        &self,
        target: &PeerAddrs,
        protocol: Protocol,
        request: &Req,
        timeout: Duration,
    ) -> Result<Resp, CallError>
    where
        Req: Wire,
        Resp: Wire,
    {
        let peer = target.peer;
        let exchange = async {
            let stream = self.open(target, protocol, timeout).await?;
            exchange(stream, request).await.map_err(|error| explain(peer, protocol, error))
        };
        match tokio::time::timeout(timeout, exchange).await {
            Ok(result) => result,
            Err(_) => Err(CallError::Timeout { peer, protocol, limit: timeout }),
        }
    }
}

async fn exchange<Req: Wire, Resp: Wire>(mut stream: Stream, request: &Req) -> Result<Resp, FrameError> {
    let sent = match write_message(&mut stream, request).await {
        Ok(()) => stream.shutdown().await.map_err(FrameError::from),
        Err(error) => Err(error),
    };
    match sent {
        // A peer that resets the stream after answering makes the sending fail, not the answer.
        Ok(()) | Err(FrameError::Io(_) | FrameError::Truncated) => {}
        Err(error) => return Err(error),
    }
    read_message(&mut stream).await?.ok_or(FrameError::Truncated)
}

fn explain(peer: PeerId, protocol: Protocol, error: FrameError) -> CallError {
    match error {
        FrameError::TooLarge { len, max } => CallError::TooLarge { protocol, len, max },
        FrameError::Unsupported(_) => CallError::Unsupported { peer, protocol },
        FrameError::Truncated | FrameError::Io(_) => CallError::NoAnswer { peer, protocol },
        FrameError::Codec(source) => CallError::Malformed { peer, protocol, source },
    }
}

/// Serves calls of a protocol under `supervisor` until it stops: reads the request, asks `answer`, sends what it
/// gives. A call that cannot be read, or whose caller does not take the answer, ends without one and is counted; one
/// for which there is no place is answered `overloaded`.
///
/// # Errors
/// [`AcceptError`] when the protocol is already being accepted.
pub async fn serve_calls<Req, Resp, F, Fut>(
    supervisor: &Supervisor,
    handle: &NodeHandle,
    protocol: Protocol,
    limits: CallLimits,
    answer: F,
) -> Result<(), AcceptError>
where
    Req: Wire + Send + 'static,
    Resp: Answer + Send + Sync + 'static,
    F: Fn(PeerId, Req) -> Fut + Clone + Send + Sync + 'static,
    Fut: Future<Output = Resp> + Send + 'static,
{
    let concurrent = limits.concurrent.clamp(1, Semaphore::MAX_PERMITS / READING);
    // Streams whose request is still to be read hold no place of a call: whoever opens them and says nothing keeps
    // nobody else from asking.
    let open = AcceptLimits { queue: concurrent, per_peer: limits.per_peer.saturating_mul(READING) };
    let mut accept = handle.accept(protocol, open).await?;
    let reading = Arc::new(Semaphore::new(concurrent * READING));
    let hall = Hall::default();
    let places = Places { all: Arc::new(Semaphore::new(concurrent)), per_peer: limits.per_peer, peers: Arc::default() };
    let counts = handle.counts().clone();
    let calls = supervisor.clone();
    let token = supervisor.token();
    supervisor.spawn(format!("calls {protocol}"), async move {
        loop {
            let next = async {
                let stream = accept.next().await?;
                // Whoever asks something has it with the stream: it waits for nobody who says nothing.
                let permit = match Arc::clone(&reading).try_acquire_owned() {
                    Ok(permit) => permit,
                    Err(_) => {
                        hall.make_room();
                        Arc::clone(&reading).acquire_owned().await.ok()?
                    }
                };
                Some((permit, stream))
            };
            let Some((permit, stream)) = (tokio::select! {
                next = next => next,
                () = token.cancelled() => None,
            }) else {
                return;
            };
            let (answer, counts, token, places) = (answer.clone(), counts.clone(), token.clone(), places.clone());
            let hall = hall.clone();
            calls.spawn(format!("call {protocol}"), async move {
                tokio::select! {
                    () = serve_one(stream, limits.io_timeout, (permit, hall), places, answer, counts) => {}
                    () = token.cancelled() => {}
                }
            });
        }
    });
    Ok(())
}

/// Streams open at once, for each call that may be answered at once.
const READING: usize = 4;
/// A request is one small frame that the caller sends with the stream: it is there at once, or something is wrong.
const READ_LIMIT: Duration = Duration::from_secs(3);
/// How long a call waits for a place before it is told to come back.
const PLACE_WAIT: Duration = Duration::from_millis(500);
/// When a call that found no place is worth repeating, milliseconds.
const RETRY_AFTER_MS: u64 = 500;

/// Calls that are answered at once: all together, and of each peer.
#[derive(Clone, Debug)]
struct Places {
    all: Arc<Semaphore>,
    per_peer: usize,
    /// Only peers with a call being answered are in here, so `concurrent` bounds it.
    peers: Arc<Mutex<HashMap<PeerId, usize>>>,
}

/// A call being answered.
struct Place {
    places: Places,
    peer: PeerId,
    _permit: OwnedSemaphorePermit,
}

impl Places {
    fn peers(&self) -> MutexGuard<'_, HashMap<PeerId, usize>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take(&self, peer: PeerId) -> Result<Place, Refusal> {
        let overloaded = |why: &str| Refusal::new(RefusalCode::Overloaded, why).retry_after(RETRY_AFTER_MS);
        let waiting = tokio::time::timeout(PLACE_WAIT, Arc::clone(&self.all).acquire_owned()).await;
        let Ok(Ok(permit)) = waiting else { return Err(overloaded("too many calls at once")) };
        let mut peers = self.peers();
        let calls = peers.entry(peer).or_default();
        if *calls >= self.per_peer.max(1) {
            return Err(overloaded("too many calls of this peer at once"));
        }
        *calls += 1;
        Ok(Place { places: self.clone(), peer, _permit: permit })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut peers = self.places.peers();
        if let Some(calls) = peers.get_mut(&self.peer) {
            *calls = calls.saturating_sub(1);
            if *calls == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

async fn serve_one<Req, Resp, F, Fut>(
    mut stream: Stream,
    limit: Duration,
    (open, hall): (OwnedSemaphorePermit, Hall),
    places: Places,
    answer: F,
    counts: NodeMetrics,
) where
    Req: Wire,
    Resp: Answer,
    F: Fn(PeerId, Req) -> Fut,
    Fut: Future<Output = Resp>,
{
    let (peer, protocol) = (stream.peer(), stream.protocol());
    let failed = |reason: &'static str| {
        counts.calls_failed.inc([protocol.as_str(), reason]);
        tracing::debug!(%peer, %protocol, reason, "call got no answer");
    };
    let reading = tokio::time::timeout(limit.min(READ_LIMIT), read_message::<Req, _>(&mut stream));
    let request = match hall.wait(peer).until(reading).await {
        Some(Ok(Ok(Some(request)))) => request,
        Some(Ok(Ok(None))) => return failed("no-request"),
        Some(Ok(Err(FrameError::TooLarge { .. }))) => return failed("too-large"),
        Some(Ok(Err(FrameError::Codec(_)))) => return failed("malformed"),
        Some(Ok(Err(_))) => return failed("stream-failed"),
        Some(Err(_)) => return failed("request-timeout"),
        None => return failed("request-gave-way"),
    };
    let (place, response) = match places.take(peer).await {
        Ok(place) => (Some(place), answer(peer, request).await),
        Err(refusal) => {
            failed("overloaded");
            (None, Resp::refused(refusal))
        }
    };
    // The answer is made: a caller that takes it slowly holds a place among those being read and written only, and that
    // for as long as nobody else needs it.
    drop(place);
    let send = async {
        write_message(&mut stream, &response).await?;
        stream.shutdown().await.map_err(FrameError::from)
    };
    match hall.wait(peer).until(tokio::time::timeout(limit, send)).await {
        Some(Ok(Ok(()))) => {}
        Some(Ok(Err(FrameError::TooLarge { len, max }))) => {
            tracing::error!(%protocol, len, max, "own answer is longer than the protocol allows");
            failed("own-answer-too-large");
        }
        Some(Ok(Err(_))) => failed("answer-not-taken"),
        Some(Err(_)) => failed("answer-timeout"),
        None => failed("answer-gave-way"),
    }
    drop(open);
}
