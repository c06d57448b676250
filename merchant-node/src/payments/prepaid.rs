//! Vouchers: money paid beforehand, kept as a balance behind a code. The store holds a keyed digest of each code, with
//! the key outside of the store, so that neither the file nor a backup of it can be spent.

use std::collections::BTreeSet;
use std::ops::Bound;

use bincode::{Decode, Encode};
use futures::FutureExt;
use protocol::{Amount, Currency, Digest, Keypair, wire};
use store::{Db, Step, StoreError, Table, Txn, WriteTransaction};

use super::{AuthorisationId, PaymentError, PaymentFuture, PaymentProvider, VoucherCode};

/// Vouchers in one store: far more than a shop hands out, and a bound on its size (about 300 MiB).
const MAX_VOUCHERS: u64 = 1_000_000;
/// Vouchers in one call: one disk flush, one answer that fits a line of the control socket.
const MAX_BATCH: u32 = 1_000;

const VOUCHERS: Table<Digest, Voucher> = Table::new("prepaid.vouchers");
const HOLDS: Table<AuthorisationId, Hold> = Table::new("prepaid.holds");
/// Every movement, by voucher and its running number; as many as there are authorisations, times three.
const MOVEMENTS: Table<(Digest, u64), Movement> = Table::new("prepaid.movements");

/// A voucher's money, in minor units: issued = available + held + spent.
#[derive(Clone, Debug, Encode, Decode)]
struct Voucher {
    currency: Currency,
    issued: u64,
    available: u64,
    held: u64,
    spent: u64,
    issued_at: u64,
    movements: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
enum HoldState {
    Held,
    Captured,
    Voided,
    Refunded,
}

/// One authorisation. Voided before it was made, it has no voucher.
#[derive(Clone, Debug, Encode, Decode)]
struct Hold {
    voucher: Option<Digest>,
    minor: u64,
    state: HoldState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
enum MovementKind {
    Issued,
    Held,
    Captured,
    Voided,
    Refunded,
}

/// One line of a voucher's account.
#[derive(Clone, Debug, Encode, Decode)]
struct Movement {
    at: u64,
    kind: MovementKind,
    minor: u64,
    authorisation: Option<AuthorisationId>,
    available: u64,
}

wire! {
    Voucher => 128,
    Hold => 96,
    Movement => 128,
}

/// What an operator sees of a voucher; the code is not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VoucherInfo {
    /// Digest of the code: how the voucher is named in lists.
    pub id: Digest,
    /// What it was issued with.
    pub issued: Amount,
    /// What can be spent, minor units.
    pub available: u64,
    /// What is held for orders under way, minor units.
    pub held: u64,
    /// What was taken, minor units.
    pub spent: u64,
    /// Unix milliseconds.
    pub issued_at: u64,
}

/// Why no vouchers were issued.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// Not a number of vouchers that is issued at once.
    #[error("1 to {max} vouchers can be issued at once, not {0}", max = MAX_BATCH)]
    Count(u32),
    /// Too much, or nothing.
    #[error("a voucher is worth 1 to {max} minor units, not {0}", max = Amount::MAX_MINOR)]
    Amount(u64),
    /// The store's bound.
    #[error("there are {} vouchers already, no more are kept", MAX_VOUCHERS)]
    Full,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The prepaid provider.
#[derive(Clone)]
pub struct Prepaid {
    db: Db,
    key: [u8; 32],
}

impl std::fmt::Debug for Prepaid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Prepaid")
    }
}

impl Prepaid {
    /// The provider over `db`. The digests of codes are keyed with a key derived from the node's own.
    pub fn new(db: Db, keypair: &Keypair) -> Self {
        let key = blake3::derive_key("willcall 2026-11 prepaid voucher digests", keypair.seed().as_ref());
        Prepaid { db, key }
    }

    fn digest(&self, code: &VoucherCode) -> Digest {
        Digest::from_bytes(*blake3::keyed_hash(&self.key, code.as_bytes()).as_bytes())
    }

