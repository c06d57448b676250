//! What a seeder is told of its money: every receipt's fate and every unit of pay, period by period, in statements that
//! the manager signs and whose sums anybody can check again without asking it.

use std::collections::{BTreeMap, BTreeSet};

use bincode::{Decode, Encode};

use crate::amount::{Currency, MICROS};
use crate::document;
use crate::ids::{Digest, NetworkId, Nonce, PeerId, TransactionId};
use crate::receipt::DeliveryId;
use crate::refusal::RefusalCode;
use crate::settling::PARTS_PER_MICRO;
use crate::utc::Utc;
use crate::wire;

/// Parts (see [`crate::settling`]) in a minor unit.
pub const PARTS_PER_MINOR: u128 = MICROS as u128 * PARTS_PER_MICRO;

/// What became of a receipt.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub enum ReceiptFate {
    /// It said something new, and was counted.
    Accepted,
    /// It said nothing new.
    Duplicate,
    /// It names a delivery that the manager does not know: one that it never released, or, under a restore number other
    /// than 0, that it may have forgotten when it came back from a backup.
    Unknown,
    /// It does not count, and why.
    Rejected {
        /// The reason's name.
        code: RefusalCode,
        /// The reason, for people; at most [`ReceiptLine::MAX_REASON`] bytes.
        reason: String,
    },
}

impl ReceiptFate {
    /// The name in JSON and tables.
    pub const fn as_str(&self) -> &'static str {
        match self {
            ReceiptFate::Accepted => "accepted",
            ReceiptFate::Duplicate => "duplicate",
            ReceiptFate::Unknown => "unknown",
            ReceiptFate::Rejected { .. } => "rejected",
        }
    }
}

/// One receipt that came in.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct ReceiptLine {
    /// [`crate::receipt::Receipt::id`].
    pub receipt: Digest,
    /// What it is about; absent where the receipt does not even say that.
    pub delivery: Option<DeliveryId>,
    /// When it was taken, by the manager's clock, unix milliseconds.
    pub at: u64,
    /// Chunks that it names.
    pub chunks: u32,
    /// Chunks that were not known of this seeder before.
    pub new_chunks: u32,
    /// What became of it.
    pub fate: ReceiptFate,
}

impl ReceiptLine {
    /// Longest reason, bytes.
    pub const MAX_REASON: usize = 120;
}

/// The pay for one delivery, when it was closed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct EarningLine {
    /// Which.
    pub delivery: DeliveryId,
    /// When it was closed, unix milliseconds.
    pub at: u64,
    /// Bytes that are paid for.
    pub bytes: u64,
    /// Pay, in parts of [`PARTS_PER_MINOR`] to the minor unit.
    pub parts: u128,
    /// Of what.
    pub currency: Currency,
    /// Whole minor units that this line brought, with what was carried before it.
    pub credited: u64,
    /// All lines of the delivery together came to more than the lease's ceiling, and were scaled down to it.
    pub capped: bool,
}

/// Money that was paid out to the seeder.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct PaymentLine {
    /// Unix milliseconds.
    pub at: u64,
    /// Minor units.
    pub minor: u64,
    /// Of what.
    pub currency: Currency,
    /// Of the transfer; at most 128 bytes.
    pub reference: String,
}

/// How one currency's account went through the period.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct BalanceLine {
    /// Which.
    pub currency: Currency,
    /// Owed to the seeder before, minor units.
    pub before: u64,
    /// Fraction carried into the period, parts.
    pub carried_before: u128,
    /// Sum of the earnings, parts.
    pub earned: u128,
    /// Sum of what they credited, minor units.
    pub credited: u64,
    /// Sum of the payments, minor units.
    pub paid: u64,
    /// Owed after it, minor units.
    pub after: u64,
    /// Fraction carried out of it, parts; less than one minor unit.
    pub carried_after: u128,
}

/// How far an outbox is dealt with by this and all earlier statements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Covered {
    /// Which outbox.
    pub incarnation: Nonce,
    /// Every receipt of the batches up to this one is in a statement.
    pub number: u64,
}

