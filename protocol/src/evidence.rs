//! What can be shown of one transaction to somebody who trusts nobody but the network's root key: the signed documents
//! themselves in one file, and a check that says for each line who claims it and what follows from it, and no more.

use bincode::{Decode, Encode};

use crate::amount::Amount;
use crate::api::TransactionState;
use crate::codec::{self, CodecError, Wire};
use crate::entitlement::{MAX_GENERATIONS, Move, Recovery};
use crate::ids::{Digest, NetworkId, Nonce, TransactionId};
use crate::manifest::Manifest;
use crate::receipt::{Ack, Completion};
use crate::sections::{Format, Section, SectionError};
use crate::signed::Signed;
use crate::statement::Statement;
use crate::ticket::{Endorsement, Lease, TransactionData};
use crate::trust::KeySet;
use crate::{document, wire};

mod check;
mod keys;
mod report;
mod vouching;

pub use check::{check_statement_files, check_statements};
pub use keys::KeySets;
pub use report::{Changed, Claimant, Facts, Line, Received, Recorded, Report, SeederShare};

/// The manager's word on where a transaction stood at a moment.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct DeliveryRecord {
    /// The network.
    pub network: NetworkId,
    /// Which.
    pub transaction: TransactionId,
    /// Digest of the signed transaction data.
    pub transaction_data: Digest,
    /// The digest of what was ordered, as the merchant gave it with the reservation.
    pub order: Digest,
    /// Where it stood …
    pub state: TransactionState,
    /// … then, unix milliseconds.
    pub at: u64,
    /// When it was released, unix milliseconds.
    pub released_at: Option<u64>,
    /// When the first acknowledgement or completion came in, unix milliseconds.
    pub first_at: Option<u64>,
    /// When the client's completion came in, unix milliseconds.
    pub completed_at: Option<u64>,
    /// When its paid delivery was closed, unix milliseconds.
    pub closed_at: Option<u64>,
    /// When the manager last came back from a backup, where that was after the sale was formed, unix milliseconds: what
    /// came in between the backup and then it may have forgotten, and have taken again later.
    pub restored_at: Option<u64>,
    /// Digests of the signed leases by which it was released, at most [`EvidencePack::MAX_LEASES`]: the record vouches for
    /// them after the key that signed them was revoked.
    pub leases: Vec<Digest>,
}

/// The manager's word that nothing of a transaction had been acknowledged to it by a given time: neither an
/// acknowledgement nor a completion of any of its deliveries. A manager that came back from a backup speaks only of the
/// time since: what came in before that it may have forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct NonDelivery {
    /// The network.
    pub network: NetworkId,
    /// Which.
    pub transaction: TransactionId,
    /// Digest of the signed transaction data.
    pub transaction_data: Digest,
    /// Nothing had come in by then, unix milliseconds.
    pub by: u64,
    /// When this was signed, unix milliseconds.
    pub issued_at: u64,
    /// Nothing is said of the time before this, unix milliseconds: when the manager last came back from a backup, where
    /// that was after the sale was formed.
    pub restored_at: Option<u64>,
}

/// What a merchant says of an order beyond what it signed. The amounts can be checked against the commitments in the
/// transaction data and the endorsement; that the order is this one cannot.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct OrderWords {
    /// The merchant's name of the order; at most [`OrderWords::MAX_ORDER`] bytes.
    pub order: String,
    /// Digest of what was ordered.
    pub body: Digest,
    /// What was paid.
    pub amount: Amount,
    /// Opens the commitment to the price in the transaction data.
    pub price_salt: Nonce,
    /// Opens, with the authorisation, the commitment to the payment in the endorsement.
    pub payment_salt: Nonce,
    /// Name of the payment's authorisation; at most [`OrderWords::MAX_AUTHORISATION`] bytes.
    pub authorisation: String,
}

impl OrderWords {
    /// Longest name of an order, bytes.
    pub const MAX_ORDER: usize = 64;
    /// Longest name of an authorisation, bytes.
    pub const MAX_AUTHORISATION: usize = 128;
}

document! {
    DeliveryRecord => DeliveryRecord, 1024; network,
    NonDelivery => NonDelivery, 256; network,
}

/// Who put a file of evidence together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exporter {
    /// A manager.
    Manager,
    /// The merchant.
    Merchant,
    /// The client.
    Client,
}

/// How the file came to be. Nobody signs this: it is what the file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct About {
    /// Who put it together.
    pub by: Exporter,
    /// When, unix milliseconds.
    pub at: u64,
    /// Acknowledgements and completions that there was no room for.
    pub left_out: u32,
}

