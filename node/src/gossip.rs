//! Gossip reaches everybody and proves nothing: a message is forwarded only after a role has judged it, a message
//! nobody judges is not forwarded, and who sends what is judged invalid loses standing in the mesh. Messages carry
//! their own signatures, so the mesh adds none and a message is known by its content alone.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use libp2p::gossipsub::{
    self, IdentTopic, MaxCountSubscriptionFilter, MessageAcceptance, MessageAuthenticity, MessageId, PeerScoreParams,
    PeerScoreThresholds, TopicHash, TopicScoreParams, TopicSubscriptionFilter, ValidationMode,
};
use protocol::PeerId;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};

use crate::address::peer_from_libp2p;
use crate::config::NodeConfig;
use crate::handle::NodeHandle;
use crate::host::Command;
use crate::metrics::CounterBy;
use crate::swarm::{Gossip, StartError};

/// Largest gossip message, bytes.
pub const MAX_GOSSIP_BYTES: usize = 64 * 1024;
/// Room for topic and framing around a message of the largest size.
const FRAMING: usize = 4 * 1024;
/// Messages waiting to be sent to one peer; further ones are dropped. At 64 KiB each at most 2 MiB.
const SEND_QUEUE: usize = 32;

/// Longest name of a topic. Those of each connected peer are kept as long as it is connected, whoever it is, and the library
/// bounds their number only.
const MAX_TOPIC_BYTES: usize = 128;

/// A node that stopped may join the mesh of a topic again after this long. In the library ten seconds: longer than a
/// restart takes, and its first messages would go to nobody.
const REJOIN_AFTER: Duration = Duration::from_secs(1);
/// Times that a node may join topics too early before it loses standing, within a few seconds: a seeder has five topics.
const REJOINS_FORGIVEN: f64 = 20.0;

/// Why a message was not published.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// No connected peer is subscribed to the topic: keep the message and try again later.
    #[error("no connected peer is subscribed to the topic; try again later")]
    NoPeers,
    /// Longer than [`MAX_GOSSIP_BYTES`].
    #[error("message of {len} bytes, at most {MAX_GOSSIP_BYTES} are allowed")]
    TooLarge {
        /// Its length, bytes.
        len: usize,
    },
    /// The same message passed through this node a short while ago.
    #[error("the same message was published or received a short while ago")]
    Duplicate,
    /// The send queues of all peers are full: try again later.
    #[error("the send queues of all peers are full; try again later")]
    Busy,
    /// This node takes no part in gossip.
    #[error("gossip is switched off in this node")]
    Off,
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

/// Why a topic was not subscribed to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubscribeError {
    /// Somebody in this process has the topic.
    #[error("this process is already subscribed to {topic}")]
    Taken {
        /// The topic.
        topic: String,
    },
    /// The bound on topics is reached.
    #[error("already subscribed to {limit} topics")]
    TooMany {
        /// The bound, [`crate::Limits::gossip_topics`].
        limit: usize,
    },
    /// This node takes no part in gossip.
    #[error("gossip is switched off in this node")]
    Off,
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

/// What a role found out about a message, on its way back to the network task.
#[derive(Debug)]
pub(crate) struct Verdict {
    id: MessageId,
    source: libp2p::PeerId,
    acceptance: MessageAcceptance,
}

/// A message that waits to be judged: by [`GossipMessage::accept`], [`GossipMessage::reject`] or
/// [`GossipMessage::ignore`]. Dropping it ignores it.
#[derive(Debug)]
pub struct GossipMessage {
    /// The topic it came on.
    pub topic: Arc<str>,
    /// Its content, at most [`MAX_GOSSIP_BYTES`].
    pub data: Vec<u8>,
    /// The peer that passed it on, which is not necessarily its author.
    pub from: PeerId,
    id: MessageId,
    source: libp2p::PeerId,
    // A place in the queue of verdicts, taken in advance: judging never waits and never fails.
    verdict: Option<mpsc::OwnedPermit<Verdict>>,
}

impl GossipMessage {
    /// Valid: forward it to others.
    pub fn accept(mut self) {
        self.judge(MessageAcceptance::Accept);
    }

    /// Invalid, and the peer that passed it on should have known: it loses standing.
    pub fn reject(mut self) {
        self.judge(MessageAcceptance::Reject);
    }

    /// Neither: do not forward it, and blame nobody.
    pub fn ignore(mut self) {
        self.judge(MessageAcceptance::Ignore);
    }

    fn judge(&mut self, acceptance: MessageAcceptance) {
        if let Some(permit) = self.verdict.take() {
            permit.send(Verdict { id: self.id.clone(), source: self.source, acceptance });
        }
    }
}

