//! The manager's books, added up once more from outside: every posting sums to zero, and so does everything.

use std::collections::BTreeMap;

use serde_json::Value;

/// What the books say.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct Books {
    /// Postings read.
    pub postings: usize,
    /// Sum of all debits, minor units.
    pub debits: u64,
    /// Sum of all credits, minor units.
    pub credits: u64,
    /// Balance of each account, minor units; debit is positive.
    pub accounts: BTreeMap<String, i64>,
}

impl Books {
    /// Reads the answer to the manager's command `ledger`.
    ///
    /// # Errors
    /// What does not add up, for people.
    pub fn read(ledger: &Value) -> Result<Books, String> {
        let rows = |value: &Value, name: &str| value.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
        let mut books = Books::default();
        for posting in rows(ledger, "postings") {
            books.postings += 1;
            let mut sum = 0i64;
            for entry in rows(&posting, "entries") {
                let minor = entry.get("minor").and_then(Value::as_i64).ok_or("an entry without an amount")?;
                let account = entry.get("account").and_then(Value::as_str).ok_or("an entry without an account")?;
                sum += minor;
                *books.accounts.entry(account.to_owned()).or_default() += minor;
                match minor > 0 {
                    true => books.debits += minor.unsigned_abs(),
                    false => books.credits += minor.unsigned_abs(),
                }
            }
            if sum != 0 {
                return Err(format!("a posting sums to {sum} and not to zero: {posting}"));
            }
        }
        for line in rows(ledger, "trial_balance") {
            if line.get("balanced") != Some(&Value::Bool(true)) {
                return Err(format!("the trial balance does not balance: {line}"));
            }
        }
        if books.debits != books.credits {
            return Err(format!("debits {} are not credits {}", books.debits, books.credits));
        }
        Ok(books)
    }

    /// Sum of the balances of all accounts whose name begins with `prefix`, minor units; debit is positive.
    pub fn balance(&self, prefix: &str) -> i64 {
        self.accounts.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, minor)| minor).sum()
    }
}
