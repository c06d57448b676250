//! The command line's side of the control socket; its errors are read by people, so "no node runs here" is told apart
//! from everything else.

use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokio::io::BufReader;
use tokio::net::UnixStream;

use crate::control::{ControlError, read_line, socket_path, write_line};

/// Why a request to a running node failed.
#[derive(Debug, thiserror::Error)]
pub enum ControlCallError {
    /// No node runs over this directory.
    #[error("no node runs for {}; start it first with this data directory", dir.display())]
    NotRunning {
        /// The data directory.
        dir: PathBuf,
    },
    /// The node said no.
    #[error(transparent)]
    Refused(#[from] ControlError),
    /// The node went away before it answered.
    #[error("the node stopped before it answered")]
    NoAnswer,
    /// The node's answer is not one; it may be of another version.
    #[error("the node's answer makes no sense: {0}")]
    Malformed(String),
    /// The socket failed.
    #[error("cannot talk to the node of {}: {source}", dir.display())]
    Io {
        /// The data directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Sends a request to the node that runs over `dir` and waits for its answer, however long that takes; `on_progress`
/// is called for each progress line.
///
/// # Errors
/// [`ControlCallError`].
pub async fn control_call(
    dir: &Path,
    request: &Value,
    mut on_progress: impl FnMut(Value),
) -> Result<Value, ControlCallError> {
    let failed = |source| ControlCallError::Io { dir: dir.to_owned(), source };
    let not_running = || ControlCallError::NotRunning { dir: dir.to_owned() };
    let path = socket_path(dir).await.map_err(failed)?.ok_or_else(not_running)?;
    let stream = UnixStream::connect(&path).await.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => not_running(),
        _ => failed(source),
    })?;
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    // One that is killed with the request unread, or before it could be written, leaves a reset behind and no end.
    let gone = |source: io::Error| match source.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => ControlCallError::NoAnswer,
        _ => failed(source),
    };
    write_line(&mut writer, request).await.map_err(gone)?;
    loop {
        let line = read_line(&mut reader).await.map_err(gone)?.ok_or(ControlCallError::NoAnswer)?;
        match Line::parse(&line)? {
            Line::Progress(value) => on_progress(value),
            Line::Ok(value) => return Ok(value),
            Line::Error(error) => return Err(error.into()),
        }
    }
}

/// One line of an answer.
enum Line {
    Progress(Value),
    Ok(Value),
    Error(ControlError),
}

impl Line {
    fn parse(line: &str) -> Result<Self, ControlCallError> {
        let malformed = |error: serde_json::Error| ControlCallError::Malformed(error.to_string());
        let Value::Object(mut fields) = serde_json::from_str(line).map_err(malformed)? else {
            return Err(ControlCallError::Malformed("a line is no object".to_owned()));
        };
        if let Some(value) = fields.remove("progress") {
            Ok(Self::Progress(value))
        } else if let Some(value) = fields.remove("ok") {
            Ok(Self::Ok(value))
        } else if let Some(value) = fields.remove("error") {
            serde_json::from_value(value).map(Self::Error).map_err(malformed)
        } else {
            Err(ControlCallError::Malformed("a line is neither progress, ok nor error".to_owned()))
        }
    }
}