impl Drop for GossipMessage {
    fn drop(&mut self) {
        self.judge(MessageAcceptance::Ignore);
    }
}

/// Receiving end of a topic. Dropping it unsubscribes.
#[derive(Debug)]
pub struct GossipReceiver {
    topic: Arc<str>,
    messages: mpsc::Receiver<GossipMessage>,
    // Makes the network task notice the drop of `messages`.
    commands: mpsc::Sender<Command>,
}

impl GossipReceiver {
    /// The next message; `None` when the node has stopped or the topic was unsubscribed.
    pub async fn next(&mut self) -> Option<GossipMessage> {
        self.messages.recv().await
    }

    /// The topic.
    pub fn topic(&self) -> &str {
        &self.topic
    }
}

impl Drop for GossipReceiver {
    fn drop(&mut self) {
        self.messages.close();
        // If the queue is full, the next message on the topic makes the network task notice instead.
        let _ = self.commands.try_send(Command::Gossip(GossipCommand::Sweep));
    }
}

#[derive(Debug)]
pub(crate) enum GossipCommand {
    Subscribe {
        topic: Arc<str>,
        queue: mpsc::Sender<GossipMessage>,
        reply: oneshot::Sender<Result<(), SubscribeError>>,
    },
    Unsubscribe {
        topic: Arc<str>,
    },
    Publish {
        topic: Arc<str>,
        data: Vec<u8>,
        reply: oneshot::Sender<Result<(), PublishError>>,
    },
    Sweep,
}

impl NodeHandle {
    /// Subscribes to a topic. At most `queue` messages wait; further ones are ignored, hence not forwarded, and
    /// counted.
    ///
    /// # Errors
    /// [`SubscribeError`]; one receiver per topic and process.
    pub async fn subscribe(&self, topic: &str, queue: usize) -> Result<GossipReceiver, SubscribeError> {
        let topic: Arc<str> = topic.into();
        let (sender, messages) = mpsc::channel(queue.max(1));
        let command =
            |reply| Command::Gossip(GossipCommand::Subscribe { topic: Arc::clone(&topic), queue: sender, reply });
        self.ask(command).await.map_err(|_| SubscribeError::Stopped)??;
        Ok(GossipReceiver { topic, messages, commands: self.commands().clone() })
    }

    /// Unsubscribes from a topic; its receiver gets what is queued and then ends.
    pub async fn unsubscribe(&self, topic: &str) {
        let command = Command::Gossip(GossipCommand::Unsubscribe { topic: topic.into() });
        // A node that has stopped is subscribed to nothing.
        let _ = self.commands().send(command).await;
    }

    /// Sends a message to the topic's mesh. It does not come back to this node, and nobody confirms it.
    ///
    /// # Errors
    /// [`PublishError`]; right after connecting mostly [`PublishError::NoPeers`].
    pub async fn publish(&self, topic: &str, data: Vec<u8>) -> Result<(), PublishError> {
        if data.len() > MAX_GOSSIP_BYTES {
            return Err(PublishError::TooLarge { len: data.len() });
        }
        let command = |reply| Command::Gossip(GossipCommand::Publish { topic: topic.into(), data, reply });
        self.ask(command).await.map_err(|_| PublishError::Stopped)?
    }
}

/// The gossip part of the network task.
pub(crate) struct GossipState {
    topics: HashMap<TopicHash, (Arc<str>, mpsc::Sender<GossipMessage>)>,
    max_topics: usize,
    verdicts: mpsc::Sender<Verdict>,
    count: CounterBy<1>,
}

impl GossipState {
    pub(crate) fn new(config: &NodeConfig, count: CounterBy<1>) -> (Self, mpsc::Receiver<Verdict>) {
        let (verdicts, receiver) = mpsc::channel(config.limits.gossip_unjudged.max(1));
        let state = Self { topics: HashMap::new(), max_topics: config.limits.gossip_topics, verdicts, count };
        (state, receiver)
    }

    pub(crate) fn on_command(&mut self, gossip: Option<&mut Gossip>, command: GossipCommand) {
        let Some(gossip) = gossip else {
            match command {
                GossipCommand::Subscribe { reply, .. } => drop(reply.send(Err(SubscribeError::Off))),
                GossipCommand::Publish { reply, .. } => drop(reply.send(Err(PublishError::Off))),
                GossipCommand::Unsubscribe { .. } | GossipCommand::Sweep => {}
            }
            return;
        };
        match command {
            GossipCommand::Subscribe { topic, queue, reply } => {
                let _ = reply.send(self.subscribe(gossip, &topic, queue));
            }
            GossipCommand::Publish { topic, data, reply } => {
                let _ = reply.send(publish(gossip, &topic, data));
            }
            GossipCommand::Unsubscribe { topic } => self.unsubscribe(gossip, &topic),
            GossipCommand::Sweep => self.sweep(gossip),
        }
    }

