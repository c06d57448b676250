//! What the peers that had the purchase signed to have received: each for itself.

use std::collections::BTreeMap;

use super::{Check, text};
use crate::evidence::report::{Claimant, Received, SeederShare};
use crate::ids::PeerId;
use crate::ranges::ChunkSet;
use crate::receipt::{Ack, Completion, DeliveryId};
use crate::settling::Layout;
use crate::signed::{Document, Signed};
use crate::ticket::Lease;
use crate::utc::Utc;

impl Check<'_> {
    /// What is known of one peer.
    fn received(&mut self, client: PeerId) -> &mut Received {
        match client == self.data.client {
            true => &mut self.facts.received,
            false => self.facts.others.entry(client).or_default(),
        }
    }

    /// Whose signature counts for a delivery: the client of a lease for it. Where none is in the file (a renewal takes the
    /// place of a lease, and of many there is no room), everybody whom the file proves to have had the purchase: each of
    /// them speaks for itself alone.
    fn clients(&self, leases: &[Lease], delivery: u32) -> Vec<PeerId> {
        let of_it: Vec<PeerId> = leases.iter().filter(|l| l.delivery == delivery).map(|l| l.client).collect();
        if !of_it.is_empty() {
            return of_it;
        }
        let leased = leases.iter().map(|lease| lease.client);
        let given = self.facts.moved.iter().map(|moved| moved.to);
        [self.data.client].into_iter().chain(leased).chain(given).collect()
    }

    /// Whose signature a document about a delivery has to have: its signer's, if that one counts.
    fn client<T: Document>(&self, signed: &Signed<T>, leases: &[Lease], delivery: u32) -> PeerId {
        let clients = self.clients(leases, delivery);
        let counts = clients.contains(&signed.signer()).then(|| signed.signer());
        counts.or(clients.first().copied()).unwrap_or(self.data.client)
    }

    /// Who says so, where it is not the designated client.
    fn instead(&self, client: &PeerId, leases: &[Lease]) -> String {
        match client {
            _ if *client == self.data.client => String::new(),
            _ if leases.iter().any(|lease| lease.client == *client) => {
                format!(", says {client}, whom a lease names instead of the designated client")
            }
            _ => format!(", says {client}, to whom it was given"),
        }
    }

    pub(super) fn acks(&mut self, leases: &[Lease], layout: Option<Layout>) {
        let network = self.network();
        let mut union: BTreeMap<(PeerId, u32), ChunkSet> = BTreeMap::new();
        let mut shares: BTreeMap<(u32, PeerId, PeerId), (ChunkSet, u64)> = BTreeMap::new();
        for (number, signed) in self.pack.acks.iter().enumerate() {
            let found = signed.peek().map_err(|e| e.to_string()).and_then(|ack| {
                let delivery = DeliveryId { transaction: self.data.transaction, delivery: ack.delivery.delivery };
                let client = self.client(signed, leases, delivery.delivery);
                let found = Ack::check(signed, &client, &network, delivery, &self.data.manifest, &ack.seeder);
                if layout.is_some_and(|layout| ack.chunks.end() > layout.chunks()) {
                    return Err("it names chunks that the content does not have".to_owned());
                }
                let who = self.instead(&client, leases);
                found.map(|ack| (ack, client, who)).map_err(|refusal| text(&refusal))
            });
            let bytes = |ack: &Ack| layout.map(|layout| layout.bytes(&ack.chunks));
            let claim = |found: Option<&(Ack, PeerId, String)>| match found {
                Some((ack, _, who)) => format!(
                    "{} chunks{} of delivery {} came from seeder {} by {}{who}",
                    ack.chunks.len(),
                    bytes(ack).map_or_else(String::new, |bytes| format!(" ({bytes} bytes)")),
                    ack.delivery.delivery,
                    ack.seeder,
                    Utc(ack.at)
                ),
                None => "an acknowledgement".to_owned(),
            };
            let section = format!("acknowledgement {}", number + 1);
            if let Some((ack, client, _)) = self.lines.add(Claimant::ClientSigned, &section, claim, found) {
                let received = self.received(client);
                received.last_acknowledged_at = received.last_acknowledged_at.max(Some(ack.at));
                let all = union.entry((client, ack.delivery.delivery)).or_default();
                *all = all.union(&ack.chunks);
                // An older one of the same seeder adds nothing to it.
                let share = shares.entry((ack.delivery.delivery, ack.seeder, client)).or_default();
                *share = (share.0.union(&ack.chunks), share.1.max(ack.at));
            }
        }
        self.facts.seeders = shares
            .into_iter()
            .map(|((delivery, seeder, client), (chunks, at))| SeederShare {
                seeder,
                client,
                delivery,
                chunks: chunks.len(),
                bytes: layout.map(|layout| layout.bytes(&chunks)),
                at,
            })
            .collect();
        // Of several downloads the one that came furthest says how much a peer had.
        for ((client, _), chunks) in union {
            let bytes = layout.map(|layout| layout.bytes(&chunks));
            let received = self.received(client);
            received.acknowledged_bytes = received.acknowledged_bytes.max(bytes);
        }
    }

    pub(super) fn completions(&mut self, leases: &[Lease]) {
        let network = self.network();
        for (number, signed) in self.pack.completions.iter().enumerate() {
            let found = signed.peek().map_err(|e| e.to_string()).and_then(|completion| {
                let id = DeliveryId { transaction: self.data.transaction, delivery: completion.delivery.delivery };
                let client = self.client(signed, leases, id.delivery);
                let found = Completion::check(signed, &client, &network, id, &self.data.manifest);
                let who = self.instead(&client, leases);
                found.map(|completion| (completion, client, who)).map_err(|refusal| text(&refusal))
            });
            let claim = |found: Option<&(Completion, PeerId, String)>| match found {
                Some((c, _, who)) => {
                    format!("all of delivery {} was received and verified by {}{who}", c.delivery.delivery, Utc(c.at))
                }
                None => "a completion".to_owned(),
            };
            let section = format!("completion {}", number + 1);
            if let Some((c, client, _)) = self.lines.add(Claimant::ClientSigned, &section, claim, found) {
                let completed = &mut self.received(client).completed_at;
                *completed = Some(completed.map_or(c.at, |before| before.min(c.at)));
            }
        }
    }
}
