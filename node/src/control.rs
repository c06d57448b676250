//! One process owns a data directory, so a command line beside a running node has to ask the node. It does so over a
//! Unix socket in that directory, which the file system already guards: whoever may read the directory may ask.
//!
//! One connection is one request: a line of JSON, answered by any number of `{"progress": …}` lines and then one
//! `{"ok": …}` or `{"error": {"code": …, "message": …}}`.

use std::future::Future;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use protocol::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

use crate::supervisor::Supervisor;

/// Longest line in either direction, bytes: a request for a thousand files fits, a flood does not.
pub(crate) const MAX_LINE: usize = 1024 * 1024;
/// Connections at once; further ones wait in the listener's backlog. People and scripts need a handful.
const MAX_CONNECTIONS: usize = 32;
/// Progress lines waiting for a slow reader; the work waits at this bound.
const PROGRESS_QUEUE: usize = 64;
/// The time a connected client has to send its request, and to take each line of the answer.
const IO_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest socket path used as it is; the system's limit is 107 bytes on Linux and 103 on others.
const MAX_PATH: usize = 100;
/// Bytes of `/willcall-0123456789abcdef/control.sock`, what is made in a folder whose path is short.
const SHORT_NAME: usize = 39;
/// Names tried for a short directory beside a longer one.
const MOST_NAMES: u8 = 4;

/// A named no to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct ControlError {
    /// Short name for programs, e.g. `unknown-command`.
    pub code: String,
    /// One line for people.
    pub message: String,
}

impl ControlError {
    /// An error of this name and text.
    pub fn new(code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: code.into(), message: message.into() }
    }
}

/// Where a handler reports how far it is.
#[derive(Clone, Debug)]
pub struct ProgressSender {
    sender: mpsc::Sender<Value>,
}

impl ProgressSender {
    /// Sends one progress value. Waits for a slow reader; goes on at once when the caller has gone away.
    pub async fn send(&self, progress: Value) {
        // The work may go on without its watcher; one that should not asks `caller_gone`.
        let _ = self.sender.send(progress).await;
    }

    /// Returns when the caller has gone away.
    pub async fn caller_gone(&self) {
        self.sender.closed().await;
    }
}

/// Why a node cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ControlStartError {
    /// Another process answers there.
    #[error(
        "another process already answers on {}; stop it first. If it is the node of another folder, of which this one is a \
         copy, remove control.path from this folder", path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// What is there is no socket, and nobody's but the operator's to remove.
    #[error(
        "{} is no socket, and lies where this node makes its own; move it away, then start again", path.display()
    )]
    Taken {
        /// Where the socket belongs.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot make the control socket {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Answers requests of command lines on the same machine. The socket goes when the supervisor stops.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
}

