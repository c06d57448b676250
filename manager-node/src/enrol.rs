//! How merchants and seeders get in: an invitation's token once, a certificate from then on. A peer that is enrolled
//! already gets its certificate again without any token, since it proved its key by connecting; and one that the database
//! does not know because it is a backup from before gets another for the certificate that it shows.

use protocol::certificate::{MerchantCert, SeederCert};
use protocol::trust::{Invitation, InvitedRole, JoinLine, KeyPurpose};
use protocol::{Digest, Nonce, PeerId, Refusal, RefusalCode, Signed};
use rand::RngExt;
use store::{StoreError, Txn, WriteTransaction};

use crate::audit;
use crate::context::{Context, now_ms};
use crate::tables::{INVITATIONS, InvitationRecord, MERCHANTS, MerchantRecord, SEEDERS, SeederRecord};

/// Invitations that may be open at once: an operator hands out a few, and old ones are dropped when they are over.
const MAX_INVITATIONS: u64 = 10_000;
/// Longest name of a participant, bytes.
pub(crate) const MAX_NAME: usize = 64;

/// Why there is no invitation.
#[derive(Debug, thiserror::Error)]
pub enum InviteError {
    /// Too many are open.
    #[error("{MAX_INVITATIONS} invitations are open; wait until some are used or over")]
    TooMany,
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is stored of a token: whoever reads the database cannot enrol with it.
fn token_digest(token: &Nonce) -> Digest {
    Digest::of("willcall 2026-11 invitation token", &[token.as_bytes()])
}

/// Makes an invitation for `uses` peers, good for `valid_ms`.
pub(crate) async fn invite(
    ctx: &Context,
    role: InvitedRole,
    uses: u32,
    valid_ms: u64,
) -> Result<(JoinLine, u64), InviteError> {
    let token = Nonce::from_bytes(rand::rng().random());
    let now = now_ms();
    let expires_at = now.saturating_add(valid_ms);
    let record = InvitationRecord { role, expires_at, uses_left: uses };
    ctx.db
        .write(move |txn| {
            if INVITATIONS.len(txn)? >= MAX_INVITATIONS {
                drop_expired(txn, now)?;
                if INVITATIONS.len(txn)? >= MAX_INVITATIONS {
                    return Err(InviteError::TooMany);
                }
            }
            Ok(INVITATIONS.put(txn, &token_digest(&token), &record)?)
        })
        .await?;
    Ok((ctx.invitation_line(Invitation { role, token }), expires_at))
}

fn drop_expired(txn: &WriteTransaction<'_>, now: u64) -> Result<(), StoreError> {
    let mut over = Vec::new();
    INVITATIONS.scan::<StoreError>(txn, .., |token, record| {
        if record.expires_at < now {
            over.push(token);
        }
        Ok(std::ops::ControlFlow::Continue(()))
    })?;
    over.iter().try_for_each(|token| INVITATIONS.delete(txn, token).map(drop))
}

/// Enrols a merchant.
pub(crate) async fn merchant(
    ctx: &Context,
    peer: PeerId,
    token: Nonce,
    name: String,
    held: Option<Signed<MerchantCert>>,
) -> Result<Signed<MerchantCert>, Refusal> {
    check_name(&name)?;
    not_revoked(ctx, &peer)?;
    let now = now_ms();
    let known = ctx.registry.merchant(&peer).map_err(Refused::from)?;
    let is_known = known.is_some();
    if let Some(record) = known
        && let Ok(cert) = record.cert.peek()
        && !cert.is_due(&record.cert.signer(), &ctx.trust(), now)
    {
        return Ok(record.cert);
    }
    let trust = ctx.trust();
    let again = held.is_some_and(|held| {
        ctx.revocations.with(|revoked| MerchantCert::check(&held, &peer, &trust, revoked, now)).is_ok()
    });
    if !again && !is_known {
        check_invitation(ctx, &token, InvitedRole::Merchant, now)?;
    }
    let document = MerchantCert {
        network: ctx.network(),
        merchant: peer,
        name: name.clone(),
        from: now,
        until: now.saturating_add(ctx.config.certificate_ms),
    };
    ctx.may_sign(KeyPurpose::Enrolment)?;
    let cert = ctx.keys.sign(KeyPurpose::Enrolment, &document);
    let answer = cert.clone();
    ctx.db
        .write(move |txn| {
            let record = match MERCHANTS.get(txn, &peer)? {
                Some(record) => MerchantRecord { cert: cert.clone(), name: name.clone(), ..record },
                None => {
                    if !again {
                        use_invitation(txn, &token, InvitedRole::Merchant, now)?;
                    }
                    MerchantRecord { cert: cert.clone(), name: name.clone(), credit_limit: None, enrolled_at: now }
                }
            };
            let how = if again { "enrolled by its certificate, or renewed" } else { "enrolled or renewed" };
            audit::note(txn, now, "merchant", peer, format!("{how}: {name}"))?;
            Ok::<_, Refused>(MERCHANTS.put(txn, &peer, &record)?)
        })
        .await?;
    tracing::info!(%peer, name = document.name, "merchant enrolled");
    Ok(answer)
}

/// Enrols a seeder.
pub(crate) async fn seeder(
    ctx: &Context,
    peer: PeerId,
    token: Nonce,
    name: String,
    capacity: u64,
    held: Option<Signed<SeederCert>>,
) -> Result<Signed<SeederCert>, Refusal> {
    check_name(&name)?;
    not_revoked(ctx, &peer)?;
    let now = now_ms();
    let known = ctx.registry.seeder(&peer).map_err(Refused::from)?;
    let is_known = known.is_some();
    if let Some(record) = known
        && let Ok(cert) = record.cert.peek()
        && !cert.is_due(&record.cert.signer(), &ctx.trust(), now)
    {
        return Ok(record.cert);
    }
    let trust = ctx.trust();
    let again = held.is_some_and(|held| {
        ctx.revocations.with(|revoked| SeederCert::check(&held, &peer, &trust, revoked, now)).is_ok()
    });
    if !again && !is_known {
        check_invitation(ctx, &token, InvitedRole::Seeder, now)?;
    }
    let document = SeederCert {
        network: ctx.network(),
        seeder: peer,
        name: name.clone(),
        capacity,
        from: now,
        until: now.saturating_add(ctx.config.certificate_ms),
    };
    ctx.may_sign(KeyPurpose::Enrolment)?;
    let cert = ctx.keys.sign(KeyPurpose::Enrolment, &document);
    let answer = cert.clone();
    ctx.db
        .write(move |txn| {
            let record = match SEEDERS.get(txn, &peer)? {
                Some(record) => SeederRecord { cert: cert.clone(), name: name.clone(), capacity, ..record },
                None => {
                    if !again {
                        use_invitation(txn, &token, InvitedRole::Seeder, now)?;
                    }
                    SeederRecord {
                        cert: cert.clone(),
                        name: name.clone(),
                        capacity,
                        addrs: Vec::new(),
                        free: 0,
                        deliveries: 0,
                        last_report: 0,
                        enrolled_at: now,
                    }
                }
            };
            let how = if again { "enrolled by its certificate, or renewed" } else { "enrolled or renewed" };
            audit::note(txn, now, "seeder", peer, format!("{how}: {name}"))?;
            Ok::<_, Refused>(SEEDERS.put(txn, &peer, &record)?)
        })
        .await?;
    tracing::info!(%peer, name = document.name, capacity, "seeder enrolled");
    Ok(answer)
}

fn check_name(name: &str) -> Result<(), Refusal> {
    if name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(Refusal::new(RefusalCode::Malformed, "a name is at most 64 bytes without control characters"));
    }
    Ok(())
}

