//! The delivery service: takes a stream, shows the certificate, hears a ticket, decides, and hands the stream to a
//! driver. A stranger costs at most one task, one small frame and a few milliseconds of checks, and gets the reason for
//! every no.

mod driver;
mod places;
mod reading;
mod sending;
mod shares;

use std::sync::Arc;
use std::time::Duration;

use delivery::Content;
use node::{AcceptError, AcceptLimits, FrameError, Protocol, Stream, read_message, write_message};
use protocol::deliver::{ClientMessage, Credential, Grant, PROTOCOL, SeederMessage};
use protocol::receipt::Ack;
use protocol::serving::{ServeAccount, ServeMachine, ServeTerms};
use protocol::{PeerId, Refusal, RefusalCode, Signed, TransactionId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use crate::accounts::{self, Standing};
use crate::admission;
use crate::clock::{jittered, now_ms};
use crate::context::Seeder;
use crate::tables::account_key;

pub(crate) use places::Deliveries;
pub(crate) use shares::Shares;

const DELIVER: Protocol = Protocol::bulk(PROTOCOL);
/// Refusals and final words are sent within this time or not at all.
const LAST_WORD: Duration = Duration::from_secs(5);
/// How long a client may take to read a refusal and to end the stream, so that the refusal is not lost to a reset.
const LINGER: Duration = Duration::from_secs(2);
/// The same while the node stops: long enough for a client that listens.
const LINGER_STOPPING: Duration = Duration::from_millis(250);
/// Clients without a place that are being told so at once, some kilobytes each; further ones are dropped without a word.
const TURNED_AWAY: usize = 1024;
/// Streams that wait to be looked at, over all peers; further ones are reset. Looking takes microseconds.
const QUEUE: usize = 512;
/// When to come back if all places are taken, milliseconds before jitter.
const COME_BACK_MS: u64 = 2_000;

/// Accepts delivery streams until the node stops.
///
/// # Errors
/// [`AcceptError`] when the protocol is being accepted already.
pub(crate) async fn start(seeder: &Arc<Seeder>) -> Result<(), AcceptError> {
    let config = &seeder.config;
    let limits = AcceptLimits {
        queue: QUEUE,
        // Above the bound with a named refusal, so that this one, which is a reset, is for floods only.
        per_peer: config.max_deliveries_per_peer as usize * 4,
    };
    let mut accept = seeder.node.accept(DELIVER, limits).await?;
    let turning_away = Arc::new(Semaphore::new(TURNED_AWAY));
    let seeder = Arc::clone(seeder);
    let supervisor = seeder.supervisor.clone();
    supervisor.clone().spawn_critical("deliveries", async move {
        // Ends when the network task stops accepting; streams that came before get their answer.
        while let Some(stream) = accept.next().await {
            let peer = stream.peer();
            let waiting = match seeder.deliveries.check(peer) {
                Ok(()) => Ok(seeder.deliveries.wait(peer)),
                Err(refusal) => match Arc::clone(&turning_away).try_acquire_owned() {
                    Ok(turn) => Err((refusal, turn)),
                    Err(_) => {
                        seeder.counts.refusals.inc([refusal.code.as_str()]);
                        continue;
                    }
                },
            };
            let (seeder, turning_away) = (Arc::clone(&seeder), Arc::clone(&turning_away));
            supervisor.spawn("delivery", async move {
                match waiting {
                    Ok(waiting) => Box::pin(serve(&seeder, stream, waiting, &turning_away)).await,
                    Err((refusal, _turn)) => turn_away(&seeder, stream, refusal).await,
                }
            });
        }
        Ok::<(), std::convert::Infallible>(())
    });
    Ok(())
}

/// What a log line and a count need to know of a refusal.
struct Refused {
    refusal: Refusal,
    transaction: Option<TransactionId>,
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Self {
        Refused { refusal, transaction: None }
    }
}

async fn turn_away(seeder: &Seeder, mut stream: Stream, refusal: Refusal) {
    if greet(seeder, &mut stream).await.is_ok() {
        refuse(seeder, stream, refusal.into()).await;
    }
}

async fn serve(seeder: &Arc<Seeder>, mut stream: Stream, waiting: node::Waiting, turning_away: &Semaphore) {
    let peer = stream.peer();
    seeder.counts.deliveries.inc();
    let admitted = match Box::pin(admit(seeder, &mut stream, waiting)).await {
        Ok(Some(driver)) => Ok(driver),
        // The stream broke: there is nobody to tell.
        Ok(None) => {
            seeder.counts.deliveries.dec();
            return;
        }
        Err(refused) => Err(refused),
    };
    match admitted {
        Ok(driver) => {
            seeder.counts.deliveries_begun.inc();
            Box::pin(driver.run(stream)).await;
        }
        Err(refused) => {
            tracing::debug!(%peer, "not admitted");
            match turning_away.try_acquire() {
                Ok(_turn) => refuse(seeder, stream, refused).await,
                Err(_) => seeder.counts.refusals.inc([refused.refusal.code.as_str()]),
            }
        }
    }
    seeder.counts.deliveries.dec();
}

/// What a client has shown, checked.
struct Shown {
    transaction: Option<TransactionId>,
    grant: Grant,
    warrant: admission::Warrant,
    content: Arc<Content>,
}

/// Everything before the first byte of content. `None` when the stream broke. Whoever has shown nothing yet holds no place
/// that others need.
async fn admit(
    seeder: &Arc<Seeder>,
    stream: &mut Stream,
    waiting: node::Waiting,
) -> Result<Option<driver::Driver>, Refused> {
    let said = tokio::select! {
        biased;
        said = hear(seeder, stream) => said?,
        () = waiting.crowded_out() => {
            return Err(overloaded("more clients than this seeder listens to have shown nothing yet").into());
        }
    };
    drop(waiting);
    let Some((credential, last_ack)) = said else { return Ok(None) };
    let peer = stream.peer();
    let Shown { transaction, grant, warrant, content } = Box::pin(check(seeder, peer, credential)).await?;
    let named = |refusal| Refused { refusal, transaction };
    let key = account_key(grant.delivery, &grant.client);
    // Before a place is looked for: a client that was cut off need not wait until its own dead stream is noticed.
    let turn = seeder.deliveries.take_over(key, &seeder.supervisor.token()).await.map_err(named)?;
    let memory = places::held_for(content.manifest().chunk_size, stream.info().transport);
    let seat = seeder.deliveries.seat(peer, memory, turn.older_seat()).map_err(named)?;
    let db = seeder.db.clone();
    let account = blocking(move || accounts::load(&db, &key)).await.map_err(named)?.map_err(|error| {
        tracing::error!(%error, "cannot look up a delivery");
        named(internal())
    })?;
    admission::check_allowance(&grant, account.noted, content.manifest().chunk_size).map_err(named)?;
    let before = Standing::of(&account);
    let machine = machine(seeder, &grant, &content, account, last_ack).map_err(named)?;
    Ok(Some(driver::Driver::new(driver::Parts {
        seeder: Arc::clone(seeder),
        peer,
        grant,
        warrant,
        content,
        key,
        before,
        machine,
        turn,
        seat,
    })))
}

/// Hears what a client has to show. `None` when the stream broke.
async fn hear(seeder: &Arc<Seeder>, stream: &mut Stream) -> Result<Option<(Credential, Option<Signed<Ack>>)>, Refused> {
    match greet(seeder, stream).await {
        Ok(()) => {}
        Err(Ungreeted::Gone) => return Ok(None),
        Err(Ungreeted::Refused(refusal)) => return Err(refusal.into()),
    }
    if seeder.supervisor.token().is_cancelled() {
        return Err(shutting_down().into());
    }
    Ok(hello(seeder, stream).await?)
}

/// Checks what a client has shown.
async fn check(seeder: &Arc<Seeder>, peer: PeerId, credential: Credential) -> Result<Shown, Refused> {
    let _turn = seeder.deliveries.turn_to_check()?;
    let transaction = admission::claimed(&credential);
    if let Some(id) = transaction {
        tracing::info!(step = 9, transaction = %id, %peer, kind = credential.kind(), "transaction data from client");
    }
    let named = |refusal| Refused { refusal, transaction };

    let checking = Arc::clone(seeder);
    let checked = blocking(move || {
        let admitted = admission::admit(&checking, peer, &credential, now_ms())?;
        // Copies are handed over to other seeders to the end.
        if matches!(credential, Credential::Ticket(_)) {
            admission::check_leaving(&checking, &admitted.0)?;
        }
        Ok(admitted)
    });
    let (grant, warrant, content) = checked.await.map_err(named)?.map_err(named)?;
    let id = grant.delivery.transaction;
    tracing::info!(step = 10, transaction = %id, %peer, manifest = %grant.manifest, "product determined");
    Ok(Shown { transaction, grant, warrant, content })
}

fn machine(
    seeder: &Seeder,
    grant: &Grant,
    content: &Content,
    account: ServeAccount,
    last_ack: Option<Signed<Ack>>,
) -> Result<ServeMachine, Refusal> {
    let manifest = content.manifest();
    let terms = ServeTerms {
        network: seeder.network.id,
        seeder: seeder.peer,
        grant: grant.clone(),
        chunks: manifest.chunks(),
        chunk_size: manifest.chunk_size,
        segments: manifest.segment_count(),
        idle_ms: seeder.config.idle_ms,
        window_wait_ms: seeder.config.window_wait_ms,
    };
    ServeMachine::new(terms, content.have(), account, last_ack, now_ms())
}

enum Ungreeted {
    Gone,
    Refused(Refusal),
}

/// Shows the certificate, before anything is asked for.
async fn greet(seeder: &Seeder, stream: &mut Stream) -> Result<(), Ungreeted> {
    let now = now_ms();
    let certificate = seeder.network.certificate(now).map_err(Ungreeted::Refused)?;
    let greeting = SeederMessage::Greeting { certificate, now, load: seeder.deliveries.load() };
    let limit = Duration::from_millis(seeder.config.write_ms);
    match tokio::time::timeout(limit, write_message(stream, &greeting)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Ungreeted::Gone),
    }
}