    fn subscribe(
        &mut self,
        gossip: &mut Gossip,
        name: &Arc<str>,
        queue: mpsc::Sender<GossipMessage>,
    ) -> Result<(), SubscribeError> {
        self.sweep(gossip);
        let topic = IdentTopic::new(&**name);
        if self.topics.contains_key(&topic.hash()) {
            return Err(SubscribeError::Taken { topic: name.to_string() });
        }
        if self.topics.len() >= self.max_topics {
            return Err(SubscribeError::TooMany { limit: self.max_topics });
        }
        if let Err(error) = gossip.set_topic_params(topic.clone(), topic_score()) {
            tracing::warn!(%error, "topic goes without scoring");
        }
        // Subscribing can only fail by the filter on topics, which admits all that the protocol has, or by a full queue towards a peer,
        // which is told again at the next heartbeat.
        if let Err(error) = gossip.subscribe(&topic) {
            tracing::debug!(%error, topic = %name, "not every peer could be told of the subscription");
        }
        self.topics.insert(topic.hash(), (Arc::clone(name), queue));
        Ok(())
    }

    fn unsubscribe(&mut self, gossip: &mut Gossip, name: &str) {
        let topic = IdentTopic::new(name);
        if self.topics.remove(&topic.hash()).is_some() {
            gossip.unsubscribe(&topic);
        }
    }

    /// Unsubscribes from topics whose receiver is gone.
    fn sweep(&mut self, gossip: &mut Gossip) {
        self.topics.retain(|_, (name, queue)| {
            if queue.is_closed() {
                gossip.unsubscribe(&IdentTopic::new(&**name));
            }
            !queue.is_closed()
        });
    }

    pub(crate) fn on_event(&mut self, gossip: &mut Gossip, event: gossipsub::Event) {
        let gossipsub::Event::Message { propagation_source, message_id, message } = event else { return };
        let refused = match self.hand_over(propagation_source, &message_id, message) {
            Ok(()) => return,
            Err(reason) => reason,
        };
        self.count.inc([refused]);
        gossip.report_message_validation_result(&message_id, &propagation_source, MessageAcceptance::Ignore);
        if refused == "no-receiver" {
            self.sweep(gossip);
        }
    }

    fn hand_over(
        &mut self,
        source: libp2p::PeerId,
        id: &MessageId,
        message: gossipsub::Message,
    ) -> Result<(), &'static str> {
        let (topic, queue) = self.topics.get(&message.topic).ok_or("no-receiver")?;
        let from = peer_from_libp2p(&source).ok_or("no-receiver")?;
        // Take the place in the receiver's queue first: with it in hand, nothing can fail after the verdict's place.
        let place = match queue.try_reserve() {
            Ok(place) => place,
            Err(TrySendError::Full(())) => return Err("queue-full"),
            Err(TrySendError::Closed(())) => return Err("no-receiver"),
        };
        let verdict = self.verdicts.clone().try_reserve_owned().map_err(|_| "too-many-unjudged")?;
        place.send(GossipMessage {
            topic: Arc::clone(topic),
            data: message.data,
            from,
            id: id.clone(),
            source,
            verdict: Some(verdict),
        });
        Ok(())
    }

    pub(crate) fn on_verdict(&mut self, gossip: Option<&mut Gossip>, verdict: Verdict) {
        self.count.inc([match verdict.acceptance {
            MessageAcceptance::Accept => "accepted",
            MessageAcceptance::Reject => "rejected",
            MessageAcceptance::Ignore => "ignored",
        }]);
        if let Some(gossip) = gossip {
            gossip.report_message_validation_result(&verdict.id, &verdict.source, verdict.acceptance);
        }
    }
}

fn publish(gossip: &mut Gossip, topic: &str, data: Vec<u8>) -> Result<(), PublishError> {
    let len = data.len();
    match gossip.publish(IdentTopic::new(topic), data) {
        Ok(_) => Ok(()),
        Err(gossipsub::PublishError::Duplicate) => Err(PublishError::Duplicate),
        Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => Err(PublishError::NoPeers),
        Err(gossipsub::PublishError::AllQueuesFull(_)) => Err(PublishError::Busy),
        Err(gossipsub::PublishError::MessageTooLarge) => Err(PublishError::TooLarge { len }),
        // Only signing and transforming are left, and this node does neither.
        Err(error) => {
            tracing::warn!(%error, "gossip message not published");
            Err(PublishError::Busy)
        }
    }
}