    /// Issues `count` vouchers worth `amount` each. The codes are in the answer and nowhere else.
    ///
    /// # Errors
    /// [`IssueError`]; none is issued then.
    pub async fn issue(&self, amount: Amount, count: u32, now: u64) -> Result<Vec<VoucherCode>, IssueError> {
        if count == 0 || count > MAX_BATCH {
            return Err(IssueError::Count(count));
        }
        if amount.minor == 0 || amount.minor > Amount::MAX_MINOR {
            return Err(IssueError::Amount(amount.minor));
        }
        let codes: Vec<_> = (0..count).map(|_| VoucherCode::from_bytes(rand::random())).collect();
        let digests: BTreeSet<_> = codes.iter().map(|code| self.digest(code)).collect();
        self.db
            .write(move |txn| {
                if VOUCHERS.len(txn)? + u64::from(count) > MAX_VOUCHERS {
                    return Err(IssueError::Full);
                }
                for digest in &digests {
                    let mut voucher = Voucher {
                        currency: amount.currency,
                        issued: amount.minor,
                        available: amount.minor,
                        held: 0,
                        spent: 0,
                        issued_at: now,
                        movements: 0,
                    };
                    note(txn, digest, &mut voucher, MovementKind::Issued, amount.minor, None, now)?;
                }
                Ok(())
            })
            .await?;
        Ok(codes)
    }

    /// At most `limit` vouchers after the given one, by their digests.
    ///
    /// # Errors
    /// The store's.
    pub fn list(&self, after: Option<Digest>, limit: usize) -> Result<Vec<VoucherInfo>, StoreError> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let rows = self.db.read(|txn| VOUCHERS.range(txn, (from, Bound::Unbounded), limit))?;
        let info = |(id, v): (Digest, Voucher)| VoucherInfo {
            id,
            issued: Amount { minor: v.issued, currency: v.currency },
            available: v.available,
            held: v.held,
            spent: v.spent,
            issued_at: v.issued_at,
        };
        Ok(rows.into_iter().map(info).collect())
    }

    /// Number of vouchers.
    ///
    /// # Errors
    /// The store's.
    pub fn count(&self) -> Result<u64, StoreError> {
        self.db.read(|txn| VOUCHERS.len(txn))
    }

    /// Runs a change of one authorisation.
    async fn change<F>(&self, step: Step, change: F) -> Result<(), PaymentError>
    where
        F: Fn(&WriteTransaction<'_>) -> Result<(), Trouble> + Send + 'static,
    {
        self.db.write_step(step, change).await.map_err(Trouble::into_payment)
    }
}

/// An error inside of a transaction.
enum Trouble {
    Store(StoreError),
    Payment(PaymentError),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Trouble::Store(error)
    }
}

impl From<PaymentError> for Trouble {
    fn from(error: PaymentError) -> Self {
        Trouble::Payment(error)
    }
}

impl Trouble {
    fn into_payment(self) -> PaymentError {
        match self {
            Trouble::Store(error) => PaymentError::Unavailable(error.to_string()),
            Trouble::Payment(error) => error,
        }
    }
}

fn note(
    txn: &WriteTransaction<'_>,
    id: &Digest,
    voucher: &mut Voucher,
    kind: MovementKind,
    minor: u64,
    authorisation: Option<AuthorisationId>,
    at: u64,
) -> Result<(), StoreError> {
    let movement = Movement { at, kind, minor, authorisation, available: voucher.available };
    MOVEMENTS.put(txn, &(*id, voucher.movements), &movement)?;
    voucher.movements += 1;
    VOUCHERS.put(txn, id, voucher)
}

