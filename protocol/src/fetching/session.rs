//! The conversation with one seeder: what may be asked for without losing the window to a broken connection, and which
//! chunks are acknowledged when. A chunk is acknowledged only to the seeder that sent it and only once it is verified
//! and written.

use crate::certificate::SeederCert;
use crate::deliver::{ClientMessage, Credential, SeederMessage};
use crate::ids::{Digest, NetworkId, PeerId};
use crate::keys::Keypair;
use crate::manifest::{Manifest, Segment};
use crate::ranges::ChunkSet;
use crate::receipt::{Ack, Completion, DeliveryId};
use crate::refusal::Refusal;
use crate::signed::Signed;

/// What is fetched, and from whom.
#[derive(Clone, Debug)]
pub struct SessionTerms {
    /// The network.
    pub network: NetworkId,
    /// What it is counted under.
    pub delivery: DeliveryId,
    /// Digest of the signed manifest.
    pub manifest: Digest,
    /// The peer that the connection proved.
    pub seeder: PeerId,
}

/// What a seeder did that it must not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// A message that does not belong here.
    #[error("the seeder sent {0}")]
    Unexpected(&'static str),
    /// The welcome is for something else.
    #[error("the seeder welcomed another delivery")]
    OtherDelivery,
    /// A chunk that was not asked for.
    #[error("the seeder sent chunk {0}, which was not asked for")]
    Unasked(u32),
}

/// What a message means to the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEvent {
    /// Check the certificate, then send the hello.
    Greeted {
        /// To be checked against the connection's peer.
        certificate: Box<Signed<SeederCert>>,
        /// The seeder's clock.
        now: u64,
    },
    /// Chunks may be asked for.
    Welcomed {
        /// What the seeder holds.
        held: ChunkSet,
        /// The newest acknowledgement of this client that the seeder has, where this client remembers less.
        ack: Option<Signed<Ack>>,
    },
    /// [`Session::budget`] changed.
    Window,
    /// The manifest, to be checked.
    Manifest(Box<Signed<Manifest>>),
    /// A segment, to be checked.
    Segment {
        /// Which one.
        index: u32,
        /// The values.
        segment: Segment,
    },
    /// So many bytes of a chunk follow on the stream.
    Chunk {
        /// Which one.
        index: u32,
        /// How many bytes.
        length: u32,
    },
    /// These were taken back and will not come.
    Cancelled {
        /// The chunks.
        chunks: ChunkSet,
    },
    /// The stream ends.
    Refused(Refusal),
    /// The final acknowledgement is durable with the seeder.
    Finished,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Greeting,
    Hello,
    Open,
    Closing,
}

/// The machine of one stream to one seeder.
#[derive(Debug)]
pub struct Session {
    terms: SessionTerms,
    phase: Phase,
    in_flight: ChunkSet,
    /// Of these in flight, what was taken back: it comes all the same, or the seeder says that it will not.
    taken_back: ChunkSet,
    /// Announced on this stream, not yet verified: they hold their places in the window.
    arriving: ChunkSet,
    /// Received from this seeder and verified, over all streams; a superset of `acked`.
    verified: ChunkSet,
    acked: ChunkSet,
    /// What the seeder says of its window.
    window: u32,
    /// Chunks that the seeder counts as sent, over all streams.
    sent: u32,
}

impl Session {
    /// A stream that was just opened. `before` is the newest acknowledgement made to this seeder, if one is remembered.
    pub fn new(terms: SessionTerms, before: Option<&Ack>) -> Self {
        let acked = before.map(|ack| ack.chunks.clone()).unwrap_or_default();
        Session {
            terms,
            phase: Phase::Greeting,
            in_flight: ChunkSet::new(),
            taken_back: ChunkSet::new(),
            arriving: ChunkSet::new(),
            verified: acked.clone(),
            acked,
            window: 0,
            sent: 0,
        }
    }