/// Receipts that are only counted, because too many of them came in one period.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Unlisted {
    /// Duplicates.
    pub duplicate: u64,
    /// Unknown and rejected ones.
    pub rejected: u64,
}

/// One period of one seeder, signed by the manager.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Statement {
    /// The network.
    pub network: NetworkId,
    /// Whose.
    pub seeder: PeerId,
    /// 1 for the first, without gaps.
    pub number: u64,
    /// Digest of the signed statement before; absent in the first.
    pub previous: Option<Digest>,
    /// Of the period: the end of the one before, unix milliseconds …
    pub from: u64,
    /// … until.
    pub until: u64,
    /// When it was signed, unix milliseconds.
    pub issued_at: u64,
    /// The manager's restore number (see [`crate::trust::Heartbeat`]).
    pub restore: u64,
    /// Receipts, in the order in which they were taken.
    pub receipts: Vec<ReceiptLine>,
    /// Receipts without a line.
    pub unlisted: Unlisted,
    /// Pay.
    pub earnings: Vec<EarningLine>,
    /// Money paid out.
    pub payments: Vec<PaymentLine>,
    /// One line for each currency that the seeder ever earned.
    pub balances: Vec<BalanceLine>,
    /// Outboxes whose receipts are all dealt with; empty where more statements of the same moment follow.
    pub covered: Vec<Covered>,
}

impl Statement {
    /// Most lines of all kinds together: 1,024 of the longest fill half of the byte limit. What is more goes into the
    /// next statement.
    pub const MAX_LINES: usize = 1024;
    /// Most outboxes: what the manager keeps of one seeder.
    pub const MAX_COVERED: usize = 64;
    /// Most currencies of one seeder.
    pub const MAX_CURRENCIES: usize = 64;
}

document! { Statement => Statement, 384 * 1024; network }

/// Why a signed statement is wrong in itself, or does not follow from the one before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StatementError {
    /// Sums, limits or order.
    #[error("statement {number}: {what}")]
    Wrong {
        /// Which.
        number: u64,
        /// What does not hold.
        what: String,
    },
    /// It does not continue the chain.
    #[error("statement {number} does not follow from statement {after}: {what}")]
    NotNext {
        /// Which.
        number: u64,
        /// The one before.
        after: u64,
        /// What does not fit.
        what: &'static str,
    },
}

/// Totals, for people.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Totals {
    /// Receipts that counted.
    pub accepted: u64,
    /// Receipts that said nothing new.
    pub duplicate: u64,
    /// Earnings that were scaled down to a ceiling.
    pub capped: u64,
    /// Receipts about no known delivery.
    pub unknown: u64,
    /// Receipts that were refused for another reason, and those without a line.
    pub rejected: u64,
}

impl Statement {
    /// The totals of its lines.
    pub fn totals(&self) -> Totals {
        let mut totals =
            Totals { duplicate: self.unlisted.duplicate, rejected: self.unlisted.rejected, ..Totals::default() };
        for line in &self.receipts {
            match line.fate {
                ReceiptFate::Accepted => totals.accepted += 1,
                ReceiptFate::Duplicate => totals.duplicate += 1,
                ReceiptFate::Unknown => totals.unknown += 1,
                ReceiptFate::Rejected { .. } => totals.rejected += 1,
            }
        }
        totals.capped = self.earnings.iter().filter(|line| line.capped).count() as u64;
        totals
    }

