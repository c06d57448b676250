//! What becomes of a price: how much goes to rights holders and the network, how much is set aside for delivery, and
//! what is left to the merchant; in one place, because release, refund and evidence must all come to the same figures.

use bincode::{Decode, Encode};
use protocol::amount::MICROS;
use protocol::settling::PARTS_PER_MICRO;
use protocol::{Amount, Currency, PeerId, TransactionId};

use super::{Account, LedgerError, Posting};
use crate::pricing::{ceiling_micros, part_of};

/// What the parts of a price are computed from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms<'a> {
    /// What was paid.
    pub(crate) price: Amount,
    /// Rights holders and their parts, millionths of the price.
    pub(crate) shares: &'a [(String, u32)],
    /// The network's part, millionths of the price.
    pub(crate) fee_millionths: u32,
    /// What seeders are to earn: millionths of the minor unit per MiB.
    pub(crate) rate: u64,
    /// Bytes of ciphertext.
    pub(crate) content_bytes: u64,
    /// Room above the plain cost: millionths of it.
    pub(crate) slack_millionths: u32,
}

/// The parts of one price; they add up to it exactly.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct Split {
    /// What was paid.
    pub(crate) price: Amount,
    /// To each rights holder, minor units, rounded down.
    pub(crate) rights: Vec<(String, u64)>,
    /// To the network, minor units, rounded down.
    pub(crate) fee: u64,
    /// Set aside for delivery, minor units: the ceiling rounded up.
    pub(crate) escrow: u64,
    /// The rest, to the merchant, minor units.
    pub(crate) merchant: u64,
    /// What seeders earn: as asked for, or less where the price leaves no room.
    pub(crate) rate: u64,
    /// Most that seeders earn together, millionths of the minor unit.
    pub(crate) ceiling: u64,
}

impl Split {
    /// Splits a price of at most [`Amount::MAX_MINOR`].
    pub(crate) fn of(terms: &Terms<'_>) -> Split {
        let mut left = terms.price.minor;
        let mut take = |millionths: u32| {
            let part = part_of(terms.price, millionths).min(left);
            left -= part;
            part
        };
        let rights = terms.shares.iter().map(|(name, millionths)| (name.clone(), take(*millionths))).collect();
        let fee = take(terms.fee_millionths);
        let (rate, ceiling) = ceiling(terms, left);
        let escrow = ceiling.div_ceil(MICROS);
        Split { price: terms.price, rights, fee, escrow, merchant: left.saturating_sub(escrow), rate, ceiling }
    }

    fn currency(&self) -> Currency {
        self.price.currency
    }

    /// The posting that takes the sale into the books.
    pub(crate) fn capture(
        &self,
        transaction: TransactionId,
        merchant: PeerId,
        at: u64,
    ) -> Result<Posting, LedgerError> {
        let memo = format!("sale for {}", self.price);
        let mut posting = Posting::new(format!("capture:{transaction}"), at, Some(transaction), memo);
        let currency = self.currency();
        posting.debit(Account::MerchantDue(merchant), self.price.minor, currency)?;
        for (name, minor) in &self.rights {
            posting.credit(Account::RightsHolder(name.clone()), *minor, currency)?;
        }
        posting.credit(Account::NetworkFee, self.fee, currency)?;
        posting.credit(Account::Escrow(transaction), self.escrow, currency)?;
        posting.credit(Account::MerchantEarned(merchant), self.merchant, currency)?;
        Ok(posting)
    }

    /// The posting that takes it out again: everything but `kept`, which went from the escrow to seeders and stays the
    /// merchant's cost, or is all of the escrow while the delivery is still counted.
    pub(crate) fn refund(
        &self,
        transaction: TransactionId,
        merchant: PeerId,
        kept: u64,
        at: u64,
    ) -> Result<Posting, LedgerError> {
        let memo = format!("refund of {}", self.price);
        let mut posting = Posting::new(format!("refund:{transaction}"), at, Some(transaction), memo);
        let currency = self.currency();
        for (name, minor) in &self.rights {
            posting.debit(Account::RightsHolder(name.clone()), *minor, currency)?;
        }
        posting.debit(Account::NetworkFee, self.fee, currency)?;
        let merchants = self.merchant.saturating_add(self.escrow.saturating_sub(kept));
        posting.debit(Account::MerchantEarned(merchant), merchants, currency)?;
        posting.credit(Account::MerchantDue(merchant), self.price.minor.saturating_sub(kept), currency)?;
        Ok(posting)
    }

    /// The posting that completes a refund whose delivery was closed after it, for `charged`: what the closing left of
    /// the escrow to the merchant as earned goes against what the merchant owes, too.
    pub(crate) fn refund_rest(
        &self,
        transaction: TransactionId,
        merchant: PeerId,
        charged: u64,
        at: u64,
    ) -> Result<Posting, LedgerError> {
        let memo = "refund of what the delivery left";
        let mut posting = Posting::new(format!("refund-rest:{transaction}"), at, Some(transaction), memo);
        let rest = self.escrow.saturating_sub(charged);
        posting.debit(Account::MerchantEarned(merchant), rest, self.currency())?;
        posting.credit(Account::MerchantDue(merchant), rest, self.currency())?;
        Ok(posting)
    }
}

/// Rate and ceiling of a delivery that at most `left` minor units may be spent on.
fn ceiling(terms: &Terms<'_>, left: u64) -> (u64, u64) {
    let (bytes, slack) = (terms.content_bytes.max(1), terms.slack_millionths);
    let wanted = ceiling_micros(terms.rate, bytes, slack);
    let most = left.saturating_mul(MICROS);
    if wanted <= most {
        return (terms.rate, wanted);
    }
    let micros = u128::from(MICROS);
    let rate = u128::from(most) * PARTS_PER_MICRO / u128::from(bytes) * micros / (micros + u128::from(slack));
    (u64::try_from(rate).unwrap_or(u64::MAX).min(terms.rate), most)
}