    /// Takes in a message from the seeder. `client` is this peer, whose acknowledgements the seeder may hold.
    ///
    /// # Errors
    /// [`SessionError`]: the stream is to be closed and the seeder to be marked.
    pub fn message(&mut self, message: SeederMessage, client: &PeerId) -> Result<SessionEvent, SessionError> {
        let unexpected = |what| Err(SessionError::Unexpected(what));
        match (message, &self.phase) {
            (SeederMessage::Refusal(refusal), _) => Ok(SessionEvent::Refused(refusal)),
            (SeederMessage::Greeting { certificate, now, .. }, Phase::Greeting) => {
                Ok(SessionEvent::Greeted { certificate: Box::new(certificate), now })
            }
            (SeederMessage::Greeting { .. }, _) => unexpected("a second greeting"),
            (SeederMessage::Welcome { delivery, held, ack, window, outstanding }, Phase::Hello) => {
                if delivery != self.terms.delivery {
                    return Err(SessionError::OtherDelivery);
                }
                let known = self.acked.len();
                let acknowledged = match &ack {
                    Some(ack) => self.remember(ack, client)?,
                    None => 0,
                };
                let ack = ack.filter(|_| acknowledged > known);
                self.window = window;
                self.sent = outstanding.saturating_add(acknowledged);
                self.phase = Phase::Open;
                Ok(SessionEvent::Welcomed { held, ack })
            }
            (SeederMessage::Welcome { .. }, _) => unexpected("a second welcome"),
            (_, Phase::Greeting | Phase::Hello) => unexpected("something before its welcome"),
            (SeederMessage::Window { window, .. }, _) => {
                self.window = window;
                Ok(SessionEvent::Window)
            }
            (SeederMessage::Manifest(manifest), _) => Ok(SessionEvent::Manifest(Box::new(manifest))),
            (SeederMessage::Segment { index, segment }, _) => Ok(SessionEvent::Segment { index, segment }),
            (SeederMessage::Cancelled { chunks }, _) => {
                let chunks = self.in_flight.intersection(&chunks);
                // One that asks to be asked, and then does not send, would be asked again for ever.
                if !self.taken_back.is_superset(&chunks) {
                    return unexpected("a cancellation of what was not taken back");
                }
                self.in_flight = self.in_flight.difference(&chunks);
                self.taken_back = self.taken_back.difference(&chunks);
                Ok(SessionEvent::Cancelled { chunks })
            }
            (SeederMessage::Chunk { index, length }, _) => {
                if self.in_flight.remove(index) {
                    self.taken_back.remove(index);
                    self.arriving.insert(index);
                    self.sent = self.sent.saturating_add(1);
                    Ok(SessionEvent::Chunk { index, length })
                } else {
                    Err(SessionError::Unasked(index))
                }
            }
            (SeederMessage::Finished, Phase::Closing) => Ok(SessionEvent::Finished),
            (SeederMessage::Finished, _) => unexpected("an end that was not asked for"),
        }
    }

    /// The seeder's copy of an acknowledgement is the basis of the next one, if this client really signed it. Returns
    /// how many chunks it names.
    fn remember(&mut self, ack: &Signed<Ack>, client: &PeerId) -> Result<u32, SessionError> {
        let terms = &self.terms;
        let ack = Ack::check(ack, client, &terms.network, terms.delivery, &terms.manifest, &terms.seeder)
            .map_err(|_| SessionError::Unexpected("an acknowledgement that this client did not sign"))?;
        self.acked = self.acked.union(&ack.chunks);
        self.verified = self.verified.union(&ack.chunks);
        Ok(ack.chunks.len())
    }

    /// The first message, once the greeting was checked.
    pub fn hello(&mut self, credential: Credential, last_ack: Option<Signed<Ack>>) -> ClientMessage {
        self.phase = Phase::Hello;
        ClientMessage::Hello { credential, last_ack }
    }

    /// The part of the window that chunks did not use up which were counted as sent and never came.
    fn usable(&self) -> u32 {
        let here = self.verified.len().saturating_add(self.arriving.len());
        self.window.saturating_sub(self.sent.saturating_sub(here))
    }

    /// Chunks that hold a place in the window: here but not acknowledged, or asked for.
    fn waiting(&self) -> u32 {
        self.verified.len().saturating_sub(self.acked.len()) + self.arriving.len() + self.in_flight.len()
    }

    /// How many more chunks may be asked for now. At most half of the window that is left is ever under way, so that a
    /// connection that breaks never costs the whole of it.
    pub fn budget(&self) -> u32 {
        if self.phase != Phase::Open {
            return 0;
        }
        let usable = self.usable();
        let cap = (usable / 2).max(usable.min(1));
        cap.saturating_sub(self.in_flight.len()).min(usable.saturating_sub(self.waiting()))
    }

