//! The check of a file of evidence. It needs the root key and nothing else, no clock either: a document counts when its
//! key was good at the time that the document gives, by the key sets that came with it.

mod downloads;
mod hands;

use super::keys::KeySets;
use super::report::{Changed, Claimant, Facts, Line, Recorded, Report};
use super::vouching::{self, Vouched, Vouchers};
use super::{DeliveryRecord, EvidencePack, OrderWords, StatementFile};
use crate::ids::{Digest, NetworkId, PeerId};
use crate::manifest::Manifest;
use crate::refusal::Refusal;
use crate::settling::Layout;
use crate::signed::Signed;
use crate::statement::Statement;
use crate::ticket::{Endorsement, Lease, TransactionData, payment_commitment, remuneration_commitment};
use crate::trust::{KeyPurpose, KeySet};
use crate::utc::Utc;

#[derive(Default)]
struct Lines(Vec<Line>);

impl Lines {
    /// Notes a line and gives what it holds, if it does.
    fn add<T>(
        &mut self,
        claimed_by: Claimant,
        section: &str,
        claim: impl FnOnce(Option<&T>) -> String,
        found: Result<T, String>,
    ) -> Option<T> {
        self.add_vouched(claimed_by, section, claim, found.map(|value| (value, None)))
    }

    /// The same for what may hold by another document alone.
    fn add_vouched<T>(
        &mut self,
        claimed_by: Claimant,
        section: &str,
        claim: impl FnOnce(Option<&T>) -> String,
        found: Result<Vouched<T>, String>,
    ) -> Option<T> {
        let claim = claim(found.as_ref().ok().map(|(value, _)| value));
        let (value, problem, vouched_by) = match found {
            Ok((value, vouched_by)) => (Some(value), None, vouched_by),
            Err(problem) => (None, Some(problem), None),
        };
        self.0.push(Line { claimed_by, section: section.to_owned(), claim, problem, vouched_by, unproven: false });
        value
    }

    /// Of the line just noted: that its signer could say so is not proven.
    fn is_unproven(&mut self) {
        if let Some(line) = self.0.last_mut() {
            line.unproven = true;
        }
    }
}

fn keys(keys: &mut KeySets, sets: &[Signed<KeySet>], place: &str, lines: &mut Lines) {
    for (number, signed) in sets.iter().enumerate() {
        let found = keys.add(signed.clone()).map_err(|refusal| refusal.to_string());
        let claim = |version: Option<&u64>| match version {
            Some(version) => format!("the network's keys, version {version}"),
            None => "the network's keys".to_owned(),
        };
        lines.add(Claimant::RootSigned, &format!("{place}key set {}", number + 1), claim, found);
    }
}

fn text(refusal: &Refusal) -> String {
    refusal.to_string()
}

impl EvidencePack {
    /// Checks every line with the network's root key.
    pub fn verify(&self, root: &PeerId) -> Report {
        let mut lines = Lines::default();
        let mut facts = Facts::default();
        lines.add(
            Claimant::ExporterAsserts,
            "about",
            |_| {
                let left = match self.about.left_out {
                    0 => String::new(),
                    n => format!("; {n} acknowledgements and completions had no room"),
                };
                let by = format!("{:?}", self.about.by).to_lowercase();
                format!("put together by the {by} at {}{left}", Utc(self.about.at))
            },
            Ok(()),
        );
        let mut keys = KeySets::new(*root);
        self::keys(&mut keys, &self.key_sets, "", &mut lines);
        facts.key_set_version = keys.newest().map(|set| set.version);
        let vouchers = Vouchers::of(self, &keys);
        let found = vouching::open(&keys, &self.data, KeyPurpose::Ticket, |data| data.formed_at, vouchers.sale());
        let found = found.and_then(|(data, by)| match data.network == keys.network() {
            true => Ok((data, by)),
            false => Err("it is of another network".to_owned()),
        });
        let claim = |data: Option<&TransactionData>| match data {
            Some(d) => format!(
                "transaction {}: product {} (manifest {}) for client {}, sold by merchant {}, formed at {}",
                d.transaction,
                d.product,
                d.manifest,
                d.client,
                d.merchant,
                Utc(d.formed_at)
            ),
            None => "the sale".to_owned(),
        };
        if let Some(data) = lines.add_vouched(Claimant::ManagerSigned, "transaction data", claim, found) {
            facts.transaction = Some(data.transaction);
            facts.product = Some(data.product);
            facts.manifest = Some(data.manifest);
            facts.client = Some(data.client);
            facts.merchant = Some(data.merchant);
            facts.formed_at = Some(data.formed_at);
            let (lines, facts) = (&mut lines, &mut facts);
            Check { pack: self, keys: &keys, vouchers: &vouchers, data: &data, lines, facts }.rest();
        } else {
            let rest = "everything else in the file is about a sale that is not proven".to_owned();
            lines.add::<()>(Claimant::ExporterAsserts, "file", |_| "the rest of the file".to_owned(), Err(rest));
        }
        let ok = lines.0.iter().all(|line| line.problem.is_none());
        let key_revoked = facts.transaction.is_none() && keys.is_revoked(&self.data, KeyPurpose::Ticket);
        Report { by: self.about.by, ok, lines: lines.0, key_revoked, facts }
    }
}