wire! {
    OrderWords => 512,
    About => 32,
}

/// Everything signed of one transaction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvidencePack {
    /// How the file came to be.
    pub about: About,
    /// Key sets under which the documents were signed, newest first; at most [`EvidencePack::MAX_KEY_SETS`].
    pub key_sets: Vec<Signed<KeySet>>,
    /// The sale.
    pub data: Signed<TransactionData>,
    /// The merchant's word that it is paid.
    pub endorsement: Option<Signed<Endorsement>>,
    /// The manager's orders to deliver; at most [`EvidencePack::MAX_LEASES`].
    pub leases: Vec<Signed<Lease>>,
    /// What was sold.
    pub manifest: Option<Signed<Manifest>>,
    /// The client's acknowledgements, the last one for each seeder and delivery; at most [`EvidencePack::MAX_ACKS`].
    pub acks: Vec<Signed<Ack>>,
    /// The client's completions; at most [`EvidencePack::MAX_LEASES`].
    pub completions: Vec<Signed<Completion>>,
    /// Where it stood, by the manager's word.
    pub record: Option<Signed<DeliveryRecord>>,
    /// The opposite of a delivery.
    pub non_delivery: Option<Signed<NonDelivery>>,
    /// What the merchant says beyond that.
    pub order: Option<OrderWords>,
    /// By whose word it changed hands, in order: the holders' …
    pub moves: Vec<Signed<Move>>,
    /// … and the merchant's; together at most [`EvidencePack::MAX_MOVES`].
    pub recoveries: Vec<Signed<Recovery>>,
}

/// Why a file is no evidence. Nothing in it counts then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// The frame.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// A section that is whole and still not what it should be.
    #[error("section {number} ({name}) cannot be read: {source}")]
    Codec {
        /// 1 for the first.
        number: usize,
        /// What it is.
        name: &'static str,
        /// Why.
        source: CodecError,
    },
    /// A section of a kind that a file has once.
    #[error("section {number} is a second {name}: a file has one, and no check would show both")]
    Second {
        /// 1 for the first.
        number: usize,
        /// What it is.
        name: &'static str,
    },
    /// The same document once more.
    #[error("section {number} ({name}) is in the file already")]
    Again {
        /// 1 for the first.
        number: usize,
        /// What it is.
        name: &'static str,
    },
    /// Sections have an order.
    #[error("section {number} ({name}) does not stand where a file has it")]
    Order {
        /// 1 for the first.
        number: usize,
        /// What it is.
        name: &'static str,
    },
    /// A section whose bytes say more than the document in them.
    #[error("section {number} ({name}) is not written in the one way in which it is written")]
    Form {
        /// 1 for the first.
        number: usize,
        /// What it is.
        name: &'static str,
    },
    /// A section of no kind that there is.
    #[error("section {number} is of a kind ({kind}) that this version does not know")]
    Unknown {
        /// 1 for the first.
        number: usize,
        /// What it says it is.
        kind: u8,
    },
    /// Sections that do not make a whole.
    #[error("the file {0}")]
    Incomplete(&'static str),
}

/// Sections of evidence.
const EVIDENCE: Format = Format {
    magic: b"willcall evid 1\n",
    what: "evidence file",
    names: &[
        "about",
        "key set",
        "transaction data",
        "endorsement",
        "lease",
        "manifest",
        "acknowledgement",
        "completion",
        "delivery record",
        "non-delivery",
        "order",
        "move",
        "recovery",
    ],
    max_bytes: EvidencePack::MAX_BYTES,
    max_sections: 320,
};

/// Sections of a file of statements.
const STATEMENTS: Format = Format {
    magic: b"willcall stmt 1\n",
    what: "statement file",
    names: &["key set", "statement"],
    max_bytes: StatementFile::MAX_BYTES,
    max_sections: 1024,
};

fn section<T: Wire>(kind: u8, document: &T) -> Section {
    Section { kind, bytes: codec::encode(document) }
}

/// Reads sections so that whatever is in a file is shown by its check: each document in its one byte form, in the order in
/// which files are written, none twice.
struct Reader<'a> {
    format: &'a Format,
    sections: &'a [Section],
    number: usize,
    section: &'a Section,
}

