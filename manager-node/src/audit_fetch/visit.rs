//! One audit as the seeder sees it: a client comes, shows its ticket, takes the manifest and some runs of chunks,
//! acknowledges them and goes, as one does that fetches from several seeders at once.

use std::sync::Arc;
use std::time::Duration;

use delivery::Content;
use node::{Node, NodeConfig, NodeHandle, Protocol, ReachConfig, Stream, Supervisor, read_message, write_message};
use protocol::deliver::{ClientMessage, Credential, SeederMessage};
use protocol::fetching::{Session, SessionEvent, SessionTerms};
use protocol::manifest::{SEGMENT_CHUNKS, Segment};
use protocol::{ChunkSet, Keypair, PeerAddrs, PeerId, RefusalCode};
use rand::RngExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::errand::Errand;
use crate::context::{Context, now_ms};

/// As a client's: over a relay alone no goods come, which would be no word of the seeder.
const DELIVER: Protocol = Protocol::bulk(protocol::deliver::PROTOCOL);
/// For the whole visit.
const LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(2);
/// Chunks of a run: one around what was complained of, one anywhere.
const RUN: u32 = 8;
/// Bytes of one visit at most, so that large chunks make few.
const MOST_BYTES: u64 = 16 * 1024 * 1024;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// So many chunks were what they should be.
    Passed { chunks: u32 },
    /// In the place of this chunk came something else.
    Failed { chunk: u32 },
    /// It says that it does not hold this chunk. What that is worth is in the books.
    NotHeld { chunk: u32 },
    /// It could not be reached, or did not serve: no reason to judge it.
    NoWord(String),
}

impl Verdict {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Verdict::Passed { .. } => "passed",
            Verdict::Failed { .. } => "failed",
            Verdict::NotHeld { .. } => "not-held",
            Verdict::NoWord(_) => "no-word",
        }
    }
}

/// Looks at one seeder.
pub(super) async fn visit(ctx: &Arc<Context>, errand: &Errand, seeder: PeerId, chunk: Option<u32>) -> Verdict {
    let at = match ctx.registry.addresses(&seeder) {
        Ok(at) => at,
        Err(error) => return Verdict::NoWord(error.to_string()),
    };
    let Some(content) = ctx.content.get(&errand.signed.digest()) else {
        return Verdict::NoWord("the origin does not hold the content itself".to_owned());
    };
    let supervisor = Supervisor::new();
    let talk = async {
        let (node, stream) = Box::pin(open(&errand.client, &at, &supervisor)).await?;
        let visit = Visit { errand, at: &at, content: &content, network: ctx.network(), chunk };
        let verdict = Box::pin(visit.talk(stream)).await?;
        Ok::<_, String>((verdict, node))
    };
    let verdict = match tokio::time::timeout(LIMIT, talk).await {
        Ok(Ok((verdict, _node))) => verdict,
        Ok(Err(why)) => Verdict::NoWord(why),
        Err(_) => Verdict::NoWord("it took too long".to_owned()),
    };
    if let Err(error) = supervisor.shutdown(STOP_LIMIT).await {
        tracing::debug!(%error, "an auditing node did not stop in time");
    }
    verdict
}

/// Comes as a client does: where the seeder is behind a translation, through it.
async fn open(client: &Keypair, at: &PeerAddrs, supervisor: &Supervisor) -> Result<(NodeHandle, Stream), String> {
    let reach = ReachConfig { punch: true, ..ReachConfig::default() };
    let config = NodeConfig { gossip: false, reach, ..NodeConfig::new(client.clone()) };
    let node = Node::start(config, supervisor).await.map_err(|error| error.to_string())?;
    let stream = node.open(at, DELIVER, LIMIT).await.map_err(|error| error.to_string())?;
    Ok((node, stream))
}

struct Visit<'a> {
    errand: &'a Errand,
    at: &'a PeerAddrs,
    /// The content as it should be.
    content: &'a Arc<Content>,
    network: protocol::NetworkId,
    chunk: Option<u32>,
}