/// The client's first message. `None` when it went away instead.
async fn hello(seeder: &Seeder, stream: &mut Stream) -> Result<Option<(Credential, Option<Signed<Ack>>)>, Refusal> {
    let limit = Duration::from_millis(seeder.config.hello_ms);
    let token = seeder.supervisor.token();
    let read = tokio::select! {
        read = tokio::time::timeout(limit, read_message::<ClientMessage, _>(stream)) => read,
        () = token.cancelled() => return Err(shutting_down()),
    };
    match read {
        Ok(Ok(Some(ClientMessage::Hello { credential, last_ack }))) => Ok(Some((credential, last_ack))),
        Ok(Ok(Some(_))) => Err(Refusal::new(RefusalCode::Malformed, "the first message is no hello")),
        Ok(Ok(None)) => Ok(None),
        Ok(Err(error)) => match bad_frame(error) {
            Some(refusal) => Err(refusal),
            None => Ok(None),
        },
        Err(_) => Err(Refusal::new(RefusalCode::Idle, "no ticket was shown in time")),
    }
}

/// The refusal for bytes that are no message; `None` when the stream broke.
fn bad_frame(error: FrameError) -> Option<Refusal> {
    match error {
        FrameError::TooLarge { len, max } => {
            Some(Refusal::new(RefusalCode::TooLarge, format!("a message of {len} bytes, at most {max} are read")))
        }
        FrameError::Codec(error) => Some(error.into()),
        FrameError::Truncated | FrameError::Unsupported(_) | FrameError::Io(_) => None,
    }
}

