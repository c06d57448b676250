//! Calls: the answer comes back, and whoever misbehaves on one call hurts only that one.

use bincode::{Decode, Encode};
use node::{AcceptLimits, CallError, CallLimits, Protocol, serve_calls, write_frame};
use protocol::codec::Wire;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;

use super::*;

const DOUBLE: Protocol = Protocol::new("/test/double/1");

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
struct Ask {
    text: String,
}

#[derive(Debug, Clone, PartialEq, Encode, Decode)]
struct Told {
    text: String,
}

impl Wire for Ask {
    const MAX: usize = 1024;
}

impl Wire for Told {
    const MAX: usize = 2048;
}

impl protocol::api::Answer for Told {
    fn refused(refusal: protocol::Refusal) -> Self {
        Told { text: refusal.code.to_string() }
    }

    fn refusal(&self) -> Option<&protocol::Refusal> {
        None
    }
}

fn ask(text: &str) -> Ask {
    Ask { text: text.to_owned() }
}

const LIMITS: CallLimits = CallLimits { concurrent: 8, per_peer: 4, io_timeout: Duration::from_secs(5) };

/// Answers with the text twice; holds back answers to "slow" until the gate has a permit.
async fn serve(node: &TestNode, limits: CallLimits) -> std::sync::Arc<Semaphore> {
    let gate = std::sync::Arc::new(Semaphore::new(0));
    let opened = gate.clone();
    serve_calls(&node.supervisor, &node.handle, DOUBLE, limits, move |_peer, ask: Ask| {
        let gate = opened.clone();
        async move {
            if ask.text == "slow" {
                let _ = gate.acquire().await;
            }
            Told { text: ask.text.repeat(2) }
        }
    })
    .await
    .unwrap();
    gate
}

