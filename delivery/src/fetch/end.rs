//! Every stream ends for a reason that has a name: it decides whether the seeder is tried again, and it is what people
//! are told when nothing comes.

use std::fmt;

use protocol::fetching::{Loss, SessionError};
use protocol::serving::FORGIVE_FIRST_MS;
use protocol::{Refusal, RefusalCode};

use crate::content_store::{FileError, WriteError};

/// A seeder whose certificate a void key signed is tried again after so long.
const OTHER_CERTIFICATE_MS: u64 = 5_000;

/// Why a stream to a seeder ended.
#[derive(Debug)]
pub(super) enum EndReason {
    /// It said all there is to say.
    Finished,
    /// Because of the fetch, not of the seeder.
    Stopped,
    /// To see what it holds by now.
    GreetAgain,
    Unreachable(String),
    /// Its machine answers, and nobody listens there.
    NotRunning(String),
    /// Only a relay leads to it, which carries no goods.
    RelayedOnly(String),
    Closed(String),
    /// It sent nothing for too long.
    Silent,
    Refused(Refusal),
    Certificate(Refusal),
    Violation(String),
    /// Its window is used up by chunks that never arrived. It lets a client in again after a while.
    WindowUsedUp,
    /// What it could still send is too scattered for one acknowledgement.
    Scattered,
    BadChunk(u32),
    BadMeta(Refusal),
    /// The manifest is the one named, and does not hold: no seeder can do better.
    Manifest(Refusal),
    Disk(WriteError),
}

impl EndReason {
    pub(super) fn loss(&self) -> Loss {
        match self {
            EndReason::Refused(refusal) => loss_of(refusal),
            EndReason::GreetAgain => Loss::ComeBack(1),
            EndReason::WindowUsedUp => Loss::ComeBack(FORGIVE_FIRST_MS),
            // It has not heard of its network's new keys yet, and gets another one when it has.
            EndReason::Certificate(refusal) if refusal.code == RefusalCode::KeyRetired => {
                Loss::ComeBack(OTHER_CERTIFICATE_MS)
            }
            EndReason::Certificate(_) | EndReason::Violation(_) | EndReason::Scattered => Loss::Useless,
            EndReason::BadChunk(_) | EndReason::BadMeta(_) => Loss::Banned,
            _ => Loss::Failed,
        }
    }

    /// Its certificate is by a key that is not known here.
    pub(super) fn is_newer(&self) -> bool {
        matches!(self, EndReason::Certificate(refusal) if refusal.code == RefusalCode::UnknownKey)
    }

    /// After it the seeder need not be given its last acknowledgement again: it has it, or will never take it.
    pub(super) fn takes_no_more(&self) -> bool {
        match self {
            EndReason::Finished | EndReason::Violation(_) => true,
            // With a lease that a living key signed it does.
            EndReason::Refused(refusal) if refusal.code == RefusalCode::KeyRetired => false,
            EndReason::Refused(_) => self.loss() == Loss::Useless,
            _ => false,
        }
    }

    /// The delivery was cut off here, for something that is not this client's fault: the seeder still hears what was verified.
    pub(super) fn takes_last_ack(&self) -> bool {
        use RefusalCode as C;
        let EndReason::Refused(refusal) = self else { return false };
        matches!(refusal.code, C::Revoked | C::KeyRetired | C::ContentNotHeld | C::NotEnrolled)
    }

    /// For a line that has several of them: what happened at each address is told elsewhere.
    pub(super) fn brief(&self) -> String {
        match self {
            EndReason::Unreachable(_) => "cannot be reached".to_owned(),
            EndReason::NotRunning(_) => "its machine answers, but it does not run there".to_owned(),
            other => other.to_string(),
        }
    }