/// Says no by name, and gives the client the time to read it.
async fn refuse(seeder: &Seeder, mut stream: Stream, refused: Refused) {
    note_refusal(seeder, stream.peer(), refused.transaction, &refused.refusal);
    let say = async {
        write_message(&mut stream, &SeederMessage::Refusal(refused.refusal)).await.ok()?;
        stream.shutdown().await.ok()?;
        linger(seeder, &mut stream).await;
        Some(())
    };
    // A client that does not listen has lost its refusal.
    let _ = tokio::time::timeout(LAST_WORD, say).await;
}

fn note_refusal(seeder: &Seeder, peer: PeerId, transaction: Option<TransactionId>, refusal: &Refusal) {
    seeder.counts.refusals.inc([refusal.code.as_str()]);
    let code = refusal.code.as_str();
    match transaction {
        Some(id) => tracing::info!(code, %peer, transaction = %id, detail = refusal.detail, "delivery refused"),
        None => tracing::info!(code, %peer, detail = refusal.detail, "delivery refused"),
    }
}

/// Reads away what the client still sends, until it ends the stream: dropped unread, it would become a reset that may
/// overtake what was said last.
async fn linger(seeder: &Seeder, reader: &mut (impl tokio::io::AsyncRead + Unpin)) {
    let stopping = seeder.supervisor.token().is_cancelled();
    let limit = if stopping { LINGER_STOPPING } else { LINGER };
    let read_away = async {
        let mut sink = [0; 1024];
        // 64 KiB are more than any honest client has under way.
        for _ in 0..64 {
            match reader.read(&mut sink).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    };
    // Who has not ended the stream by then may find it reset.
    let _ = tokio::time::timeout(limit, read_away).await;
}

fn shutting_down() -> Refusal {
    Refusal::new(RefusalCode::ShuttingDown, "this seeder is stopping").retry_after(jittered(COME_BACK_MS))
}

fn overloaded(what: &str) -> Refusal {
    Refusal::new(RefusalCode::Overloaded, what).retry_after(jittered(COME_BACK_MS))
}

fn internal() -> Refusal {
    Refusal::new(RefusalCode::Internal, "this seeder failed at its own work").retry_after(jittered(COME_BACK_MS))
}

/// Runs `work` on a blocking thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        tracing::error!(%error, "a check did not end");
        internal()
    })
}
