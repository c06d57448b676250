//! When those who say that they do not get through to an address are believed, whether somebody did before or not: nobody
//! tries again for an hour, or for as long as others get through elsewhere.

use libp2p::PeerId;

/// Peers that do not get through, one after the other, before it is believed: one may be wrong, or short of time.
pub(super) const NOES: usize = 2;
/// And tests where it is always the same one: there may be no other.
pub(super) const NOES_OF_ONE: usize = 4;

/// Who did not get through since somebody did.
#[derive(Debug, Default)]
pub(super) struct Noes(Vec<PeerId>);

impl Noes {
    /// Another one. True when it is believed; whoever gets through after that begins anew.
    pub(super) fn add(&mut self, peer: PeerId) -> bool {
        self.0.push(peer);
        let others = self.0.iter().filter(|other| self.0.first() != Some(other)).count();
        if others + 1 < NOES && self.0.len() < NOES_OF_ONE {
            return false;
        }
        self.0.clear();
        true
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
