//! The two files that go between a manager and the machine with its root key: a request, and the key set that was signed.
//! Each says what it is, so that a wrong one is named; and a request carries the key set in force, signed, so that whoever
//! signs the next one sees what it changes.

use std::path::Path;

use anyhow::{Context, Result, bail};
use protocol::trust::{KeyEntry, KeyPurpose, KeySet, KeyState, Trust};
use protocol::{PeerId, Signed, codec};

use super::output;

const REQUEST: &[u8] = b"willcall key request 1\n";
const SIGNED: &[u8] = b"willcall key set 1\n";
/// Largest file that is read: two key sets have at most 32 KiB each.
const MAX_FILE: u64 = 128 * 1024;

/// A key set that is to be signed.
pub(super) struct Request {
    /// The signed one that it follows.
    pub(super) in_force: Vec<u8>,
    /// What is to be signed.
    pub(super) next: Vec<u8>,
}

impl Request {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.in_force.len()).unwrap_or(u32::MAX).to_be_bytes();
        [REQUEST, &length, &self.in_force, &self.next].concat()
    }

    pub(super) fn read(path: &Path) -> Result<Request> {
        let bytes = read(path)?;
        if bytes.starts_with(SIGNED) {
            bail!("{} is signed already: `willcall manager keys install` it", path.display());
        }
        let parts = bytes.strip_prefix(REQUEST).and_then(|rest| {
            let (length, rest) = rest.split_first_chunk::<4>()?;
            rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)
        });
        let Some((in_force, next)) = parts else {
            bail!("{} is {}, not a request of `willcall manager keys … --request`", path.display(), looks_like(&bytes));
        };
        Ok(Request { in_force: in_force.to_vec(), next: next.to_vec() })
    }

    /// What it changes, a line each.
    pub(super) fn changes(&self) -> Result<Vec<String>> {
        let bad = "the request was damaged on its way; write it again";
        let next: KeySet = codec::decode(&self.next).context(bad)?;
        let in_force: Signed<KeySet> = codec::decode(&self.in_force).context(bad)?;
        // As it was signed by this network's root key, or by one that this one handed over to.
        let handovers = in_force.peek().context(bad)?.handovers;
        let first = handovers.first().map_or(in_force.signer(), Signed::signer);
        let trust = Trust::new(first, in_force, 0).context("the key set in the request is not one in force")?;
        if trust.network() != next.network {
            bail!("the request is for another network than the key set that it says is in force");
        }
        Ok(changes(&trust, &next))
    }
}

/// The file of a signed key set.
pub(super) fn signed(key_set: &[u8]) -> Vec<u8> {
    [SIGNED, key_set].concat()
}

pub(super) fn read_signed(path: &Path) -> Result<Vec<u8>> {
    let bytes = read(path)?;
    match bytes.strip_prefix(SIGNED) {
        Some(key_set) => Ok(key_set.to_vec()),
        None if bytes.starts_with(REQUEST) => bail!(
            "{} is a request that nobody signed yet: `willcall manager keys sign` it where the root key is, and install \
             what that writes",
            path.display()
        ),
        None => bail!("{} is {}, not what `willcall manager keys sign` wrote", path.display(), looks_like(&bytes)),
    }
}

fn looks_like(bytes: &[u8]) -> &'static str {
    match bytes {
        [] => "empty",
        _ if bytes.starts_with(b"willcall stmt") => "a file of statements",
        _ if bytes.starts_with(b"willcall") => "another file of willcall",
        _ => "something else",
    }
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read;
    let failed = || format!("cannot read {}", path.display());
    let mut bytes = Vec::new();
    std::fs::File::open(path).with_context(failed)?.take(MAX_FILE).read_to_end(&mut bytes).with_context(failed)?;
    Ok(bytes)
}

fn purpose(purpose: KeyPurpose) -> &'static str {
    match purpose {
        KeyPurpose::Catalogue => "catalogue",
        KeyPurpose::Ticket => "ticket",
        KeyPurpose::Enrolment => "enrolment",
        KeyPurpose::Revocation => "revocation",
        KeyPurpose::Settlement => "settlement",
        KeyPurpose::ReceiptSealing => "receipt-sealing",
    }
}

fn state(entry: &KeyEntry) -> String {
    match entry.state {
        KeyState::Active => "signs from now on".to_owned(),
        KeyState::Retiring { not_issued_after, dead_after } => format!(
            "is replaced: it signs nothing after {}, and what it signed is void from {} on",
            output::time(not_issued_after),
            output::time(dead_after)
        ),
        KeyState::Revoked => "is REVOKED: everything that it ever signed is void".to_owned(),
    }
}

fn changes(trust: &Trust, next: &KeySet) -> Vec<String> {
    let before = trust.key_set();
    let mut lines = vec![
        format!("network {}", next.network),
        format!("key set {} follows {}; made at {}", next.version, before.version, output::time(next.issued_at)),
    ];
    for entry in &next.keys {
        let was = before.keys.iter().find(|old| old.key == entry.key && old.purpose == entry.purpose);
        match was {
            None => lines.push(format!("new {} key {} {}", purpose(entry.purpose), entry.key, state(entry))),
            Some(old) if old.state != entry.state => {
                lines.push(format!("{} key {} {}", purpose(entry.purpose), entry.key, state(entry)));
            }
            Some(_) => {}
        }
    }
    for old in &before.keys {
        if !next.keys.iter().any(|entry| entry.key == old.key && entry.purpose == old.purpose) {
            lines.push(format!("{} key {} is taken out; it was {}", purpose(old.purpose), old.key, state_name(old)));
        }
    }
    let peers = |peers: &[PeerId]| peers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    if next.managers != before.managers {
        lines.push(format!("managers {} in place of {}", peers(&next.managers), peers(&before.managers)));
    }
    if next.gossip_shards != before.gossip_shards {
        lines.push(format!("gossip shards {} in place of {}", next.gossip_shards, before.gossip_shards));
    }
    if next.handovers.len() != before.handovers.len()
        && let Some(to) = next.handovers.last().and_then(|handover| handover.peek().ok())
    {
        lines.push(format!("the root key hands over to {}: the old one signs nothing more", to.root));
    }
    if next.next_root != before.next_root {
        lines.push(match next.next_root {
            Some(digest) => format!("the root key that is to follow is another one, by the digest {digest}"),
            None => "no root key is named to follow".to_owned(),
        });
    }
    if lines.len() == 2 {
        lines.push("nothing else is changed".to_owned());
    }
    lines
}

fn state_name(entry: &KeyEntry) -> &'static str {
    match entry.state {
        KeyState::Active => "in use",
        KeyState::Retiring { .. } => "replaced, and is over",
        KeyState::Revoked => "revoked",
    }
}