impl<'a> Reader<'a> {
    fn each(format: &'a Format, sections: &'a [Section]) -> impl Iterator<Item = Result<Reader<'a>, EvidenceError>> {
        sections.iter().enumerate().map(move |(at, section)| {
            let reader = Reader { format, sections, number: at + 1, section };
            let before = sections.get(..at).unwrap_or_default();
            match () {
                () if usize::from(section.kind) > format.names.len() => {
                    Err(EvidenceError::Unknown { number: reader.number, kind: section.kind })
                }
                () if before.last().is_some_and(|before| before.kind > section.kind) => {
                    Err(EvidenceError::Order { number: reader.number, name: reader.name() })
                }
                () => Ok(reader),
            }
        })
    }

    fn name(&self) -> &'static str {
        self.format.name(self.section.kind)
    }

    fn before(&self) -> &[Section] {
        self.sections.get(..self.number - 1).unwrap_or_default()
    }

    fn document<T: Wire>(&self) -> Result<T, EvidenceError> {
        let (number, name) = (self.number, self.name());
        let document =
            codec::decode(&self.section.bytes).map_err(|source| EvidenceError::Codec { number, name, source })?;
        match codec::encode(&document) == self.section.bytes {
            true => Ok(document),
            false => Err(EvidenceError::Form { number, name }),
        }
    }

    /// The only one of its kind.
    fn one<T: Wire>(&self, into: &mut Option<T>) -> Result<(), EvidenceError> {
        let document = self.document()?;
        match into.replace(document) {
            None => Ok(()),
            Some(_) => Err(EvidenceError::Second { number: self.number, name: self.name() }),
        }
    }

    /// One of several.
    fn next<T: Wire>(&self, into: &mut Vec<T>) -> Result<(), EvidenceError> {
        if self.before().contains(self.section) {
            return Err(EvidenceError::Again { number: self.number, name: self.name() });
        }
        into.push(self.document()?);
        Ok(())
    }
}

impl EvidencePack {
    /// Largest file: goes whole into one answer to a merchant.
    pub const MAX_BYTES: usize = 640 * 1024;
    /// Bytes that acknowledgements may take; the other sections need less than the rest.
    pub const MAX_ACK_BYTES: usize = 320 * 1024;
    /// Most key sets; at 32 KiB each.
    pub const MAX_KEY_SETS: usize = 4;
    /// Most leases and completions: one delivery each.
    pub const MAX_LEASES: usize = 16;
    /// Most acknowledgements.
    pub const MAX_ACKS: usize = 192;
    /// Most words by which it changed hands: each begins a generation.
    pub const MAX_MOVES: usize = MAX_GENERATIONS as usize;

    /// A file with the sale alone; the rest is filled in.
    pub fn new(by: Exporter, at: u64, data: Signed<TransactionData>) -> Self {
        EvidencePack {
            about: About { by, at, left_out: 0 },
            key_sets: Vec::new(),
            data,
            endorsement: None,
            leases: Vec::new(),
            manifest: None,
            acks: Vec::new(),
            completions: Vec::new(),
            record: None,
            non_delivery: None,
            order: None,
            moves: Vec::new(),
            recoveries: Vec::new(),
        }
    }

    /// Adds an acknowledgement, where there is room; what is left out is counted.
    pub fn add_ack(&mut self, ack: Signed<Ack>) {
        let bytes: usize = self.acks.iter().chain([&ack]).map(|ack| ack.body().len() + 160).sum();
        if self.acks.len() >= Self::MAX_ACKS || bytes > Self::MAX_ACK_BYTES {
            self.about.left_out = self.about.left_out.saturating_add(1);
        } else if !self.acks.contains(&ack) {
            self.acks.push(ack);
        }
    }