impl Visit<'_> {
    async fn talk(&self, mut stream: Stream) -> Result<Verdict, String> {
        let Errand { client, ticket, delivery, signed, manifest } = self.errand;
        let terms = SessionTerms {
            network: self.network,
            delivery: *delivery,
            manifest: signed.digest(),
            seeder: self.at.peer,
        };
        let mut session = Session::new(terms, None);
        let chosen = self.choose();
        let (mut wanted, mut passed) = (ChunkSet::new(), 0);
        // Of those that it is asked for.
        let mut lacking = None;
        loop {
            let message: Option<SeederMessage> = read_message(&mut stream).await.map_err(|e| e.to_string())?;
            let message = message.ok_or("it closed the stream")?;
            match session.message(message, &client.peer_id()).map_err(|error| error.to_string())? {
                SessionEvent::Greeted { .. } => {
                    let hello = session.hello(Credential::Ticket(Box::new(ticket.clone())), None);
                    say(&mut stream, &hello).await?;
                }
                SessionEvent::Welcomed { held, .. } => {
                    wanted = chosen.intersection(&held);
                    lacking = chosen.difference(&held).iter().next();
                    if wanted.is_empty() {
                        return Ok(Verdict::NotHeld { chunk: lacking.unwrap_or(0) });
                    }
                    // As every client that begins: first what the content is, then its chunks' values.
                    say(&mut stream, &ClientMessage::Meta { segment: None }).await?;
                    let mut asked = None;
                    for chunk in wanted.iter() {
                        let segment = Some(chunk / SEGMENT_CHUNKS);
                        if segment != asked {
                            say(&mut stream, &ClientMessage::Meta { segment }).await?;
                            asked = segment;
                        }
                    }
                    self.want(&mut stream, &mut session, &wanted).await?;
                }
                SessionEvent::Chunk { index, length } => {
                    let mut bytes = vec![0; usize::try_from(length.min(manifest.chunk_size)).unwrap_or(0)];
                    stream.read_exact(&mut bytes).await.map_err(|error| error.to_string())?;
                    if !self.is_right(index, bytes).await? {
                        return Ok(Verdict::Failed { chunk: index });
                    }
                    session.verified(index);
                    wanted.remove(index);
                    passed += 1;
                    if wanted.is_empty() {
                        let last = session.finish(client, None, now_ms());
                        say(&mut stream, &last).await?;
                    } else {
                        if session.ack_due()
                            && let Some(ack) = session.ack(client, now_ms())
                        {
                            say(&mut stream, &ClientMessage::Ack(ack)).await?;
                        }
                        self.want(&mut stream, &mut session, &wanted).await?;
                    }
                }
                SessionEvent::Window => self.want(&mut stream, &mut session, &wanted).await?,
                SessionEvent::Segment { index, segment } => {
                    if !self.is_segment(index, &segment) {
                        return Ok(Verdict::Failed { chunk: index.saturating_mul(SEGMENT_CHUNKS) });
                    }
                }
                SessionEvent::Manifest(_) | SessionEvent::Cancelled { .. } => {}
                SessionEvent::Refused(refusal) if refusal.code == RefusalCode::ContentNotHeld => {
                    let asked = wanted.iter().next().or_else(|| chosen.iter().next());
                    return Ok(Verdict::NotHeld { chunk: asked.unwrap_or(0) });
                }
                SessionEvent::Refused(refusal) => return Ok(Verdict::NoWord(refusal.to_string())),
                SessionEvent::Finished => {
                    // It may have gone already.
                    let _ = stream.shutdown().await;
                    return Ok(match lacking {
                        Some(chunk) => Verdict::NotHeld { chunk },
                        None => Verdict::Passed { chunks: passed },
                    });
                }
            }
        }
    }

    async fn want(&self, stream: &mut Stream, session: &mut Session, wanted: &ChunkSet) -> Result<(), String> {
        let open = wanted.difference(session.in_flight());
        let some: ChunkSet = open.iter().take(session.budget() as usize).collect();
        match session.want(&some).0 {
            Some(message) => say(stream, &message).await,
            None => Ok(()),
        }
    }

    /// A run around the chunk that was complained of, and one anywhere.
    fn choose(&self) -> ChunkSet {
        let manifest = &self.errand.manifest;
        let run = RUN.min(u32::try_from(MOST_BYTES / 2 / u64::from(manifest.chunk_size.max(1))).unwrap_or(RUN)).max(1);
        let mut chunks = ChunkSet::new();
        for start in self.chunk.into_iter().chain([rand::rng().random_range(0..manifest.chunks().max(1))]) {
            let end = start.saturating_add(run).min(manifest.chunks());
            if start < end {
                chunks.insert_range(start..end);
            }
        }
        chunks
    }

    /// Compared with what the origin has: the values of its own copy were checked against the manifest.
    async fn is_right(&self, index: u32, bytes: Vec<u8>) -> Result<bool, String> {
        let content = Arc::clone(self.content);
        let checked = tokio::task::spawn_blocking(move || {
            let value = content.chaining_value(index).map_err(|error| error.to_string())?;
            let value = value.ok_or("the origin lacks the chunk's value")?;
            Ok::<_, String>(content.manifest().verifies(index, &value, &bytes))
        });
        checked.await.map_err(|error| error.to_string())?
    }

    fn is_segment(&self, index: u32, segment: &Segment) -> bool {
        let wanted = usize::try_from(index).ok().and_then(|index| self.errand.manifest.segments.get(index));
        wanted == Some(&segment.digest())
    }
}

