//! The revocation epochs that a client remembers of one network, many in a file. They were verified when they were taken;
//! when they are read again each one vouches for the one before, which it names by its digest, so that of a file one
//! signature is verified and not hundreds. What the key set says now of the keys that signed counts for each of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bincode::{Decode, Encode};
use protocol::codec::{self, Wire};
use protocol::trust::{KeyPurpose, RevocationEpoch, RevocationState, Trust};
use protocol::{Digest, Refusal, RefusalCode, Signed};

use crate::home::{At, FileError, make_private_dir, read_file, replace_file};

/// So many numbers share a file: with what epochs mostly hold it is some 64 KiB, which are written again as it fills.
const PAGE: u64 = 256;
/// The same, as a number of things in memory.
const IN_PAGE: usize = 256;
/// Files of one network at most, for a million epochs. What goes beyond is not remembered, and asked for in each run.
const MOST_PAGES: usize = 4096;
/// What the name of such a file begins with; the number of the page follows.
const PREFIX: &str = "page-";
/// Who asks for the same epochs at the same time must not put a page back to what it was. Another process may: what is
/// missing then is asked for again in the next run.
static SAVING: Mutex<()> = Mutex::new(());

/// The epochs of one file, by their numbers.
#[derive(Encode, Decode)]
struct Page {
    epochs: Vec<Signed<RevocationEpoch>>,
}

impl Wire for Page {
    const MAX: usize = 16 + IN_PAGE * <Signed<RevocationEpoch>>::MAX;
}

/// The folder of one network's epochs. All methods block.
pub(crate) struct Epochs {
    dir: PathBuf,
}

/// What is in it.
#[derive(Default)]
struct Listed {
    /// Epochs in files of their own, as earlier builds kept them: by page, their numbers.
    single: BTreeMap<u64, Vec<u64>>,
    pages: BTreeSet<u64>,
}

impl Epochs {
    pub(crate) fn new(dir: PathBuf) -> Self {
        Epochs { dir }
    }

    /// Everything revoked, as far as it is remembered: epochs are applied in order. Those that follow one that is missing or
    /// no longer good are left out, up to where a new chain begins.
    pub(crate) fn read(&self, trust: &Trust, now: u64) -> Result<RevocationState, FileError> {
        let mut state = RevocationState::default();
        let listed = self.list()?;
        let mut pages: Vec<u64> = listed.single.keys().chain(&listed.pages).copied().collect();
        pages.sort_unstable();
        pages.dedup();
        for page in pages {
            let epochs = self.page(page, &listed)?;
            apply(&mut state, trust, epochs.into_values(), now);
        }
        Ok(state)
    }

    /// Remembers epochs that were verified. What earlier builds left is brought into pages with them.
    pub(crate) fn save<'a>(
        &self,
        taken: impl IntoIterator<Item = (u64, &'a Signed<RevocationEpoch>)>,
    ) -> Result<(), FileError> {
        let _alone = SAVING.lock().unwrap_or_else(PoisonError::into_inner);
        let mut listed = self.list()?;
        let mut new: BTreeMap<u64, Vec<(u64, &Signed<RevocationEpoch>)>> = BTreeMap::new();
        for page in listed.single.keys() {
            new.entry(*page).or_default();
        }
        for (number, signed) in taken {
            new.entry(number / PAGE).or_default().push((number, signed));
        }
        make_private_dir(&self.dir)?;
        for (page, taken) in new {
            if !listed.pages.contains(&page) && listed.pages.len() >= MOST_PAGES {
                tracing::warn!(most = MOST_PAGES, "more revocation epochs than are remembered");
                continue;
            }
            let mut epochs = self.page(page, &listed)?;
            epochs.extend(taken.into_iter().map(|(number, signed)| (number, signed.clone())));
            let whole = Page { epochs: epochs.into_values().collect() };
            // Not worth a disk flush: what is lost is asked for again.
            replace_file(&self.page_path(page), &codec::encode(&whole), false)?;
            listed.pages.insert(page);
            for number in listed.single.remove(&page).unwrap_or_default() {
                let path = self.single_path(number);
                match std::fs::remove_file(&path) {
                    // Another process did the same.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    other => other.at("remove", &path)?,
                }
            }
        }
        Ok(())
    }

