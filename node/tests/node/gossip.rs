//! Gossip: a message passes a node only after that node's own judgement.

use node::{GossipReceiver, MAX_GOSSIP_BYTES, PublishError, SubscribeError};

use super::*;

const TOPIC: &str = "willcall/test";

/// Publishes until the mesh has formed.
async fn publish(node: &TestNode, data: &[u8]) {
    eventually(|| async {
        match node.publish(TOPIC, data.to_vec()).await {
            // An earlier attempt went out.
            Err(PublishError::Duplicate) => Ok(()),
            other => other,
        }
    })
    .await;
}

async fn line_of_three(seed: u8) -> ([TestNode; 3], [GossipReceiver; 3]) {
    let (a, b, c) = (
        TestNode::start(seed, |_| {}).await,
        TestNode::start(seed + 1, |_| {}).await,
        TestNode::start(seed + 2, |_| {}).await,
    );
    let receivers = [
        a.subscribe(TOPIC, 16).await.unwrap(),
        b.subscribe(TOPIC, 16).await.unwrap(),
        c.subscribe(TOPIC, 16).await.unwrap(),
    ];
    a.connect(&b.at, LIMIT).await.unwrap();
    c.connect(&b.at, LIMIT).await.unwrap();
    ([a, b, c], receivers)
}

#[tokio::test]
async fn an_accepted_message_travels_on_and_a_rejected_one_does_not() {
    let ([a, b, c], [_at_a, mut at_b, mut at_c]) = line_of_three(70).await;
    publish(&a, b"bad").await;
    let bad = within(at_b.next()).await.unwrap();
    assert_eq!((&bad.data[..], bad.from, &*bad.topic), (&b"bad"[..], a.at.peer, TOPIC));
    bad.reject();
    publish(&a, b"dropped").await;
    drop(within(at_b.next()).await.unwrap());
    // Until both ends of the second hop know each other's subscription, an accepted message has nowhere to go: the
    // publisher tries with a new one each time, as an outbox does.
    let mut n = 0_u32;
    let arrived = loop {
        n += 1;
        assert!(n < 200, "never forwarded");
        publish(&a, format!("good {n}").as_bytes()).await;
        let good = within(at_b.next()).await.unwrap();
        assert!(good.data.starts_with(b"good"));
        good.accept();
        if let Ok(message) = tokio::time::timeout(Duration::from_millis(300), at_c.next()).await {
            break message.unwrap();
        }
    };
    // Neither of the two before it came through, and it came by way of `b`.
    assert!(arrived.data.starts_with(b"good"), "{:?}", arrived.data);
    assert_eq!(arrived.from, b.at.peer);
    for (result, at_least) in [("rejected", 1), ("ignored", 1), ("accepted", 1)] {
        assert!(metric(&b, &format!("willcall_node_gossip_total{{result=\"{result}\"}}")) >= at_least, "{result}");
    }
    for node in [a, b, c] {
        node.stop().await;
    }
}