fn not_revoked(ctx: &Context, peer: &PeerId) -> Result<(), Refusal> {
    match ctx.revocations.with(|revoked| revoked.has_peer(peer)) {
        true => Err(Refusal::new(RefusalCode::Revoked, "this peer's certificate was revoked")),
        false => Ok(()),
    }
}

/// Asked before anything is signed or written: anybody may ask with any token, and a write that fails makes all those that
/// wait with it be written again.
fn check_invitation(ctx: &Context, token: &Nonce, role: InvitedRole, now: u64) -> Result<(), Refused> {
    ctx.db.read(|txn| open_invitation(txn, token, role, now)).map(drop)
}

fn open_invitation(
    txn: &impl Txn,
    token: &Nonce,
    role: InvitedRole,
    now: u64,
) -> Result<(Digest, InvitationRecord), Refused> {
    // One answer for all of these: a guess learns nothing from it.
    let bad = || Refused(Refusal::new(RefusalCode::BadInvitation, "this invitation is unknown, used up or over"));
    let digest = token_digest(token);
    let record = INVITATIONS.get(txn, &digest)?.ok_or_else(bad)?;
    if record.role != role || record.expires_at < now || record.uses_left == 0 {
        return Err(bad());
    }
    Ok((digest, record))
}

fn use_invitation(txn: &WriteTransaction<'_>, token: &Nonce, role: InvitedRole, now: u64) -> Result<(), Refused> {
    let (digest, mut record) = open_invitation(txn, token, role, now)?;
    record.uses_left -= 1;
    match record.uses_left {
        0 => INVITATIONS.delete(txn, &digest).map(drop)?,
        _ => INVITATIONS.put(txn, &digest, &record)?,
    }
    Ok(())
}

/// A refusal out of a database closure: the database's own failures become `internal`.
#[derive(Debug)]
pub(crate) struct Refused(pub(crate) Refusal);

impl From<StoreError> for Refused {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "the database failed");
        Refused(Refusal::new(RefusalCode::Internal, "the manager's database failed; try again later").retry_after(5000))
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        refused.0
    }
}

impl Context {
    /// The record of a seeder that may take part now.
    ///
    /// # Errors
    /// `not-enrolled`, `revoked`, `expired`.
    pub(crate) fn enrolled_seeder(&self, peer: &PeerId, now: u64) -> Result<SeederRecord, Refusal> {
        let record = self.registry.seeder(peer).map_err(Refused::from)?;
        let record = record.ok_or_else(|| Refusal::new(RefusalCode::NotEnrolled, "this peer is no enrolled seeder"))?;
        let cert = record.cert.peek()?;
        self.check_certificate(peer, cert.from, cert.until, now)?;
        Ok(record)
    }

    /// The record of a merchant that may sell now.
    ///
    /// # Errors
    /// `not-enrolled`, `revoked`, `expired`.
    pub(crate) fn enrolled_merchant(&self, peer: &PeerId, now: u64) -> Result<MerchantRecord, Refusal> {
        let record = self.registry.merchant(peer).map_err(Refused::from)?;
        let record =
            record.ok_or_else(|| Refusal::new(RefusalCode::NotEnrolled, "this peer is no enrolled merchant"))?;
        let cert = record.cert.peek()?;
        self.check_certificate(peer, cert.from, cert.until, now)?;
        Ok(record)
    }

    fn check_certificate(&self, peer: &PeerId, from: u64, until: u64, now: u64) -> Result<(), Refusal> {
        not_revoked(self, peer)?;
        self.trust().check_time("certificate", from, until, now)
    }
}