/// The voucher, if it has what is asked.
fn solvent(txn: &impl Txn, id: &Digest, amount: Amount) -> Result<Voucher, Trouble> {
    let declined = |text: String| Trouble::Payment(PaymentError::Declined(text));
    let voucher = VOUCHERS.get(txn, id)?.ok_or_else(|| declined("there is no such voucher".to_owned()))?;
    if voucher.currency != amount.currency {
        return Err(declined(format!("the voucher is in {}, the price in {}", voucher.currency, amount.currency)));
    }
    if voucher.available < amount.minor {
        let show = |minor| Amount { minor, currency: amount.currency };
        let short = show(amount.minor - voucher.available);
        let what = if voucher.available == 0 {
            "the voucher is spent".to_owned()
        } else {
            format!("the voucher's balance is {}", show(voucher.available))
        };
        return Err(declined(format!("{what}: short by {short}")));
    }
    Ok(voucher)
}

/// The voucher of a hold. Holds and vouchers are written together and vouchers are never deleted.
fn voucher_of(txn: &WriteTransaction<'_>, hold: &Hold) -> Result<(Digest, Voucher), Trouble> {
    let missing = || PaymentError::WrongState("the voucher of this payment is gone".to_owned());
    let id = hold.voucher.ok_or_else(missing)?;
    let voucher = VOUCHERS.get(txn, &id)?.ok_or_else(missing)?;
    Ok((id, voucher))
}

fn broken() -> Trouble {
    Trouble::Payment(PaymentError::WrongState("the voucher's balances do not add up".to_owned()))
}

fn take(from: &mut u64, minor: u64) -> Result<(), Trouble> {
    *from = from.checked_sub(minor).ok_or_else(broken)?;
    Ok(())
}

impl PaymentProvider for Prepaid {
    fn name(&self) -> &'static str {
        "prepaid"
    }

    fn reference(&self, token: &str) -> Result<String, PaymentError> {
        let code: VoucherCode = token.parse().map_err(|e: super::CodeError| PaymentError::Declined(e.to_string()))?;
        Ok(self.digest(&code).to_string())
    }

    fn check<'a>(&'a self, reference: &'a str, amount: Amount) -> PaymentFuture<'a, ()> {
        let looked = parse(reference)
            .and_then(|id| self.db.read(|txn| solvent(txn, &id, amount).map(drop)).map_err(Trouble::into_payment));
        futures::future::ready(looked).boxed()
    }

    fn authorise<'a>(
        &'a self,
        id: AuthorisationId,
        reference: &'a str,
        amount: Amount,
        now: u64,
    ) -> PaymentFuture<'a, ()> {
        async move {
            let digest = parse(reference)?;
            self.change(Step::MerchantHold, move |txn| {
                if let Some(hold) = HOLDS.get(txn, &id)? {
                    let same = hold.voucher == Some(digest) && hold.minor == amount.minor;
                    return match hold.state {
                        HoldState::Held | HoldState::Captured if same => Ok(()),
                        HoldState::Held | HoldState::Captured => {
                            Err(PaymentError::WrongState("this payment was made with other data".to_owned()).into())
                        }
                        HoldState::Voided | HoldState::Refunded => {
                            Err(PaymentError::Declined("this payment was taken back".to_owned()).into())
                        }
                    };
                }
                let mut voucher = solvent(txn, &digest, amount)?;
                take(&mut voucher.available, amount.minor)?;
                voucher.held = voucher.held.checked_add(amount.minor).ok_or_else(broken)?;
                note(txn, &digest, &mut voucher, MovementKind::Held, amount.minor, Some(id), now)?;
                HOLDS.put(txn, &id, &Hold { voucher: Some(digest), minor: amount.minor, state: HoldState::Held })?;
                Ok(())
            })
            .await
        }
        .boxed()
    }

    fn capture(&self, id: AuthorisationId, now: u64) -> PaymentFuture<'_, ()> {
        self.change(Step::MerchantCapture, move |txn| {
            let nothing = || PaymentError::WrongState("there is nothing held for this payment".to_owned());
            let mut hold = HOLDS.get(txn, &id)?.ok_or_else(nothing)?;
            match hold.state {
                HoldState::Captured => return Ok(()),
                HoldState::Held => {}
                HoldState::Voided | HoldState::Refunded => return Err(nothing().into()),
            }
            let (digest, mut voucher) = voucher_of(txn, &hold)?;
            take(&mut voucher.held, hold.minor)?;
            voucher.spent = voucher.spent.checked_add(hold.minor).ok_or_else(broken)?;
            note(txn, &digest, &mut voucher, MovementKind::Captured, hold.minor, Some(id), now)?;
            hold.state = HoldState::Captured;
            Ok(HOLDS.put(txn, &id, &hold)?)
        })
        .boxed()
    }

    fn void(&self, id: AuthorisationId, now: u64) -> PaymentFuture<'_, ()> {
        self.change(Step::MerchantVoid, move |txn| {
            let Some(mut hold) = HOLDS.get(txn, &id)? else {
                let never = Hold { voucher: None, minor: 0, state: HoldState::Voided };
                return Ok(HOLDS.put(txn, &id, &never)?);
            };
            match hold.state {
                HoldState::Voided | HoldState::Refunded => return Ok(()),
                HoldState::Captured => return Err(PaymentError::Captured.into()),
                HoldState::Held => {}
            }
            let (digest, mut voucher) = voucher_of(txn, &hold)?;
            take(&mut voucher.held, hold.minor)?;
            voucher.available = voucher.available.checked_add(hold.minor).ok_or_else(broken)?;
            note(txn, &digest, &mut voucher, MovementKind::Voided, hold.minor, Some(id), now)?;
            hold.state = HoldState::Voided;
            Ok(HOLDS.put(txn, &id, &hold)?)
        })
        .boxed()
    }

    fn refund(&self, id: AuthorisationId, now: u64) -> PaymentFuture<'_, ()> {
        self.change(Step::MerchantRefund, move |txn| {
            let nothing = || PaymentError::WrongState("nothing was taken for this payment".to_owned());
            let mut hold = HOLDS.get(txn, &id)?.ok_or_else(nothing)?;
            match hold.state {
                HoldState::Refunded => return Ok(()),
                HoldState::Captured => {}
                HoldState::Held | HoldState::Voided => return Err(nothing().into()),
            }
            let (digest, mut voucher) = voucher_of(txn, &hold)?;
            take(&mut voucher.spent, hold.minor)?;
            voucher.available = voucher.available.checked_add(hold.minor).ok_or_else(broken)?;
            note(txn, &digest, &mut voucher, MovementKind::Refunded, hold.minor, Some(id), now)?;
            hold.state = HoldState::Refunded;
            Ok(HOLDS.put(txn, &id, &hold)?)
        })
        .boxed()
    }
}

