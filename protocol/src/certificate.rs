//! Enrolment: which merchants may sell and which seeders may serve. A seeder shows its certificate before it sees a
//! ticket; a merchant's is judged by the manager at release, and the lease vouches for it afterwards.

use bincode::{Decode, Encode};

use crate::document;
use crate::ids::{NetworkId, PeerId};
use crate::refusal::{Refusal, RefusalCode};
use crate::signed::Signed;
use crate::trust::{KeyPurpose, KeyState, RevocationState, Trust};

/// The right to sell, signed for enrolment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct MerchantCert {
    /// The network.
    pub network: NetworkId,
    /// The merchant.
    pub merchant: PeerId,
    /// A name for people, at most 64 bytes.
    pub name: String,
    /// Unix milliseconds; valid from here …
    pub from: u64,
    /// … until here.
    pub until: u64,
}

/// The right to serve, signed for enrolment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SeederCert {
    /// The network.
    pub network: NetworkId,
    /// The seeder.
    pub seeder: PeerId,
    /// A name for people, at most 64 bytes.
    pub name: String,
    /// Bytes of content that the manager may place there.
    pub capacity: u64,
    /// Unix milliseconds; valid from here …
    pub from: u64,
    /// … until here.
    pub until: u64,
}

document! {
    MerchantCert => MerchantCert, 512,
    SeederCert => SeederCert, 512,
}

impl SeederCert {
    /// Checks a certificate shown by the peer `shown_by`.
    ///
    /// # Errors
    /// `not-enrolled` for somebody else's certificate, `wrong-network`, `not-yet-valid`, `expired`, `revoked`, and those
    /// of [`Trust::open`].
    pub fn check(
        signed: &Signed<SeederCert>,
        shown_by: &PeerId,
        trust: &Trust,
        revoked: &RevocationState,
        now: u64,
    ) -> Result<SeederCert, Refusal> {
        let cert = trust.open(signed, KeyPurpose::Enrolment, |c| c.from, now)?;
        check_holder(cert.network, &cert.seeder, shown_by, trust, revoked)?;
        trust.check_time("certificate", cert.from, cert.until, now)?;
        Ok(cert)
    }

    /// Until when this certificate holds that `signer` signed: to its end, or for as long as that key's word counts. 0 where
    /// the key is void.
    pub fn holds_until(&self, signer: &PeerId, trust: &Trust) -> u64 {
        holds_until(self.from, self.until, signer, trust)
    }

    /// Is it time for another? It is in the last quarter of its time, and earlier where the key under it counts no longer.
    pub fn is_due(&self, signer: &PeerId, trust: &Trust, now: u64) -> bool {
        self.holds_until(signer, trust).saturating_sub(now) < self.until.saturating_sub(self.from) / 4
    }
}

impl MerchantCert {
    /// As [`SeederCert::holds_until`].
    pub fn holds_until(&self, signer: &PeerId, trust: &Trust) -> u64 {
        holds_until(self.from, self.until, signer, trust)
    }

    /// As [`SeederCert::is_due`].
    pub fn is_due(&self, signer: &PeerId, trust: &Trust, now: u64) -> bool {
        self.holds_until(signer, trust).saturating_sub(now) < self.until.saturating_sub(self.from) / 4
    }

    /// Checks a certificate shown by the peer `shown_by`; errors as [`SeederCert::check`].
    ///
    /// # Errors
    /// See [`SeederCert::check`].
    pub fn check(
        signed: &Signed<MerchantCert>,
        shown_by: &PeerId,
        trust: &Trust,
        revoked: &RevocationState,
        now: u64,
    ) -> Result<MerchantCert, Refusal> {
        let cert = trust.open(signed, KeyPurpose::Enrolment, |c| c.from, now)?;
        check_holder(cert.network, &cert.merchant, shown_by, trust, revoked)?;
        trust.check_time("certificate", cert.from, cert.until, now)?;
        Ok(cert)
    }
}

fn holds_until(from: u64, until: u64, signer: &PeerId, trust: &Trust) -> u64 {
    let keys = &trust.key_set().keys;
    let entry = keys.iter().find(|entry| entry.purpose == KeyPurpose::Enrolment && entry.key == *signer);
    match entry.map(|entry| entry.state) {
        Some(KeyState::Active) => until,
        Some(KeyState::Retiring { not_issued_after, dead_after }) if from <= not_issued_after => until.min(dead_after),
        _ => 0,
    }
}

fn check_holder(
    network: NetworkId,
    holder: &PeerId,
    shown_by: &PeerId,
    trust: &Trust,
    revoked: &RevocationState,
) -> Result<(), Refusal> {
    if network != trust.network() {
        return Err(Refusal::new(RefusalCode::WrongNetwork, "a certificate of another network"));
    }
    if holder != shown_by {
        return Err(Refusal::new(RefusalCode::NotEnrolled, "a certificate of another peer"));
    }
    if revoked.has_peer(holder) {
        return Err(Refusal::new(RefusalCode::Revoked, "this certificate was revoked"));
    }
    Ok(())
}
