//! The control socket: one request, its progress, its answer, and what is there when nobody is.

use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

use node::{ControlCallError, ControlError, ControlServer, ControlStartError, control_call};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

async fn serve(dir: &Path) -> (Supervisor, ControlServer) {
    let supervisor = Supervisor::new();
    let server = try_serve(&supervisor, dir).await.unwrap();
    (supervisor, server)
}

async fn try_serve(supervisor: &Supervisor, dir: &Path) -> Result<ControlServer, ControlStartError> {
    ControlServer::start(supervisor, dir, |request: Value, progress| async move {
        match request["command"].as_str() {
            Some("count") => {
                for n in 0..200 {
                    progress.send(json!(n)).await;
                }
                Ok(json!({ "counted": 200 }))
            }
            Some("big") => Ok(json!("x".repeat(2 * 1024 * 1024))),
            _ => Err(ControlError::new("unknown-command", "there is no such command")),
        }
    })
    .await
}

#[tokio::test]
async fn a_request_gets_progress_then_its_answer() {
    let dir = tempfile::tempdir().unwrap();
    let (supervisor, server) = serve(dir.path()).await;
    let mode = std::fs::metadata(server.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut seen = Vec::new();
    let answer = within(control_call(dir.path(), &json!({ "command": "count" }), |n| seen.push(n))).await.unwrap();
    assert_eq!(answer, json!({ "counted": 200 }));
    assert_eq!(seen, (0..200).map(|n| json!(n)).collect::<Vec<_>>());
    let error = within(control_call(dir.path(), &json!({ "command": "?" }), |_| {})).await.unwrap_err();
    assert!(matches!(&error, ControlCallError::Refused(e) if e.code == "unknown-command"), "{error}");
    // An answer that no client would read ends the connection, not the server.
    let error = within(control_call(dir.path(), &json!({ "command": "big" }), |_| {})).await.unwrap_err();
    assert!(matches!(error, ControlCallError::NoAnswer), "{error}");
    // Requests that no client of ours sends.
    for (bytes, code) in [(&b"not json\n"[..], "malformed"), (&vec![b' '; 1024 * 1024 + 2], "too-large")] {
        let mut stream = tokio::net::UnixStream::connect(server.path()).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut line = String::new();
        // After an oversized line the rest of it is still unread; the answer comes first, then perhaps a reset.
        let _ = within(stream.read_to_string(&mut line)).await;
        assert!(line.contains(code), "{line}");
    }
    supervisor.shutdown(LIMIT).await.unwrap();
    assert!(!server.path().exists());
    let error = control_call(dir.path(), &json!({}), |_| {}).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("no node runs for") && text.contains(&dir.path().display().to_string()), "{text}");
}

#[tokio::test]
async fn a_node_that_is_killed_while_it_is_asked_gave_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let listener = tokio::net::UnixListener::bind(dir.path().join("control.sock")).unwrap();
    // It ends with the request unread.
    let killed = async {
        let (stream, _) = listener.accept().await.unwrap();
        stream.readable().await.unwrap();
    };
    let request = json!({ "command": "count" });
    let (answer, ()) = within(async { tokio::join!(control_call(dir.path(), &request, |_| {}), killed) }).await;
    assert!(matches!(answer, Err(ControlCallError::NoAnswer)), "{answer:?}");
}

#[tokio::test]
async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    // What a killed process leaves behind.
    drop(std::os::unix::net::UnixListener::bind(dir.path().join("control.sock")).unwrap());
    let error = control_call(dir.path(), &json!({}), |_| {}).await.unwrap_err();
    assert!(matches!(error, ControlCallError::NotRunning { .. }), "{error}");
    let (supervisor, _server) = serve(dir.path()).await;
    let error = try_serve(&supervisor, dir.path()).await.unwrap_err();
    assert!(matches!(error, ControlStartError::InUse { .. }), "{error}");
    within(control_call(dir.path(), &json!({ "command": "count" }), |_| {})).await.unwrap();
    supervisor.shutdown(LIMIT).await.unwrap();
}

#[tokio::test]
async fn what_is_no_socket_is_left_where_it_is_and_said_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("control.sock");
    let supervisor = Supervisor::new();
    for folder in [false, true] {
        if folder {
            std::fs::create_dir(&place).unwrap();
        } else {
            std::fs::write(&place, b"somebody's").unwrap();
        }
        let error = try_serve(&supervisor, dir.path()).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ControlStartError::Taken { .. }) && text.contains("move it away"), "{text}");
        match folder {
            true => std::fs::remove_dir(&place).unwrap(),
            false => {
                assert_eq!(std::fs::read(&place).unwrap(), b"somebody's");
                std::fs::remove_file(&place).unwrap();
            }
        }
    }
    // A copy of a folder whose node runs leads to that node.
    let (running, server) = serve(dir.path()).await;
    let copy = tempfile::tempdir().unwrap();
    std::fs::write(copy.path().join("control.path"), server.path().as_os_str().as_encoded_bytes()).unwrap();
    let text = try_serve(&supervisor, copy.path()).await.unwrap_err().to_string();
    assert!(text.contains("another process already answers") && text.contains("remove control.path"), "{text}");
    running.shutdown(LIMIT).await.unwrap();
}

#[tokio::test]
async fn a_long_directory_works_too() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(60)).join("e".repeat(60));
    std::fs::create_dir_all(&deep).unwrap();
    let (supervisor, server) = serve(&deep).await;
    assert!(server.path().as_os_str().len() <= 100);
    within(control_call(&deep, &json!({ "command": "count" }), |_| {})).await.unwrap();
    supervisor.shutdown(LIMIT).await.unwrap();
    let short = server.path().parent().unwrap();
    assert!(!short.exists());
    assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 0);

    // What a killed process leaves behind, with and without the note that leads there, is used again and then removed.
    for noted in [true, false] {
        std::fs::DirBuilder::new().mode(0o700).create(short).unwrap();
        drop(std::os::unix::net::UnixListener::bind(server.path()).unwrap());
        if noted {
            std::fs::write(deep.join("control.path"), server.path().as_os_str().as_encoded_bytes()).unwrap();
        }
        let (supervisor, again) = serve(&deep).await;
        assert_eq!(again.path(), server.path());
        within(control_call(&deep, &json!({ "command": "count" }), |_| {})).await.unwrap();
        supervisor.shutdown(LIMIT).await.unwrap();
        assert!(!short.exists());
    }
    // One that others may enter is not used.
    std::fs::create_dir(short).unwrap();
    std::fs::set_permissions(short, std::fs::Permissions::from_mode(0o755)).unwrap();
    let (supervisor, again) = serve(&deep).await;
    assert_ne!(again.path(), server.path());
    supervisor.shutdown(LIMIT).await.unwrap();
    std::fs::remove_dir(short).unwrap();
}

#[tokio::test]
async fn work_goes_on_when_its_watcher_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let supervisor = Supervisor::new();
    let (done, mut finished) = tokio::sync::mpsc::channel(1);
    let server = ControlServer::start(&supervisor, dir.path(), move |_, progress| {
        let done = done.clone();
        async move {
            progress.send(json!("begun")).await;
            progress.caller_gone().await;
            done.send(()).await.unwrap();
            Ok(json!(null))
        }
    })
    .await
    .unwrap();
    let mut stream = tokio::net::UnixStream::connect(server.path()).await.unwrap();
    stream.write_all(b"{}\n").await.unwrap();
    let mut first = [0; 20];
    within(stream.read_exact(&mut first)).await.unwrap();
    drop(stream);
    within(finished.recv()).await.unwrap();
    supervisor.shutdown(LIMIT).await.unwrap();
}