async fn say(stream: &mut Stream, message: &ClientMessage) -> Result<(), String> {
    write_message(stream, message).await.map_err(|error| error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use node::{AcceptLimits, DhtMode};
    use protocol::Address;

    use super::*;

    async fn start(seed: u8, supervisor: &Supervisor, edit: impl FnOnce(&mut NodeConfig)) -> NodeHandle {
        let mut config = NodeConfig::new(Keypair::from_seed(&[seed; 32]));
        config.listen = vec![Address::new("/ip4/127.0.0.1/tcp/0").unwrap()];
        edit(&mut config);
        Box::pin(Node::start(config, supervisor)).await.unwrap()
    }

    #[tokio::test]
    async fn a_seeder_to_which_only_a_relay_leads_is_visited_directly() {
        let supervisor = Supervisor::new();
        let relay = start(1, &supervisor, |config| config.reach.relay.enabled = true).await;
        let way = relay.peer_addrs().await.unwrap();
        let seeder = start(2, &supervisor, |config| {
            (config.bootstrap, config.dht) = (vec![way.clone()], DhtMode::Server);
            (config.reach.reserve, config.reach.punch) = (true, true);
        })
        .await;
        relay.add_member(seeder.peer_id()).await;
        seeder.connect(&way, LIMIT).await.unwrap();
        let mut accepted = seeder.accept(DELIVER, AcceptLimits { queue: 16, per_peer: 16 }).await.unwrap();
        let mut changes = seeder.reach_changes();
        let slotted = changes.wait_for(|reach| reach.slots.iter().any(|slot| !slot.addresses.is_empty()));
        let reach = tokio::time::timeout(LIMIT, slotted).await.unwrap().unwrap().clone();
        let at = PeerAddrs::new(seeder.peer_id(), reach.slots[0].addresses.clone());
        assert!(at.addrs[0].as_str().ends_with("/p2p-circuit"), "{at:?}");

        let client = Keypair::from_seed(&[3; 32]);
        let visiting = Box::pin(open(&client, &at, &supervisor));
        let (visited, taken) = tokio::join!(visiting, tokio::time::timeout(LIMIT, accepted.next()));
        let (_node, stream) = visited.unwrap();
        assert!(!stream.info().relayed && !taken.unwrap().unwrap().info().relayed, "no goods come over a relay");
        supervisor.shutdown(LIMIT).await.unwrap();
    }
}