    /// Does the arithmetic again: every balance must come out of the lines.
    ///
    /// # Errors
    /// [`StatementError::Wrong`] names the first thing that does not hold.
    pub fn check(&self) -> Result<(), StatementError> {
        let wrong = |what: String| StatementError::Wrong { number: self.number, what };
        let lines = self.receipts.len() + self.earnings.len() + self.payments.len();
        if lines > Self::MAX_LINES
            || self.covered.len() > Self::MAX_COVERED
            || self.balances.len() > Self::MAX_CURRENCIES
        {
            return Err(wrong("it has more lines than a statement may have".to_owned()));
        }
        if self.number == 0 || (self.number == 1) != self.previous.is_none() {
            return Err(wrong("its number and the statement that it names as the one before do not fit".to_owned()));
        }
        if self.from > self.until {
            return Err(wrong("its period ends before it begins".to_owned()));
        }
        let mut earned: BTreeMap<Currency, (u128, u128)> = BTreeMap::new();
        for line in &self.earnings {
            let sum = earned.entry(line.currency).or_default();
            sum.0 = sum.0.saturating_add(line.parts);
            sum.1 = sum.1.saturating_add(u128::from(line.credited));
        }
        let mut paid: BTreeMap<Currency, u128> = BTreeMap::new();
        for line in &self.payments {
            *paid.entry(line.currency).or_default() += u128::from(line.minor);
        }
        let mut seen = BTreeSet::new();
        for b in &self.balances {
            if !seen.insert(b.currency) {
                return Err(wrong(format!("two balances in {}", b.currency)));
            }
            let (parts, credited) = earned.remove(&b.currency).unwrap_or_default();
            let out = paid.remove(&b.currency).unwrap_or_default();
            if parts != b.earned || credited != u128::from(b.credited) || out != u128::from(b.paid) {
                return Err(wrong(format!("the lines in {} do not add up to its sums", b.currency)));
            }
            if u128::from(b.before) + u128::from(b.credited) != u128::from(b.after) + u128::from(b.paid) {
                return Err(wrong(format!("the balance in {} does not follow from its lines", b.currency)));
            }
            let credited = u128::from(b.credited) * PARTS_PER_MINOR;
            if b.carried_after >= PARTS_PER_MINOR
                || b.carried_before.checked_add(b.earned) != credited.checked_add(b.carried_after)
            {
                return Err(wrong(format!("the remainder in {} does not follow from its lines", b.currency)));
            }
        }
        match earned.keys().chain(paid.keys()).next() {
            Some(currency) => Err(wrong(format!("lines in {currency} have no balance"))),
            None => Ok(()),
        }
    }

    /// Is it the one after `before`, whose signed form has `digest`?
    ///
    /// # Errors
    /// [`StatementError::NotNext`].
    pub fn follows(&self, before: &Statement, digest: Digest) -> Result<(), StatementError> {
        let what = if (self.network, self.seeder) != (before.network, before.seeder) {
            "it is of another seeder or network"
        } else if Some(self.number) != before.number.checked_add(1) {
            "the numbers have a gap"
        } else if self.previous != Some(digest) {
            "it names another statement as the one before"
        } else if self.from != before.until {
            "the periods have a gap"
        } else if before.balances.iter().any(|old| {
            let new = self.balances.iter().find(|new| new.currency == old.currency);
            new.is_none_or(|new| (new.before, new.carried_before) != (old.after, old.carried_after))
        }) {
            "the balance before is not the balance after of the last"
        } else {
            return Ok(());
        };
        Err(StatementError::NotNext { number: self.number, after: before.number, what })
    }
}

/// The answer to "what became of this receipt".
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Explanation {
    /// What became of it when it first came.
    pub line: ReceiptLine,
    /// How often it came again.
    pub repeats: u64,
    /// Number of the statement that has it; absent while it is in none.
    pub statement: Option<u64>,
    /// The pay of its delivery for this seeder, once that was closed.
    pub earning: Option<EarningLine>,
    /// When the delivery is closed at the latest, where it is open, unix milliseconds.
    pub due_at: Option<u64>,
    /// When the manager came back from a backup, where the receipt came in after that, unix milliseconds: it may have
    /// forgotten the delivery.
    pub restored_at: Option<u64>,
}

wire! { Explanation => 2048 }

impl Explanation {
    /// One sentence for people.
    pub fn summary(&self) -> String {
        let mut text = match &self.line.fate {
            ReceiptFate::Accepted => format!("accepted: {} chunks were new", self.line.new_chunks),
            ReceiptFate::Duplicate => "duplicate: every chunk of it was known of this seeder before".to_owned(),
            ReceiptFate::Unknown => match self.restored_at {
                None => "unknown: the manager never released the delivery that it names".to_owned(),
                Some(at) => format!(
                    "unknown: the manager does not know the delivery that it names; it came back from a backup at {} \
                     and may have forgotten it",
                    Utc(at)
                ),
            },
            ReceiptFate::Rejected { code, reason } => format!("rejected: {code}: {reason}"),
        };
        match (&self.earning, self.due_at) {
            (Some(earning), _) => {
                let capped = if earning.capped { ", scaled down to the lease's ceiling" } else { "" };
                text.push_str(&format!(
                    "; the delivery was closed and {} bytes of this seeder were paid{capped}",
                    earning.bytes
                ));
            }
            (None, Some(_)) => text.push_str("; the delivery is still open and is paid when it is closed"),
            (None, None) => {}
        }
        match self.statement {
            Some(number) => text.push_str(&format!("; in statement {number}")),
            None => text.push_str("; not in a statement yet"),
        }
        text
    }

