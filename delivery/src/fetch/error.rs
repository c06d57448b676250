//! Why a fetch ended without everything: each variant asks something else of the user or the role.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use protocol::Refusal;

use super::{SourceReport, StallCause};
use crate::content_store::{CreateError, FileError, FinishError, Lacks};

/// Why a fetch ended. What was fetched stays in every case.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Several seeders refuse the ticket or order itself. Renew it where it is over; the refusal says what is wrong.
    #[error("{by} seeders refuse it: {refusal}")]
    Refused {
        /// What the last of them said.
        refusal: Refusal,
        /// How many say the same.
        by: usize,
        /// Every seeder that was tried, with its last reason.
        sources: Vec<SourceReport>,
    },
    /// The manifest that the ticket names is not one of this network's catalogue, or was taken down.
    #[error("the content's manifest does not hold: {0}")]
    Manifest(Refusal),
    /// Nothing came for longer than the patience, or nobody is left to ask.
    #[error("{cause}{}", listed(sources))]
    NoSource {
        /// Why, in one name.
        cause: StallCause,
        /// Time without a new chunk.
        waited: Duration,
        /// Every seeder that was tried, with its last reason.
        sources: Vec<SourceReport>,
    },
    /// There is no place for the content.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The disk became full. Free some, then go on.
    #[error("no {lacks} left at {}: {needed} bytes are still to come; free some, then fetch again", path.display())]
    DiskFull {
        /// Where.
        path: Box<Path>,
        /// Bytes still to come.
        needed: u64,
        /// Of what there is none left.
        lacks: Lacks,
    },
    /// The disk failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The content was removed from the store meanwhile.
    #[error("the content was removed while it was being fetched")]
    Removed,
    /// Everything is here, and it does not fit together.
    #[error(transparent)]
    Finish(FinishError),
    /// [`super::FetchJob::cancel`].
    #[error("stopped with {have} of {total} chunks")]
    Cancelled {
        /// Chunks that are here.
        have: u32,
        /// Chunks asked for; 0 when not even that was known.
        total: u32,
    },
}

impl FetchError {
    /// Every seeder that was tried, where the end was for their sake.
    pub fn sources(&self) -> &[SourceReport] {
        match self {
            FetchError::Refused { sources, .. } | FetchError::NoSource { sources, .. } => sources,
            _ => &[],
        }
    }
}

/// The few seeders that tell most, each of another reason first: an error text of 256 seeders and their addresses helps
/// nobody, and the reports have it all.
fn listed(sources: &[SourceReport]) -> String {
    const SHOWN: usize = 3;
    // Those that served, and those that say why they do not, tell more than those that are not there.
    let mut sorted: Vec<&SourceReport> = sources.iter().collect();
    sorted.sort_by_key(|source| (std::cmp::Reverse(source.chunks), source.last_refusal.is_none()));
    let (mut telling, mut alike, mut reasons) = (Vec::new(), Vec::new(), HashSet::new());
    for source in sorted {
        let brief = brief(source);
        let list = if reasons.insert(brief.clone()) { &mut telling } else { &mut alike };
        list.push(format!("; {}: {brief}", source.peer.short()));
    }
    let mut text: String = telling.into_iter().chain(alike).take(SHOWN).collect();
    if sources.len() > SHOWN {
        text.push_str(&format!("; and {} more", sources.len() - SHOWN));
    }
    text
}

/// In a few words, without the seeder's own name in full.
fn brief(source: &SourceReport) -> String {
    const LONGEST: usize = 150;
    let said = source.last_brief.as_deref().or(source.last_reason.as_deref()).unwrap_or("nothing came");
    let said = said.replace(&source.peer.to_string(), "it");
    match said.char_indices().nth(LONGEST) {
        Some((cut, _)) => format!("{}…", said.get(..cut).unwrap_or_default()),
        None => said,
    }
}

#[cfg(test)]
mod tests {
    use protocol::{PeerId, RefusalCode};

    use super::*;
    use crate::fetch::StallCause;

    fn report(n: u8, last: Option<&str>) -> SourceReport {
        let peer = PeerId::from_bytes([n; 32]);
        SourceReport { last_brief: last.map(str::to_owned), ..SourceReport::of(peer, 0, 0) }
    }

    #[test]
    fn many_seeders_are_one_line_that_can_be_read() {
        let away = "its machine answers, but it does not run there";
        let mut sources: Vec<SourceReport> = (1..=100).map(|n| report(n, Some(away))).collect();
        let (first, last) = (report(1, None).peer.short(), report(200, None).peer.short());
        let line = |sources: &[SourceReport]| {
            let (cause, sources) = (StallCause::NoSeederLeft, sources.to_vec());
            FetchError::NoSource { cause, waited: Duration::ZERO, sources }.to_string()
        };
        let said = line(&sources);
        assert!(said.starts_with(&format!("no seeder is left that would serve it; {first}: {away}; ")), "{said}");
        assert!(said.ends_with(&format!(": {away}; and 97 more")) && said.len() < 250, "{said}");
        // Who says something is heard before them, with the seeder's own name left out.
        let refusal = Refusal::new(RefusalCode::PriceBelowFloor, "x".repeat(500));
        let brief = Some(format!("refused: {refusal}"));
        sources.push(SourceReport { last_refusal: Some(refusal), last_brief: brief, ..report(200, None) });
        sources.push(report(201, Some(&format!("{} is behind a translation", report(201, None).peer))));
        sources.extend((202..=210).map(|n| report(n, Some(away))));
        let said = line(&sources);
        assert!(said.contains(&format!("it; {last}: refused: price-below-floor: xx")), "{said}");
        assert!(said.contains(": it is behind a translation") && said.ends_with("; and 108 more"), "{said}");
        assert!(said.len() < 500 && !said.contains("12D3"), "{said}");
    }
}
