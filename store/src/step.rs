//! The durable steps of a sale, by name: the moments that divide what a crash may undo from what it may not. Code names
//! the step where it takes it; a test has the process killed at each, before it is on disk and right after.

use std::path::PathBuf;
use std::sync::OnceLock;

/// For tests only: an environment variable that names a file. A process that comes to the side of a step that stands
/// in this file (`manager.reserve before`) takes the file away and kills itself as `kill -9` does. Without the variable
/// a step costs one look at a variable in memory.
pub const CRASH_FILE: &str = "WILLCALL_TEST_CRASH_FILE";

macro_rules! steps {
    ($($(#[doc = $doc:literal])+ $step:ident = $name:literal,)+) => {
        /// A durable step of purchase, release, delivery, receipt or settlement.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Step {
            $($(#[doc = $doc])+ $step,)+
        }

        impl Step {
            /// All of them, in the order of a sale.
            pub const ALL: &'static [Step] = &[$(Step::$step,)+];

            /// Its name: the role, and what is on disk afterwards.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Step::$step => $name,)+
                }
            }
        }
    };
}

steps! {
    /// The buyer's idempotency key, before the shop is asked.
    ClientAttempt = "client.attempt",
    /// An order and the key that it was made under.
    MerchantOrder = "merchant.order",
    /// The buyer's money is held.
    MerchantHold = "merchant.hold",
    /// The order says that it is.
    MerchantAuthorised = "merchant.authorised",
    /// Transaction data are formed.
    ManagerReserve = "manager.reserve",
    /// They came, and the endorsement is signed.
    MerchantReserved = "merchant.reserved",
    /// The lease is signed, the sale in the books where its policy says so.
    ManagerRelease = "manager.release",
    /// The ticket came.
    MerchantReleased = "merchant.released",
    /// The payment waits for the client's completion.
    MerchantAwaiting = "merchant.awaiting",
    /// The client completed.
    MerchantCompleted = "merchant.completed",
    /// The held money is taken.
    MerchantCapture = "merchant.capture",
    /// Nothing is left to do for an order.
    MerchantDone = "merchant.done",
    /// What the buyer is told under the idempotency key.
    MerchantAnswer = "merchant.answer",
    /// A ticket is in the client's library.
    ClientTicket = "client.ticket",
    /// The buyer was told what was bought: the same command is another purchase from here on.
    ClientBought = "client.bought",
    /// A content's folder is in its place.
    ContentMade = "content.made",
    /// Where in the product's files each chunk belongs is known, for a client that has the key.
    ClientLaidOut = "client.laid-out",
    /// Chunks are noted as held.
    ContentNoted = "content.noted",
    /// A content is whole.
    ContentWhole = "content.whole",
    /// What a seeder is about to send to somebody who has acknowledged nothing yet.
    SeederNoted = "seeder.noted",
    /// A client's acknowledgement, with the note that a receipt is due for it.
    SeederAcknowledged = "seeder.acknowledged",
    /// The account of a stream that ended.
    SeederClosed = "seeder.closed",
    /// The client's signed word that all of it is here.
    ClientFetched = "client.fetched",
    /// The manager took a completion, and the sale into the books.
    ManagerComplete = "manager.complete",
    /// The key, sealed to a client that completed.
    ManagerGrant = "manager.grant",
    /// The key came.
    ClientKey = "client.key",
    /// Decrypted files are whole and flushed, out of sight.
    ClientUnpacked = "client.unpacked",
    /// Which files are about to get their names.
    ClientPlacing = "client.placing",
    /// What stood in the way of one of them has another name.
    ClientKeptAside = "client.kept-aside",
    /// One of them has its name, in a folder that was there before.
    ClientMerged = "client.merged",
    /// The product has its name.
    ClientPlaced = "client.placed",
    /// The library says so.
    ClientDone = "client.done",
    /// A numbered batch of receipts.
    SeederBatch = "seeder.batch",
    /// A batch is counted, paid for, and safe.
    ManagerCount = "manager.count",
    /// The manager's mark that it is.
    SeederMark = "seeder.mark",
    /// A new lease, for this delivery or a further one.
    ManagerRenew = "manager.renew",
    /// A delivery whose time is over is closed and paid.
    ManagerClose = "manager.close",
    /// A reservation expired.
    ManagerExpire = "manager.expire",
    /// A sale is taken back in the books.
    ManagerRefund = "manager.refund",
    /// What was taken back stands in a revocation epoch.
    ManagerRevocation = "manager.revocation",
    /// And is not waiting to be put into one any more.
    ManagerAnnounced = "manager.announced",
    /// An order is about to be refunded.
    MerchantRefunding = "merchant.refunding",
    /// An order's money is about to go back.
    MerchantVoiding = "merchant.voiding",
    /// Held money is let go.
    MerchantVoid = "merchant.void",
    /// Taken money is given back.
    MerchantRefund = "merchant.refund",
    /// An order came to nothing, or was refunded.
    MerchantEnded = "merchant.ended",
    /// A seeder's statement of account.
    ManagerStatement = "manager.statement",
    /// It came.
    SeederStatement = "seeder.statement",
    /// Money that moved outside is in the books.
    ManagerPayment = "manager.payment",
    /// After a restore: marked batches are to be sent again.
    SeederRestored = "seeder.restored",
}

impl Step {
    /// To be called when the step is made and not yet on disk.
    pub fn before(self) {
        self.crash_if_told("before");
    }

    /// To be called when the step is on disk and nobody has been told.
    pub fn after(self) {
        self.crash_if_told("after");
    }

    fn crash_if_told(self, side: &str) {
        static FILE: OnceLock<Option<PathBuf>> = OnceLock::new();
        let Some(file) = FILE.get_or_init(|| std::env::var_os(CRASH_FILE).map(PathBuf::from)) else { return };
        let told = std::fs::read_to_string(file).unwrap_or_default();
        if told.trim() == format!("{} {side}", self.name()) && std::fs::remove_file(file).is_ok() {
            // No destructor, no flush, no other thread gets a chance.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_say_the_role() {
        let names: std::collections::BTreeSet<_> = Step::ALL.iter().map(|step| step.name()).collect();
        assert_eq!(names.len(), Step::ALL.len());
        let roles = ["manager", "merchant", "seeder", "client", "content"];
        assert!(names.iter().all(|name| name.split_once('.').is_some_and(|(role, _)| roles.contains(&role))));
    }
}