/// What a manager says of where a transaction stood.
fn record(r: &DeliveryRecord) -> String {
    let when = |at: Option<u64>| at.map_or_else(|| "not by then".to_owned(), |at| format!("at {}", Utc(at)));
    let mut claim = format!(
        "as of {}, the order with digest {}: {}; released {}, first acknowledged {}, completed {}, closed {}",
        Utc(r.at),
        r.order,
        r.state.as_str(),
        when(r.released_at),
        when(r.first_at),
        when(r.completed_at),
        when(r.closed_at)
    );
    if let Some(restored) = r.restored_at {
        claim.push_str(&format!(
            "; the manager came back from a backup at {}: what is missing or later here may have come in before",
            Utc(restored)
        ));
    }
    claim
}

/// What a manager says not to have got.
fn nothing(n: &super::NonDelivery) -> String {
    match n.restored_at {
        None => format!("by {} no acknowledgement and no completion had come in", Utc(n.by)),
        Some(restored) => format!(
            "from {} to {} no acknowledgement and no completion came in; the manager came back from a backup \
             at {}, and of what came in before that nothing is said",
            Utc(restored),
            Utc(n.by),
            Utc(restored)
        ),
    }
}

/// The lines that hang on the transaction data.
struct Check<'a> {
    pack: &'a EvidencePack,
    keys: &'a KeySets,
    vouchers: &'a Vouchers,
    data: &'a TransactionData,
    lines: &'a mut Lines,
    facts: &'a mut Facts,
}