#[tokio::test]
async fn a_full_queue_ignores_and_counts() {
    let (a, b) = (TestNode::start(75, |_| {}).await, TestNode::start(76, |_| {}).await);
    let mut at_b = b.subscribe(TOPIC, 2).await.unwrap();
    a.connect(&b.at, LIMIT).await.unwrap();
    for n in 0..4_u8 {
        publish(&a, &[n]).await;
    }
    let full = "willcall_node_gossip_total{result=\"queue-full\"}";
    eventually(|| async { if metric(&b, full) == 2 { Ok(()) } else { Err(metric(&b, full)) } }).await;
    for n in 0..2_u8 {
        let message = within(at_b.next()).await.unwrap();
        assert_eq!(message.data, [n]);
    }
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn what_cannot_be_published_or_subscribed_has_a_name() {
    let a = TestNode::start(77, |config| config.limits.gossip_topics = 1).await;
    assert_eq!(a.publish(TOPIC, vec![1]).await, Err(PublishError::NoPeers));
    let len = MAX_GOSSIP_BYTES + 1;
    assert_eq!(a.publish(TOPIC, vec![1; len]).await, Err(PublishError::TooLarge { len }));
    let receiver = a.subscribe(TOPIC, 1).await.unwrap();
    let taken = SubscribeError::Taken { topic: TOPIC.to_owned() };
    assert_eq!(a.subscribe(TOPIC, 1).await.unwrap_err(), taken);
    assert_eq!(a.subscribe("other", 1).await.unwrap_err(), SubscribeError::TooMany { limit: 1 });
    // Dropping the receiver gives the topic back.
    drop(receiver);
    let mut receiver = a.subscribe(TOPIC, 1).await.unwrap();
    a.unsubscribe(TOPIC).await;
    assert!(within(receiver.next()).await.is_none());
    let off = TestNode::start(78, |config| config.gossip = false).await;
    assert_eq!(off.publish(TOPIC, vec![1]).await, Err(PublishError::Off));
    assert_eq!(off.subscribe(TOPIC, 1).await.unwrap_err(), SubscribeError::Off);
    a.stop().await;
    off.stop().await;
}

#[tokio::test]
async fn the_largest_message_arrives() {
    let (a, b) = (TestNode::start(79, |_| {}).await, TestNode::start(80, |_| {}).await);
    let mut at_b = b.subscribe(TOPIC, 2).await.unwrap();
    a.connect(&b.at, LIMIT).await.unwrap();
    let data = vec![5; MAX_GOSSIP_BYTES];
    publish(&a, &data).await;
    assert_eq!(within(at_b.next()).await.unwrap().data, data);
    a.stop().await;
    b.stop().await;
}

#[tokio::test]
async fn a_node_that_restarts_is_heard_and_in_the_mesh_again() {
    // As many topics as a seeder has.
    let topics = ["willcall/1", "willcall/2", "willcall/3", "willcall/4", "willcall/5"];
    let subscribed = async |node: &TestNode| {
        let mut receivers = Vec::new();
        for topic in topics {
            receivers.push(node.subscribe(topic, 16).await.unwrap());
        }
        receivers
    };
    let a = TestNode::start(170, |_| {}).await;
    let mut at_a = subscribed(&a).await;
    for life in 0..3_u8 {
        let b = TestNode::start(171, |_| {}).await;
        let at_b = subscribed(&b).await;
        b.connect(&a.at, LIMIT).await.unwrap();
        // What it says first reaches its neighbour: once, and nothing repeats it.
        for (topic, receiver) in topics.iter().zip(&mut at_a) {
            eventually(|| b.publish(topic, vec![life])).await;
            let heard = within(receiver.next()).await.unwrap();
            assert_eq!((&heard.data[..], heard.from), (&[life][..], b.at.peer));
            heard.accept();
        }
        // It says that it leaves, as an orderly stop does.
        drop(at_b);
        let mut words = 0_u32;
        for topic in topics {
            eventually(|| {
                words += 1;
                let word = [&[life][..], &words.to_le_bytes()].concat();
                let a = &a;
                async move {
                    match a.publish(topic, word).await {
                        Err(PublishError::NoPeers) => Ok(()),
                        other => Err(other),
                    }
                }
            })
            .await;
        }
        b.stop().await;
    }
    a.stop().await;
}

#[tokio::test]
async fn what_a_node_publishes_is_kept_for_few_however_many_listen() {
    const LISTENERS: u8 = 24;
    /// Members of a mesh, at most.
    const MESH: u64 = 12;
    const MESSAGES: u8 = 10;
    const LEN: usize = 32 * 1024;
    // No housekeeping, in which neighbours ask for what they have not got.
    let quiet = |config: &mut node::NodeConfig| config.gossip_heartbeat = Duration::from_secs(3600);
    let a = TestNode::start(180, quiet).await;
    let _at_a = a.subscribe(TOPIC, 16).await.unwrap();
    let (mut listeners, (heard, mut hearing)) = (Vec::new(), tokio::sync::mpsc::channel(64));
    for seed in 0..LISTENERS {
        let listener = TestNode::start(181 + seed, quiet).await;
        let (mut topic, heard) = (listener.subscribe(TOPIC, 16).await.unwrap(), heard.clone());
        listener.supervisor.spawn("listens", async move {
            while let Some(message) = topic.next().await {
                let _ = heard.send(message.data.first().copied()).await;
            }
        });
        listener.connect(&a.at, LIMIT).await.unwrap();
        listeners.push(listener);
    }
    for n in 0..MESSAGES {
        publish(&a, &vec![n; LEN]).await;
        while within(hearing.recv()).await.unwrap() != Some(n) {}
    }
    let sent = metric(&a, "willcall_node_tcp_sent_bytes_total");
    assert!(sent < (u64::from(MESSAGES) * MESH + 12) * LEN as u64, "{sent}");
    for node in listeners.into_iter().chain([a]) {
        node.stop().await;
    }
}