    fn list(&self) -> Result<Listed, FileError> {
        let mut listed = Listed::default();
        let entries = match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(listed),
            other => other.at("list", &self.dir)?,
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(page) = name.strip_prefix(PREFIX).and_then(|page| page.parse().ok()) {
                listed.pages.insert(page);
            } else if let Ok(number) = name.parse::<u64>() {
                listed.single.entry(number / PAGE).or_default().push(number);
            }
        }
        Ok(listed)
    }

    /// The epochs of a page by their numbers. What is damaged is passed over, and asked for again.
    fn page(&self, page: u64, listed: &Listed) -> Result<BTreeMap<u64, Signed<RevocationEpoch>>, FileError> {
        let mut epochs = BTreeMap::new();
        for number in listed.single.get(&page).into_iter().flatten() {
            let signed: Option<Signed<RevocationEpoch>> = read(&self.single_path(*number))?;
            epochs.extend(signed.map(|signed| (*number, signed)));
        }
        // Read after those: another process brings them into the page before it removes them.
        let whole: Option<Page> = read(&self.page_path(page))?;
        for signed in whole.into_iter().flat_map(|whole| whole.epochs) {
            if let Ok(epoch) = signed.peek()
                && epoch.number / PAGE == page
            {
                epochs.insert(epoch.number, signed);
            }
        }
        Ok(epochs)
    }

    fn page_path(&self, page: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{page:020}"))
    }

    fn single_path(&self, number: u64) -> PathBuf {
        self.dir.join(format!("{number:020}"))
    }
}

/// `None` for a file that is not there or damaged.
fn read<T: Wire>(path: &Path) -> Result<Option<T>, FileError> {
    Ok(read_file(path, T::MAX)?.and_then(|bytes| codec::decode(&bytes).ok()))
}

/// Applies what was remembered, in order.
fn apply(
    state: &mut RevocationState,
    trust: &Trust,
    epochs: impl DoubleEndedIterator<Item = Signed<RevocationEpoch>>,
    now: u64,
) {
    let mut sound = Vec::new();
    let mut vouched: Option<Digest> = None;
    for signed in epochs.rev() {
        let digest = signed.digest();
        let opened = match vouched == Some(digest) {
            true => vouched_for(trust, &signed, now),
            false => trust.open(&signed, KeyPurpose::Revocation, |epoch| epoch.at, now),
        };
        match opened {
            Ok(epoch) => {
                vouched = epoch.previous;
                sound.push((digest, epoch));
            }
            Err(refusal) => {
                vouched = None;
                tracing::debug!(%refusal, "a remembered revocation epoch is passed over");
            }
        }
    }
    for (digest, epoch) in sound.into_iter().rev() {
        if let Err(refusal) = in_order(state, trust, digest, &epoch) {
            tracing::debug!(number = epoch.number, %refusal, "a remembered revocation epoch is passed over");
        }
    }
}

/// One whose bytes are those that a sound one names.
fn vouched_for(trust: &Trust, signed: &Signed<RevocationEpoch>, now: u64) -> Result<RevocationEpoch, Refusal> {
    let epoch = signed.peek()?;
    trust.still_good(&signed.signer(), KeyPurpose::Revocation, epoch.at, now)?;
    Ok(epoch)
}

/// Applies an epoch whose signature was checked.
pub(crate) fn in_order(
    state: &mut RevocationState,
    trust: &Trust,
    digest: Digest,
    epoch: &RevocationEpoch,
) -> Result<protocol::trust::Update, Refusal> {
    if epoch.network != trust.network() {
        return Err(Refusal::new(RefusalCode::WrongNetwork, "an epoch of another network"));
    }
    state.apply(digest, epoch)
}