impl Check<'_> {
    fn rest(&mut self) {
        let endorsement = self.endorsement();
        let leases = self.leases();
        self.hands(&leases);
        let layout = self.manifest();
        self.acks(&leases, layout);
        self.completions(&leases);
        let record = self.manager_words();
        self.order(endorsement.as_ref(), record.as_ref());
    }

    fn network(&self) -> NetworkId {
        self.keys.network()
    }

    fn endorsement(&mut self) -> Option<Endorsement> {
        let signed = self.pack.endorsement.as_ref()?;
        let found = signed.verify(&self.data.merchant).map_err(|e| e.to_string()).and_then(|endorsement| {
            match endorsement.transaction_data == self.pack.data.digest() {
                true => Ok(endorsement),
                false => Err("it endorses another transaction".to_owned()),
            }
        });
        let claim = |e: Option<&Endorsement>| match e {
            Some(e) => format!("the payment {} was authorised at {}", e.payment, Utc(e.authorised_at)),
            None => "the payment was authorised".to_owned(),
        };
        let endorsement = self.lines.add(Claimant::MerchantSigned, "endorsement", claim, found);
        self.facts.endorsed = endorsement.is_some();
        endorsement
    }

    fn leases(&mut self) -> Vec<Lease> {
        let mut leases = Vec::new();
        for (number, signed) in self.pack.leases.iter().enumerate() {
            let voucher = self.vouchers.lease(signed);
            let found = vouching::open(self.keys, signed, KeyPurpose::Ticket, |l| l.issued_at, voucher);
            let found = found.and_then(|(lease, vouched_by)| {
                let endorsed = self.pack.endorsement.as_ref().map(Signed::digest);
                if lease.transaction_data != self.pack.data.digest() {
                    Err("it is for another transaction".to_owned())
                } else if endorsed.is_some_and(|digest| digest != lease.endorsement) {
                    Err("it names another endorsement".to_owned())
                } else {
                    Ok((lease, vouched_by))
                }
            });
            let unnamed = found.as_ref().ok().and_then(|(lease, _)| self.vouchers.unnamed(signed, lease));
            let claim = |lease: Option<&Lease>| match lease {
                Some(l) => format!(
                    "delivery {} was released to client {} (generation {}) from {} to {}{}",
                    l.delivery,
                    l.client,
                    l.generation,
                    Utc(l.start),
                    Utc(l.end),
                    unnamed.as_deref().unwrap_or_default()
                ),
                None => "a release".to_owned(),
            };
            let section = format!("lease {}", number + 1);
            leases.extend(self.lines.add_vouched(Claimant::ManagerSigned, &section, claim, found));
            if unnamed.is_some() {
                self.lines.is_unproven();
            }
        }
        self.facts.released = !leases.is_empty();
        leases
    }

    fn manifest(&mut self) -> Option<Layout> {
        let signed = self.pack.manifest.as_ref()?;
        let named = signed.digest() == self.data.manifest;
        let voucher = named.then(|| "the transaction data".to_owned());
        let found = vouching::open(self.keys, signed, KeyPurpose::Catalogue, |m| m.published_at, voucher);
        let found = found.and_then(|manifest| match named {
            true => Ok(manifest),
            false => Err("it is not the one that the transaction names".to_owned()),
        });
        let claim = |manifest: Option<&Manifest>| match manifest {
            Some(m) => format!("the content has {} bytes in chunks of {}, root {}", m.length, m.chunk_size, m.root),
            None => "what was sold".to_owned(),
        };
        let manifest = self.lines.add_vouched(Claimant::ManagerSigned, "manifest", claim, found)?;
        self.facts.content_bytes = Some(manifest.length);
        Some(Layout::from(&manifest))
    }

    /// Gives the delivery record, if it holds.
    fn manager_words(&mut self) -> Option<DeliveryRecord> {
        let this = (self.data.transaction, self.pack.data.digest());
        let other = || "it is about another transaction".to_owned();
        let mut record = None;
        if let Some(signed) = &self.pack.record {
            let found = self.keys.open(signed, KeyPurpose::Settlement, |r| r.at).map_err(|e| text(&e));
            let found = found.and_then(|r| match (r.transaction, r.transaction_data) == this {
                true => Ok(r),
                false => Err(other()),
            });
            let claim = |r: Option<&DeliveryRecord>| r.map_or_else(|| "where it stood".to_owned(), self::record);
            record = self.lines.add(Claimant::ManagerSigned, "delivery record", claim, found);
        }
        if let Some(r) = &record {
            self.facts.manager_restored_at = self.facts.manager_restored_at.max(r.restored_at);
            self.facts.record = Some(Recorded::from(r));
        }
        let first = record.as_ref().and_then(|r| [r.first_at, r.completed_at].into_iter().flatten().min());
        if let Some(signed) = &self.pack.non_delivery {
            let found = self.keys.open(signed, KeyPurpose::Settlement, |n| n.issued_at).map_err(|e| text(&e));
            let found = found.and_then(|n| {
                if (n.transaction, n.transaction_data) != this {
                    Err(other())
                } else if n.by > n.issued_at {
                    Err("it speaks of a time after it was signed".to_owned())
                } else if n.restored_at.is_some_and(|restored| n.by < restored) {
                    Err("it speaks of a time before the manager came back from a backup".to_owned())
                } else if first.is_some_and(|first| first <= n.by) {
                    Err("the delivery record says that something had come in by then".to_owned())
                } else {
                    Ok(n)
                }
            });
            let claim = |n: Option<&super::NonDelivery>| n.map_or_else(|| "that nothing came in".to_owned(), nothing);
            if let Some(n) = self.lines.add(Claimant::ManagerSigned, "non-delivery", claim, found) {
                self.facts.nothing_acknowledged_by = Some(n.by);
                self.facts.nothing_acknowledged_since = n.restored_at;
                self.facts.manager_restored_at = self.facts.manager_restored_at.max(n.restored_at);
            }
        }
        record
    }

    /// Against what the merchant and the manager signed, where that holds.
    fn order(&mut self, endorsed: Option<&Endorsement>, record: Option<&DeliveryRecord>) {
        let Some(order) = &self.pack.order else { return };
        let price = remuneration_commitment(&order.price_salt, &order.amount) == self.data.remuneration;
        let found = match price {
            _ if order.order.len() > OrderWords::MAX_ORDER => Err("its name is too long".to_owned()),
            false => Err("it is not the price that the transaction data commit to".to_owned()),
            true => match record.filter(|record| record.order != order.body) {
                None => Ok(()),
                Some(record) => Err(format!("the delivery record says that the order has digest {}", record.order)),
            },
        };
        // Anybody's text: a line break in it would look like a line of its own.
        let name = order.order.escape_debug();
        let claim = |_: Option<&()>| format!("order {name} (digest {}) cost {}", order.body, order.amount);
        if self.lines.add(Claimant::MerchantAsserts, "order", claim, found).is_some() {
            self.facts.price = Some(order.amount);
        }
        let payment = payment_commitment(&order.payment_salt, &order.authorisation, &order.amount);
        let found = match endorsed {
            _ if order.authorisation.len() > OrderWords::MAX_AUTHORISATION => Err("its name is too long".to_owned()),
            Some(endorsement) if endorsement.payment == payment => Ok(()),
            Some(_) => Err("it is not the payment that the endorsement commits to".to_owned()),
            None => Err("there is no endorsement that holds to compare it with".to_owned()),
        };
        let claim = |_: Option<&()>| format!("its payment is authorisation {}", order.authorisation.escape_debug());
        self.lines.add(Claimant::MerchantAsserts, "order", claim, found);
    }
}