    /// The transaction that it is about.
    pub fn transaction(&self) -> Option<TransactionId> {
        self.line.delivery.map(|delivery| delivery.transaction)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn statement() -> Statement {
        let delivery = DeliveryId { transaction: TransactionId::from_bytes([1; 16]), delivery: 1 };
        let (one, two) = (PARTS_PER_MINOR + 5, PARTS_PER_MINOR - 5);
        let line = |parts, credited| EarningLine {
            delivery,
            at: 5,
            bytes: 9,
            parts,
            currency: Currency::USD,
            credited,
            capped: false,
        };
        Statement {
            network: NetworkId::from_bytes([2; 32]),
            seeder: PeerId::from_bytes([3; 32]),
            number: 1,
            previous: None,
            from: 1,
            until: 10,
            issued_at: 10,
            restore: 0,
            receipts: Vec::new(),
            unlisted: Unlisted::default(),
            earnings: vec![line(one, 1), line(two, 1)],
            payments: vec![PaymentLine { at: 7, minor: 1, currency: Currency::USD, reference: "r".into() }],
            balances: vec![BalanceLine {
                currency: Currency::USD,
                before: 0,
                carried_before: 0,
                earned: one + two,
                credited: 2,
                paid: 1,
                after: 1,
                carried_after: 0,
            }],
            covered: Vec::new(),
        }
    }

    #[test]
    fn sums_are_done_again_and_each_wrong_one_is_named() {
        assert_eq!(statement().check(), Ok(()));
        let broken = |change: &dyn Fn(&mut Statement)| {
            let mut statement = statement();
            change(&mut statement);
            statement.check().unwrap_err().to_string()
        };
        assert!(broken(&|s| s.earnings[0].parts += 1).contains("do not add up"));
        assert!(broken(&|s| s.payments[0].minor += 1).contains("do not add up"));
        assert!(broken(&|s| s.balances[0].after += 1).contains("does not follow"));
        assert!(broken(&|s| s.balances[0].carried_after += 1).contains("remainder"));
        assert!(broken(&|s| s.balances.clear()).contains("no balance"));
        assert!(broken(&|s| s.number = 2).contains("number"));
        assert!(broken(&|s| s.until = 0).contains("period"));
        assert!(broken(&|s| s.balances.push(s.balances[0])).contains("two balances"));
    }

    #[test]
    fn statements_follow_each_other_without_gaps() {
        let (first, digest) = (statement(), Digest::from_bytes([9; 32]));
        let mut second = statement();
        second.number = 2;
        second.previous = Some(digest);
        (second.from, second.until) = (10, 20);
        second.earnings.clear();
        second.payments.clear();
        second.balances[0] = BalanceLine { before: 1, earned: 0, credited: 0, paid: 0, after: 1, ..second.balances[0] };
        assert_eq!(second.check(), Ok(()));
        assert_eq!(second.follows(&first, digest), Ok(()));
        let why = |change: &dyn Fn(&mut Statement)| {
            let mut changed = second.clone();
            change(&mut changed);
            changed.follows(&first, digest).unwrap_err().to_string()
        };
        assert!(why(&|s| s.number = 3).contains("gap"));
        assert!(why(&|s| s.previous = None).contains("another statement"));
        assert!(why(&|s| s.from = 11).contains("periods"));
        assert!(why(&|s| s.balances[0].before = 0).contains("balance before"));
        assert!(why(&|s| s.seeder = PeerId::from_bytes([4; 32])).contains("another seeder"));
    }
}