    /// Asks for those of `chunks` that keep the set of this seeder's chunks within what an acknowledgement can name.
    /// Returns what was left out with the message.
    pub fn want(&mut self, chunks: &ChunkSet) -> (Option<ClientMessage>, ChunkSet) {
        let mut asked = ChunkSet::new();
        let mut left_out = ChunkSet::new();
        let mut all = self.verified.union(&self.in_flight).union(&self.arriving);
        for chunk in chunks.iter() {
            let before = all.range_count();
            all.insert(chunk);
            // One range of reserve: chunks under way may fail, and split a run.
            if all.range_count() > before && all.range_count() >= ChunkSet::MAX_RANGES {
                all.remove(chunk);
                left_out.insert(chunk);
            } else {
                asked.insert(chunk);
            }
        }
        if asked.is_empty() {
            return (None, left_out);
        }
        self.in_flight = self.in_flight.union(&asked);
        (Some(ClientMessage::Want { chunks: asked }), left_out)
    }

    /// Takes back what is asked for and no longer needed. It stays in flight until the seeder says that it will not come.
    pub fn cancel(&mut self, chunks: &ChunkSet) -> Option<ClientMessage> {
        let chunks = self.in_flight.intersection(chunks);
        self.taken_back = self.taken_back.union(&chunks);
        (!chunks.is_empty()).then_some(ClientMessage::Cancel { chunks })
    }

    /// A chunk from this seeder is verified and written. Also for chunks of an earlier stream, once the seeder's welcome
    /// is in: they were counted as sent and came.
    pub fn verified(&mut self, chunk: u32) {
        self.arriving.remove(chunk);
        self.verified.insert(chunk);
    }

    /// True when it is time to acknowledge: a quarter of the window waits, nothing is under way any more, or the window
    /// is what holds the seeder up.
    pub fn ack_due(&self) -> bool {
        let waiting = self.nameable().len().saturating_sub(self.acked.len());
        let blocked = self.waiting() >= self.usable();
        waiting > 0 && (self.in_flight.is_empty() || blocked || waiting >= (self.window / 4).max(1))
    }

    /// What the next acknowledgement names: everything verified, unless chunks that were cancelled left so many gaps
    /// that they pass what one can name. Then the rest waits until gaps are closed.
    fn nameable(&self) -> ChunkSet {
        if self.verified.range_count() <= ChunkSet::MAX_RANGES {
            return self.verified.clone();
        }
        let mut set = self.acked.clone();
        for range in self.verified.ranges() {
            let wider = set.union(&ChunkSet::from_range(range));
            if wider.range_count() <= ChunkSet::MAX_RANGES {
                set = wider;
            }
        }
        set
    }

    /// The acknowledgement of everything verified; `None` when there is nothing new.
    pub fn ack(&mut self, client: &Keypair, now: u64) -> Option<Signed<Ack>> {
        let chunks = self.nameable();
        if chunks == self.acked {
            return None;
        }
        self.acked = chunks;
        let ack = Ack {
            network: self.terms.network,
            delivery: self.terms.delivery,
            manifest: self.terms.manifest,
            seeder: self.terms.seeder,
            chunks: self.acked.clone(),
            at: now,
        };
        Some(Signed::sign(&ack, client))
    }

    /// The last message: everything verified is acknowledged, and the completion given where there is one.
    pub fn finish(&mut self, client: &Keypair, completion: Option<Signed<Completion>>, now: u64) -> ClientMessage {
        let ack = self.ack(client, now);
        self.phase = Phase::Closing;
        ClientMessage::Finish { ack, completion }
    }

    /// True when this seeder will send nothing more: its window is used up by chunks that never arrived.
    pub fn is_spent(&self) -> bool {
        self.phase == Phase::Open && self.usable() == 0 && !self.ack_due()
    }

    /// Chunks acknowledged to this seeder, by any stream so far.
    pub fn acked(&self) -> &ChunkSet {
        &self.acked
    }

    /// Chunks asked for and not yet here.
    pub fn in_flight(&self) -> &ChunkSet {
        &self.in_flight
    }

    /// May chunks be asked for?
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// What is fetched, and from whom.
    pub fn terms(&self) -> &SessionTerms {
        &self.terms
    }
}