#[tokio::test]
async fn a_call_is_answered_and_a_slow_one_does_not_block_others() {
    let (a, b, c) =
        (TestNode::start(60, |_| {}).await, TestNode::start(61, |_| {}).await, TestNode::start(62, |_| {}).await);
    let gate = serve(&b, LIMITS).await;
    let told: Told = a.call(&b.at, DOUBLE, &ask("ab"), LIMIT).await.unwrap();
    assert_eq!(told.text, "abab");
    let slow: Vec<_> = (0..4)
        .map(|_| {
            let (handle, target) = (a.handle.clone(), b.at.clone());
            tokio::spawn(async move { handle.call::<_, Told>(&target, DOUBLE, &ask("slow"), LIMIT).await })
        })
        .collect();
    eventually(|| async {
        let running = b.supervisor.running("call /test/double/1");
        if running == 4 { Ok(()) } else { Err(running) }
    })
    .await;
    // The slow peer has used its share; another one is served as before.
    let told: Told = c.call(&b.at, DOUBLE, &ask("cd"), LIMIT).await.unwrap();
    assert_eq!(told.text, "cdcd");
    // And the slow one is told so by name.
    let told: Told = a.call(&b.at, DOUBLE, &ask("fifth"), LIMIT).await.unwrap();
    assert_eq!(told.text, "overloaded");
    gate.add_permits(4);
    for call in slow {
        assert_eq!(within(call).await.unwrap().unwrap().text, "slowslow");
    }
    for node in [a, b, c] {
        node.stop().await;
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_call_has_a_name() {
    let (a, b) = (TestNode::start(63, |_| {}).await, TestNode::start(64, |_| {}).await);
    serve(&b, CallLimits { io_timeout: Duration::from_millis(200), ..LIMITS }).await;

    let error = a.call::<_, Told>(&b.at, DOUBLE, &ask(&"x".repeat(2000)), LIMIT).await.unwrap_err();
    assert!(matches!(error, CallError::TooLarge { max: 1024, .. }), "{error}");

    let nobody = Protocol::new("/test/nobody/1");
    let error = a.call::<_, Told>(&b.at, nobody, &ask("x"), LIMIT).await.unwrap_err();
    assert!(matches!(error, CallError::Unsupported { .. }), "{error}");

    let error = a.call::<_, Told>(&b.at, DOUBLE, &ask("slow"), Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, CallError::Timeout { .. }), "{error}");

    // Requests that no client of ours sends: each ends without an answer and is counted by name.
    let forged: [(&str, Vec<u8>); 4] = [
        ("too-large", 5000_u32.to_be_bytes().to_vec()),
        ("malformed", vec![0, 0, 0, 2, 9, 9]),
        ("stream-failed", vec![0, 0, 0, 9, 1]),
        ("no-request", vec![]),
    ];
    for (reason, bytes) in forged {
        let mut stream = a.open(&b.at, DOUBLE, LIMIT).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _ = within(stream.read_to_end(&mut rest)).await;
        assert!(rest.is_empty(), "{reason}");
        assert_counted(&b, reason).await;
    }
    // Someone who sends nothing and waits is let go.
    let _waiting = a.open(&b.at, DOUBLE, LIMIT).await.unwrap();
    assert_counted(&b, "request-timeout").await;
    a.stop().await;
    b.stop().await;
}

async fn assert_counted(node: &TestNode, reason: &str) {
    let line = format!("willcall_node_calls_failed_total{{protocol=\"/test/double/1\",reason=\"{reason}\"}}");
    eventually(|| async { if metric(node, &line) >= 1 { Ok(()) } else { Err(node.metrics().encode()) } }).await;
}

#[tokio::test]
async fn a_malformed_answer_is_not_an_answer() {
    let (a, b) = (TestNode::start(65, |_| {}).await, TestNode::start(66, |_| {}).await);
    let mut accept = b.accept(DOUBLE, AcceptLimits { queue: 4, per_peer: 4 }).await.unwrap();
    b.supervisor.spawn("liar", async move {
        let mut stream = accept.next().await.unwrap();
        write_frame(&mut stream, &[1, 200, 3]).await.unwrap();
        stream.shutdown().await.unwrap();
        // The caller may still be sending.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    });
    let error = a.call::<_, Told>(&b.at, DOUBLE, &ask("x"), LIMIT).await.unwrap_err();
    assert!(matches!(error, CallError::Malformed { .. }), "{error}");
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn streams_that_say_nothing_hold_no_place_of_a_call() {
    let (a, b, c) =
        (TestNode::start(65, |_| {}).await, TestNode::start(66, |_| {}).await, TestNode::start(67, |_| {}).await);
    // One place for all: with a silent stream in it, nobody else could ask.
    serve(&b, CallLimits { concurrent: 1, per_peer: 1, ..LIMITS }).await;
    let mut silent = Vec::new();
    for count in 1..=2 {
        let mut stream = a.open(&b.at, DOUBLE, LIMIT).await.unwrap();
        // The stream is there once its first byte is.
        stream.write_all(&[0]).await.unwrap();
        stream.flush().await.unwrap();
        silent.push(stream);
        eventually(|| async {
            let running = b.supervisor.running("call /test/double/1");
            if running == count { Ok(()) } else { Err(running) }
        })
        .await;
    }
    let told: Told = c.call(&b.at, DOUBLE, &ask("ef"), LIMIT).await.unwrap();
    assert_eq!(told.text, "efef");
    drop(silent);
    for node in [a, b, c] {
        node.stop().await;
    }
}

#[tokio::test]
async fn streams_that_say_nothing_keep_nobody_from_asking_however_many_there_are() {
    let (a, b, c) =
        (TestNode::start(68, |_| {}).await, TestNode::start(69, |_| {}).await, TestNode::start(70, |_| {}).await);
    let stranger = TestNode::start(71, |_| {}).await;
    // Four streams may be open, and as many of each peer.
    serve(&b, CallLimits { concurrent: 1, per_peer: 1, ..LIMITS }).await;
    let counted = |what: &str| {
        let line = format!("willcall_node_{what}");
        if b.metrics().encode().contains(&line) { metric(&b, &line) } else { 0 }
    };
    let mut silent = Vec::new();
    for (number, peer) in [&a, &a, &a, &a, &stranger, &stranger, &stranger, &stranger].into_iter().enumerate() {
        let mut stream = peer.open(&b.at, DOUBLE, LIMIT).await.unwrap();
        stream.write_all(&[0]).await.unwrap();
        stream.flush().await.unwrap();
        silent.push(stream);
        eventually(|| async {
            let came = counted("streams_accepted_total{protocol=\"/test/double/1\"}")
                + counted("streams_dropped_total{protocol=\"/test/double/1\",reason=\"queue-full\"}");
            if came == number as u64 + 1 { Ok(()) } else { Err(came) }
        })
        .await;
    }
    let told: Told = c.call(&b.at, DOUBLE, &ask("gh"), LIMIT).await.unwrap();
    assert_eq!(told.text, "ghgh");
    assert_counted(&b, "request-gave-way").await;
    drop(silent);
    for node in [a, b, c, stranger] {
        node.stop().await;
    }
}