/// Checks a file of statements with the network's root key: signatures, sums, and that they follow each other. The
/// statements come back in order where they hold.
pub fn check_statements(file: &StatementFile, root: &PeerId) -> (Vec<Line>, Vec<Statement>) {
    check_statement_files(std::slice::from_ref(file), root)
}

/// The same for a chain that takes several files, in order: that the first statement of one follows the last of the one
/// before, which no file proves by itself. What the key sets in one of them say holds for all.
pub fn check_statement_files(files: &[StatementFile], root: &PeerId) -> (Vec<Line>, Vec<Statement>) {
    let mut keys = KeySets::new(*root);
    let place = |at: usize| if files.len() > 1 { format!("file {}, ", at + 1) } else { String::new() };
    let each = files.iter().enumerate().map(|(at, file)| {
        let mut lines = Lines::default();
        self::keys(&mut keys, &file.key_sets, &place(at), &mut lines);
        lines
    });
    let of_keys: Vec<Lines> = each.collect();
    let mut lines = Lines::default();
    let mut good: Vec<(Statement, Digest)> = Vec::new();
    for ((at, file), of_keys) in files.iter().enumerate().zip(of_keys) {
        let place = place(at);
        lines.0.extend(of_keys.0);
        for (number, signed) in file.statements.iter().enumerate() {
            let found = keys.open(signed, KeyPurpose::Settlement, |s| s.issued_at).map_err(|e| text(&e));
            let found = found.and_then(|statement| {
                statement.check().map_err(|e| e.to_string())?;
                if let Some((before, digest)) = good.last() {
                    statement.follows(before, *digest).map_err(|e| e.to_string())?;
                }
                Ok(statement)
            });
            let claim = |statement: Option<&Statement>| match statement {
                Some(s) => {
                    format!("statement {} of seeder {}, {} to {}", s.number, s.seeder, Utc(s.from), Utc(s.until))
                }
                None => "a statement".to_owned(),
            };
            let section = format!("{place}statement {}", number + 1);
            if let Some(statement) = lines.add(Claimant::ManagerSigned, &section, claim, found) {
                good.push((statement, signed.digest()));
            }
        }
    }
    (lines.0, good.into_iter().map(|(statement, _)| statement).collect())
}