    /// The file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![section(1, &self.about)];
        out.extend(self.key_sets.iter().take(Self::MAX_KEY_SETS).map(|d| section(2, d)));
        out.push(section(3, &self.data));
        out.extend(self.endorsement.iter().map(|d| section(4, d)));
        out.extend(self.leases.iter().take(Self::MAX_LEASES).map(|d| section(5, d)));
        out.extend(self.manifest.iter().map(|d| section(6, d)));
        out.extend(self.acks.iter().map(|d| section(7, d)));
        out.extend(self.completions.iter().take(Self::MAX_LEASES).map(|d| section(8, d)));
        out.extend(self.record.iter().map(|d| section(9, d)));
        out.extend(self.non_delivery.iter().map(|d| section(10, d)));
        out.extend(self.order.iter().map(|d| section(11, d)));
        out.extend(self.moves.iter().take(Self::MAX_MOVES).map(|d| section(12, d)));
        out.extend(self.recoveries.iter().take(Self::MAX_MOVES).map(|d| section(13, d)));
        EVIDENCE.write(&out)
    }

    /// Reads a file; nothing in it is checked yet but its frame.
    ///
    /// # Errors
    /// [`EvidenceError`] names the section that was changed, or that would not be shown.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, EvidenceError> {
        let sections = EVIDENCE.read(bytes)?;
        let (mut about, mut data) = (None, None);
        let (mut key_sets, mut leases, mut acks, mut completions) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut endorsement, mut manifest, mut record, mut non_delivery, mut order) = (None, None, None, None, None);
        let (mut moves, mut recoveries) = (Vec::new(), Vec::new());
        for section in Reader::each(&EVIDENCE, &sections) {
            let section = section?;
            match section.section.kind {
                1 => section.one(&mut about)?,
                2 => section.next(&mut key_sets)?,
                3 => section.one(&mut data)?,
                4 => section.one(&mut endorsement)?,
                5 => section.next(&mut leases)?,
                6 => section.one(&mut manifest)?,
                7 => section.next(&mut acks)?,
                8 => section.next(&mut completions)?,
                9 => section.one(&mut record)?,
                10 => section.one(&mut non_delivery)?,
                11 => section.one(&mut order)?,
                12 => section.next(&mut moves)?,
                13 => section.next(&mut recoveries)?,
                kind => return Err(EvidenceError::Unknown { number: section.number, kind }),
            }
        }
        if key_sets.len() > Self::MAX_KEY_SETS
            || leases.len() > Self::MAX_LEASES
            || completions.len() > Self::MAX_LEASES
            || acks.len() > Self::MAX_ACKS
            || moves.len() + recoveries.len() > Self::MAX_MOVES
        {
            return Err(EvidenceError::Incomplete("has more documents of one kind than are possible"));
        }
        Ok(EvidencePack {
            about: about.ok_or(EvidenceError::Incomplete("does not say how it came to be"))?,
            key_sets,
            data: data.ok_or(EvidenceError::Incomplete("has no transaction data"))?,
            endorsement,
            leases,
            manifest,
            acks,
            completions,
            record,
            non_delivery,
            order,
            moves,
            recoveries,
        })
    }
}

/// Statements of one seeder, to be checked without asking anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatementFile {
    /// Key sets under which they were signed, newest first.
    pub key_sets: Vec<Signed<KeySet>>,
    /// In order.
    pub statements: Vec<Signed<Statement>>,
}

impl StatementFile {
    /// Largest file.
    pub const MAX_BYTES: usize = 64 * 1024 * 1024;

    /// Most statements in one; more go into a further one, which proves itself as well.
    pub const MOST: usize = 960;
    /// Most bytes of all of them together.
    const MOST_BYTES: usize = 56 * 1024 * 1024;

    /// A file with as many of these statements, in order, as it may have. The second value is true where that was not all.
    ///
    /// # Errors
    /// The first of the iterator.
    pub fn of<E>(
        key_sets: Vec<Signed<KeySet>>,
        from: impl Iterator<Item = Result<Signed<Statement>, E>>,
    ) -> Result<(Self, bool), E> {
        let (mut statements, mut bytes) = (Vec::new(), 0usize);
        for signed in from {
            let signed = signed?;
            // Beside the body there are signer and signature.
            bytes = bytes.saturating_add(signed.body().len() + 256);
            if statements.len() >= Self::MOST || bytes > Self::MOST_BYTES {
                return Ok((StatementFile { key_sets, statements }, true));
            }
            statements.push(signed);
        }
        Ok((StatementFile { key_sets, statements }, false))
    }

    /// The file.
    pub fn to_bytes(&self) -> Vec<u8> {
        let keys = self.key_sets.iter().map(|d| section(1, d));
        STATEMENTS.write(&keys.chain(self.statements.iter().map(|d| section(2, d))).collect::<Vec<_>>())
    }

    /// Reads a file; nothing in it is checked yet but its frame.
    ///
    /// # Errors
    /// [`EvidenceError`] names the section that was changed, or that would not be shown.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, EvidenceError> {
        let (mut key_sets, mut statements) = (Vec::new(), Vec::new());
        for section in Reader::each(&STATEMENTS, &STATEMENTS.read(bytes)?) {
            let section = section?;
            match section.section.kind {
                1 => section.next(&mut key_sets)?,
                2 => section.next(&mut statements)?,
                kind => return Err(EvidenceError::Unknown { number: section.number, kind }),
            }
        }
        Ok(StatementFile { key_sets, statements })
    }
}