impl ControlServer {
    /// Makes `<dir>/control.sock` and serves it under `supervisor`. A request that was begun is finished even if the
    /// caller goes away, unless the node stops.
    ///
    /// # Errors
    /// [`ControlStartError::InUse`] when another process answers there.
    pub async fn start<F, Fut>(supervisor: &Supervisor, dir: &Path, handler: F) -> Result<Self, ControlStartError>
    where
        F: Fn(Value, ProgressSender) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<Value, ControlError>> + Send + 'static,
    {
        let socket = Socket::bind(dir).await?;
        let path = socket.path.clone();
        let token = supervisor.token();
        let tasks = supervisor.clone();
        supervisor.spawn_critical("control", async move {
            let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
            let (socket, token) = (socket, token);
            loop {
                let next = async {
                    // The semaphore is never closed.
                    let place = Arc::clone(&places).acquire_owned().await.ok();
                    (place, socket.listener.accept().await)
                };
                let (place, accepted) = tokio::select! {
                    next = next => next,
                    () = token.cancelled() => return Ok::<(), io::Error>(()),
                };
                let stream = match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Mostly too many open files: without a pause this would spin.
                        tracing::warn!(%error, "control connection failed");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                if !is_own_user(&stream) {
                    tracing::warn!("control connection of another user refused");
                    continue;
                }
                let (handler, token) = (handler.clone(), token.clone());
                tasks.spawn("control request", async move {
                    let _place = place;
                    tokio::select! {
                        () = serve(stream, handler) => {}
                        () = token.cancelled() => {}
                    }
                });
            }
        });
        Ok(Self { path })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The listening socket and its traces in the file system, which go with it.
struct Socket {
    listener: UnixListener,
    path: PathBuf,
    // Set when the directory's own path is too long for a socket.
    redirect: Option<(PathBuf, PathBuf)>,
}

impl Socket {
    async fn bind(dir: &Path) -> Result<Self, ControlStartError> {
        let direct = dir.join("control.sock");
        let redirect_file = dir.join("control.path");
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ControlStartError::Io { path, source }
        };
        if let Some(existing) = socket_path(dir).await.map_err(failed(&redirect_file))? {
            remove_stale(&existing).await?;
        }
        // The redirection of an earlier run, if any, leads nowhere now.
        let _ = tokio::fs::remove_file(&redirect_file).await;
        let (path, redirect) = if direct.as_os_str().len() <= MAX_PATH {
            remove_stale(&direct).await?;
            (direct, None)
        } else {
            let short = short_dir(dir).map_err(failed(&direct))?;
            let path = short.join("control.sock");
            remove_stale(&path).await?;
            let text = path.as_os_str().as_encoded_bytes().to_vec();
            tokio::fs::write(&redirect_file, text).await.map_err(failed(&redirect_file))?;
            (path, Some((redirect_file, short)))
        };
        let listener = UnixListener::bind(&path).map_err(failed(&path))?;
        let owner_only = std::fs::Permissions::from_mode(0o600);
        tokio::fs::set_permissions(&path, owner_only).await.map_err(failed(&path))?;
        Ok(Self { listener, path, redirect })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Best effort: a socket that stays is recognised as stale by the next start.
        let _ = std::fs::remove_file(&self.path);
        if let Some((file, dir)) = &self.redirect {
            let _ = std::fs::remove_file(file);
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// Makes sure that nothing is at `path`, unless somebody answers there.
async fn remove_stale(path: &Path) -> Result<(), ControlStartError> {
    let failed = |source| ControlStartError::Io { path: path.to_owned(), source };
    match tokio::fs::symlink_metadata(path).await {
        Ok(found) if found.file_type().is_socket() => {}
        // Connecting to it fails as it does to a socket that nobody listens at.
        Ok(_) => return Err(ControlStartError::Taken { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(ControlStartError::InUse { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Nobody listens: left behind by a process that was killed.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tokio::fs::remove_file(path).await.map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Where the node of `dir` listens, or would.
///
/// `None` when it does not run and could not listen in `dir` itself, whose path is too long for a socket.
pub(crate) async fn socket_path(dir: &Path) -> io::Result<Option<PathBuf>> {
    match tokio::fs::read_to_string(dir.join("control.path")).await {
        Ok(path) => Ok(Some(PathBuf::from(path))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let direct = dir.join("control.sock");
            Ok((direct.as_os_str().len() <= MAX_PATH).then_some(direct))
        }
        Err(error) => Err(error),
    }
}

/// A directory with a short path that only this user can enter. Its name follows from the data directory's path: a node
/// that was killed comes back to the one that it left behind, and takes it away in the end.
fn short_dir(dir: &Path) -> io::Result<PathBuf> {
    let given = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).into_iter().chain([std::env::temp_dir()]);
    let mut short_enough = given.filter(|base| base.as_os_str().len() <= MAX_PATH - SHORT_NAME);
    let base = short_enough.next().unwrap_or_else(|| PathBuf::from("/tmp"));
    let full = std::fs::canonicalize(dir)?;
    let own = rustix::process::geteuid().as_raw();
    // Somebody else may have put something in the way.
    for number in 0..MOST_NAMES {
        let parts = [full.as_os_str().as_encoded_bytes(), &own.to_le_bytes(), &[number]];
        let digest = Digest::of("willcall 2026-11 control socket", &parts);
        let name = digest.as_bytes().get(..8).map(|bytes| data_encoding::HEXLOWER.encode(bytes)).unwrap_or_default();
        let short = base.join(format!("willcall-{name}"));
        match std::fs::DirBuilder::new().mode(0o700).create(&short) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let found = std::fs::symlink_metadata(&short)?;
                if found.is_dir() && found.uid() == own && found.mode() & 0o077 == 0 {
                    return Ok(short);
                }
            }
            made => return made.map(|()| short),
        }
    }
    let text = format!("the places for it in {} are taken by others; set XDG_RUNTIME_DIR", base.display());
    Err(io::Error::new(io::ErrorKind::AlreadyExists, text))
}

/// The socket's mode says the same; between making it and setting the mode, this does.
fn is_own_user(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0)
}

async fn serve<F, Fut>(stream: UnixStream, handler: F)
where
    F: Fn(Value, ProgressSender) -> Fut,
    Fut: Future<Output = Result<Value, ControlError>>,
{
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let request = match tokio::time::timeout(IO_TIMEOUT, read_line(&mut reader)).await {
        Ok(Ok(Some(line))) => serde_json::from_str(&line)
            .map_err(|error| ControlError::new("malformed", format!("the request is not JSON: {error}"))),
        // Connected and left: a probe of whether a node runs.
        Ok(Ok(None)) => return,
        Ok(Err(error)) if error.kind() == io::ErrorKind::InvalidData => {
            Err(ControlError::new("too-large", error.to_string()))
        }
        Ok(Err(_)) => return,
        Err(_) => Err(ControlError::new("idle", "no request came in time")),
    };
    let answer = match request {
        Ok(request) => {
            let (sender, mut progress) = mpsc::channel(PROGRESS_QUEUE);
            let work = handler(request, ProgressSender { sender });
            tokio::pin!(work);
            let mut watched = true;
            loop {
                tokio::select! {
                    // Progress before the end, so that no line comes after the answer.
                    biased;
                    Some(value) = progress.recv() => {
                        watched = watched && write_line(&mut writer, &json!({ "progress": value })).await.is_ok();
                        if !watched {
                            progress.close();
                        }
                    }
                    // A client sends nothing more: reading ends when it goes away.
                    () = gone(&mut reader), if watched => {
                        watched = false;
                        progress.close();
                    }
                    answer = &mut work => {
                        while watched && let Ok(value) = progress.try_recv() {
                            watched = write_line(&mut writer, &json!({ "progress": value })).await.is_ok();
                        }
                        break answer;
                    }
                }
            }
        }
        Err(error) => Err(error),
    };
    let line = match answer {
        Ok(value) => json!({ "ok": value }),
        Err(error) => json!({ "error": error }),
    };
    // A caller who went away does not mind that the answer is lost.
    let _ = write_line(&mut writer, &line).await;
}

async fn gone(reader: &mut (impl AsyncBufRead + Unpin)) {
    loop {
        match reader.fill_buf().await {
            Ok([]) | Err(_) => return,
            Ok(extra) => {
                let len = extra.len();
                reader.consume(len);
            }
        }
    }
}

/// One line without its end, at most [`MAX_LINE`] bytes; `None` at the end of the stream.
pub(crate) async fn read_line<R: AsyncBufRead + Unpin>(reader: &mut R) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    let limit = MAX_LINE as u64 + 1;
    reader.take(limit).read_until(b'\n', &mut line).await?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        let text = if line.len() >= MAX_LINE {
            format!("a line has more than {MAX_LINE} bytes")
        } else {
            "a line was cut off".to_owned()
        };
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    String::from_utf8(line).map(Some).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a line is not UTF-8"))
}

pub(crate) async fn write_line<W: AsyncWrite + Unpin>(writer: &mut W, value: &Value) -> io::Result<()> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    if line.len() > MAX_LINE + 1 {
        let text = format!("a line of {} bytes, at most {MAX_LINE} are allowed", line.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let write = async {
        writer.write_all(&line).await?;
        writer.flush().await
    };
    tokio::time::timeout(IO_TIMEOUT, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