    pub(super) fn refusal(&self) -> Option<&Refusal> {
        match self {
            EndReason::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            EndReason::Finished => f.write_str("finished"),
            EndReason::Stopped => f.write_str("stopped"),
            EndReason::GreetAgain => f.write_str("it holds nothing of what is missing"),
            EndReason::Unreachable(why)
            | EndReason::RelayedOnly(why)
            | EndReason::Closed(why)
            | EndReason::Violation(why) => f.write_str(why),
            EndReason::NotRunning(why) => write!(
                f,
                "its machine answers, but no connection with it comes about: it does not run there, or lets nobody in now ({why})"
            ),
            EndReason::Silent => f.write_str("it sent nothing for too long"),
            EndReason::Refused(refusal) => write!(f, "refused: {refusal}"),
            EndReason::Certificate(refusal) => write!(f, "its certificate does not hold: {refusal}"),
            EndReason::WindowUsedUp => f.write_str("its window is used up by chunks that never arrived"),
            EndReason::Scattered => f.write_str("what it could still send is too scattered to be acknowledged"),
            EndReason::BadChunk(chunk) => write!(f, "it sent something else as chunk {chunk}"),
            EndReason::BadMeta(refusal) => write!(f, "it sent wrong metadata: {refusal}"),
            EndReason::Manifest(refusal) => write!(f, "the manifest does not hold: {refusal}"),
            EndReason::Disk(error) => write!(f, "{error}"),
        }
    }
}

impl From<SessionError> for EndReason {
    fn from(error: SessionError) -> Self {
        EndReason::Violation(error.to_string())
    }
}

impl From<FileError> for EndReason {
    fn from(error: FileError) -> Self {
        EndReason::Disk(WriteError::Io(error))
    }
}

/// What a refusal says about: the credential itself would be refused by any honest seeder alike.
pub(super) fn is_about_credential(code: RefusalCode) -> bool {
    use RefusalCode as C;
    matches!(
        code,
        C::TooLarge
            | C::Malformed
            | C::UnsupportedVersion
            | C::WrongNetwork
            | C::WrongClient
            | C::NotYetValid
            | C::Expired
            | C::BadEndorsement
            | C::UnknownKey
            | C::KeyRetired
            | C::BadManagerSignature
            | C::Revoked
    )
}

/// Whether and when a seeder that refused is worth another try.
pub(super) fn loss_of(refusal: &Refusal) -> Loss {
    use RefusalCode as C;
    match refusal.code {
        C::Overloaded | C::ShuttingDown | C::StaleRevocations | C::LimitReached | C::Internal => {
            Loss::ComeBack(refusal.retry_after_ms)
        }
        C::WindowExceeded | C::BadAck | C::BadWant | C::Idle | C::Superseded => Loss::Failed,
        _ if refusal.retry_after_ms > 0 => Loss::ComeBack(refusal.retry_after_ms),
        _ => Loss::Useless,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_decides_whether_to_come_back() {
        for code in RefusalCode::ALL {
            let loss = loss_of(&Refusal::new(*code, ""));
            if is_about_credential(*code) {
                assert_eq!(loss, Loss::Useless, "{code}");
            }
        }
        let busy = || Refusal::new(RefusalCode::Overloaded, "").retry_after(70);
        assert_eq!(loss_of(&busy()), Loss::ComeBack(70));
        assert!(!EndReason::Refused(busy()).takes_no_more() && !EndReason::Closed(String::new()).takes_no_more());
        assert!(EndReason::Refused(Refusal::new(RefusalCode::Revoked, "")).takes_no_more());
        assert!(!EndReason::Refused(Refusal::new(RefusalCode::KeyRetired, "")).takes_no_more());
        assert_eq!(loss_of(&Refusal::new(RefusalCode::ContentNotHeld, "")), Loss::Useless);
        // Whatever a seeder cuts a running delivery off for: the ticket, its own certificate, or the content.
        for code in
            [RefusalCode::Revoked, RefusalCode::KeyRetired, RefusalCode::NotEnrolled, RefusalCode::ContentNotHeld]
        {
            assert!(EndReason::Refused(Refusal::new(code, "")).takes_last_ack(), "{code}");
        }
        assert!(!EndReason::Refused(busy()).takes_last_ack() && !EndReason::Closed(String::new()).takes_last_ack());
        let shown = |code| EndReason::Certificate(Refusal::new(code, ""));
        assert_eq!(shown(RefusalCode::KeyRetired).loss(), Loss::ComeBack(OTHER_CERTIFICATE_MS));
        assert_eq!(shown(RefusalCode::UnknownKey).loss(), Loss::Useless);
    }
}
