//! What every member of the mesh checks of a batch before it passes it on: all alike, so that nobody blames a neighbour
//! for what that one could not know.

use super::{GossipedBatch, receipts_topic};
use crate::certificate::SeederCert;
use crate::ids::PeerId;
use crate::refusal::{Refusal, RefusalCode};
use crate::trust::{KeyPurpose, RevocationState, Trust};

impl GossipedBatch {
    /// May its sender publish it on `topic`? Gives the sender. What is sealed in it, and whether it follows the one before,
    /// only the manager can tell.
    ///
    /// # Errors
    /// Those of [`SeederCert::check`]; `unknown-key` too where it is sealed to a key that is not known here, `malformed` on
    /// another seeder's topic, `bad-receipt`, `wrong-network`.
    pub fn check(&self, topic: &str, trust: &Trust, revoked: &RevocationState, now: u64) -> Result<PeerId, Refusal> {
        let sender = self.batch.signer();
        let cert = SeederCert::check(&self.certificate, &sender, trust, revoked, now)?;
        let keys = trust.key_set();
        if *topic != *receipts_topic(&trust.network(), &sender, keys.gossip_shards) {
            return Err(Refusal::new(RefusalCode::Malformed, "a batch on another seeder's topic"));
        }
        let batch = self.batch.verify(&cert.seeder).map_err(|error| error.refusal(RefusalCode::BadReceipt))?;
        if batch.network != trust.network() {
            return Err(Refusal::new(RefusalCode::WrongNetwork, "a batch of another network"));
        }
        if batch.seeder != sender {
            return Err(Refusal::new(RefusalCode::BadReceipt, "the batch names another seeder than its signer"));
        }
        let sealing = |purpose| purpose == KeyPurpose::ReceiptSealing;
        if !keys.keys.iter().any(|entry| sealing(entry.purpose) && entry.key == batch.sealed_to) {
            let detail = format!("key set version {} holds no key that the batch is sealed to", keys.version);
            return Err(Refusal::new(RefusalCode::UnknownKey, detail));
        }
        Ok(sender)
    }
}

/// Should whoever passed something on in the mesh have known that it is refused so? Not where it may have heard of other
/// keys or revocations than the one who judges, or has another clock.
pub fn is_to_blame(code: RefusalCode) -> bool {
    use RefusalCode as C;
    !matches!(code, C::UnknownKey | C::KeyRetired | C::Revoked | C::Expired | C::NotYetValid)
}