fn parse(reference: &str) -> Result<Digest, PaymentError> {
    reference.parse().map_err(|_| PaymentError::Declined("there is no such voucher".to_owned()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use proptest::prelude::*;
    use protocol::Nonce;
    use store::Options;

    use super::*;

    fn usd(minor: u64) -> Amount {
        Amount { minor, currency: Currency::USD }
    }

    fn provider(dir: &tempfile::TempDir) -> Prepaid {
        let db = Db::open(dir.path().join("m.redb"), Options::new(1)).unwrap();
        Prepaid::new(db, &Keypair::from_seed(&[1; 32]))
    }

    #[tokio::test]
    async fn each_step_is_taken_once_however_often_it_is_asked() {
        let dir = tempfile::tempdir().unwrap();
        let prepaid = provider(&dir);
        let code = prepaid.issue(usd(1000), 1, 1).await.unwrap().remove(0);
        let reference = prepaid.reference(&code.to_string()).unwrap();
        let (a, b, never) = (Nonce::from_bytes([1; 16]), Nonce::from_bytes([2; 16]), Nonce::from_bytes([3; 16]));
        let state = || {
            let v = prepaid.list(None, 10).unwrap().remove(0);
            (v.available, v.held, v.spent)
        };
        for _ in 0..2 {
            prepaid.authorise(a, &reference, usd(600), 2).await.unwrap();
            assert_eq!(state(), (400, 600, 0));
        }
        let short = prepaid.authorise(b, &reference, usd(999), 2).await.unwrap_err();
        assert_eq!(short.to_string(), "the voucher's balance is 4.00 USD: short by 5.99 USD");
        let other = prepaid.authorise(a, &reference, usd(1), 2).await.unwrap_err();
        assert!(matches!(other, PaymentError::WrongState(_)));
        for _ in 0..2 {
            prepaid.capture(a, 3).await.unwrap();
            assert_eq!(state(), (400, 0, 600));
        }
        assert_eq!(prepaid.void(a, 3).await, Err(PaymentError::Captured));
        for _ in 0..2 {
            prepaid.refund(a, 4).await.unwrap();
            assert_eq!(state(), (1000, 0, 0));
        }
        prepaid.authorise(b, &reference, usd(1000), 5).await.unwrap();
        let spent = prepaid.check(&reference, usd(1)).await.unwrap_err();
        assert_eq!(spent.to_string(), "the voucher is spent: short by 0.01 USD");
        prepaid.void(b, 6).await.unwrap();
        prepaid.void(b, 6).await.unwrap();
        assert_eq!(state(), (1000, 0, 0));
        prepaid.void(never, 7).await.unwrap();
        assert!(matches!(prepaid.authorise(never, &reference, usd(1), 8).await, Err(PaymentError::Declined(_))));
        assert!(matches!(prepaid.capture(never, 8).await, Err(PaymentError::WrongState(_))));
    }

    #[tokio::test]
    async fn the_file_holds_no_code_and_another_node_cannot_spend_it() {
        let dir = tempfile::tempdir().unwrap();
        let prepaid = provider(&dir);
        let codes = prepaid.issue(usd(5), 50, 1).await.unwrap();
        let thief = Prepaid::new(prepaid.db.clone(), &Keypair::from_seed(&[2; 32]));
        let reference = thief.reference(&codes[0].to_string()).unwrap();
        assert!(thief.check(&reference, usd(1)).await.is_err());
        drop(thief);
        drop(prepaid);
        let bytes = std::fs::read(dir.path().join("m.redb")).unwrap();
        for code in &codes {
            let text = code.to_string();
            assert!(!bytes.windows(16).any(|w| w == code.as_bytes()));
            assert!(!bytes.windows(text.len()).any(|w| w == text.as_bytes()));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        // Whatever is asked at once, a voucher's parts add up to what it was issued with, and no more is ever held
        // or spent than it had.
        #[test]
        fn no_overdraft(
            balance in 1u64..2_000,
            wants in proptest::collection::vec((0u64..800, 0u8..4), 1..24),
        ) {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).build().unwrap();
            runtime.block_on(async {
                let dir = tempfile::tempdir().unwrap();
                let prepaid = provider(&dir);
                let code = prepaid.issue(usd(balance), 1, 1).await.unwrap().remove(0);
                let reference = prepaid.reference(&code.to_string()).unwrap();
                let tasks = wants.iter().enumerate().map(|(i, (minor, then))| {
                    let (prepaid, reference, minor, then) = (prepaid.clone(), reference.clone(), *minor, *then);
                    let id = Nonce::from_bytes([u8::try_from(i).unwrap(); 16]);
                    tokio::spawn(async move {
                        if prepaid.authorise(id, &reference, usd(minor), 2).await.is_err() {
                            return 0;
                        }
                        match then {
                            0 => { prepaid.capture(id, 3).await.unwrap(); minor }
                            1 => { prepaid.void(id, 3).await.unwrap(); 0 }
                            2 => {
                                prepaid.capture(id, 3).await.unwrap();
                                prepaid.refund(id, 4).await.unwrap();
                                0
                            }
                            _ => minor,
                        }
                    })
                });
                let tasks: Vec<_> = tasks.collect();
                let mut kept = 0;
                for task in tasks {
                    kept += task.await.unwrap();
                }
                let v = prepaid.list(None, 1).unwrap().remove(0);
                assert!(kept <= balance);
                assert_eq!((v.available, v.held + v.spent), (balance - kept, kept));
            });
        }
    }
}