/// A message is its topic and content: the same content published twice is one message.
fn message_id(topic: &str, data: &[u8]) -> MessageId {
    let mut input = Vec::with_capacity(topic.len() + data.len() + 8);
    input.extend_from_slice(&(topic.len() as u64).to_be_bytes());
    input.extend_from_slice(topic.as_bytes());
    input.extend_from_slice(data);
    MessageId::new(digest(&SHA256, &input).as_ref())
}

pub(crate) fn behaviour(config: &NodeConfig) -> Result<Gossip, StartError> {
    let setup = |reason: String| StartError::Setup { part: "gossip", reason };
    let settings = gossipsub::ConfigBuilder::default()
        .heartbeat_interval(config.gossip_heartbeat)
        .heartbeat_initial_delay(config.gossip_heartbeat)
        .validate_messages()
        .validation_mode(ValidationMode::Anonymous)
        .message_id_fn(|message: &gossipsub::Message| message_id(message.topic.as_str(), &message.data))
        .max_transmit_size(MAX_GOSSIP_BYTES + FRAMING)
        .duplicate_cache_time(config.gossip_memory)
        .unsubscribe_backoff(REJOIN_AFTER)
        .connection_handler_queue_len(SEND_QUEUE)
        // In the library all who are subscribed get what this node publishes, and for each that does not read it is kept. So
        // only the topic's mesh gets it, and whoever asks. What must arrive has another way.
        .flood_publish(false)
        .build()
        .map_err(|error| setup(error.to_string()))?;
    let filter = MaxCountSubscriptionFilter {
        filter: ShortTopics,
        max_subscribed_topics: config.limits.gossip_topics,
        max_subscriptions_per_request: config.limits.gossip_topics,
    };
    // No author, no signature: payloads are signed documents, and an author would only tell who sold or sent what.
    let mut gossip = Gossip::new_with_subscription_filter(MessageAuthenticity::Anonymous, settings, filter)
        .map_err(|error| setup(error.to_owned()))?;
    gossip.with_peer_score(peer_score(), score_thresholds()).map_err(setup)?;
    Ok(gossip)
}

/// Topics of a length that is of use.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShortTopics;

impl TopicSubscriptionFilter for ShortTopics {
    fn can_subscribe(&mut self, topic: &TopicHash) -> bool {
        topic.as_str().len() <= MAX_TOPIC_BYTES
    }
}

/// Only what a peer did counts, not where it sits: many honest seeders share an address behind one router. A node that
/// restarts joins all its topics again within their back-off, twice where two connections cross: that is forgiven.
fn peer_score() -> PeerScoreParams {
    PeerScoreParams {
        ip_colocation_factor_weight: 0.0,
        behaviour_penalty_threshold: REJOINS_FORGIVEN,
        ..PeerScoreParams::default()
    }
}

fn score_thresholds() -> PeerScoreThresholds {
    PeerScoreThresholds {
        gossip_threshold: -50.0,
        publish_threshold: -100.0,
        graylist_threshold: -200.0,
        ..PeerScoreThresholds::default()
    }
}

/// Invalid messages count by their square: one by mistake (-10) is forgiven, five within minutes (-250) put a peer
/// out of the mesh. Nothing makes up for them: in the library an hour in the mesh, or messages that were good, would. Slow or
/// few deliveries are not punished: topics may be silent for hours.
fn topic_score() -> TopicScoreParams {
    TopicScoreParams {
        topic_weight: 1.0,
        time_in_mesh_weight: 0.0,
        first_message_deliveries_weight: 0.0,
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        invalid_message_deliveries_weight: -10.0,
        invalid_message_deliveries_decay: 0.99,
        ..TopicScoreParams::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_of_the_protocol_is_admitted_and_a_long_one_is_not_kept() {
        let mut filter = ShortTopics;
        let mut admits = |topic: &str| filter.can_subscribe(&IdentTopic::new(topic).hash());
        let network = protocol::NetworkId::from_bytes([255; 32]);
        assert!(admits(&protocol::api::receipts_topic_of_shard(&network, u16::MAX)));
        assert!(admits(&"t".repeat(MAX_TOPIC_BYTES)) && !admits(&"t".repeat(MAX_TOPIC_BYTES + 1)));
    }
}
