//! The frame of the files that people hand to each other in a dispute: sections with a checksum each, so that a file
//! that was damaged or tampered with is not just "bad": the part that was changed is named. The checksums prove
//! nothing about who wrote it; the signatures inside do.

use crate::ids::Digest;

/// One part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it is; 1 to 255.
    pub kind: u8,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// How a kind of file begins, and what its sections are called.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// First bytes.
    pub magic: &'static [u8; 16],
    /// The file, for people.
    pub what: &'static str,
    /// Names of the kinds, from 1 on.
    pub names: &'static [&'static str],
    /// Largest file, bytes.
    pub max_bytes: usize,
    /// Most sections.
    pub max_sections: usize,
}

/// Why a file cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SectionError {
    /// Another kind of file.
    #[error("this is no {what}: it does not begin like one")]
    Magic {
        /// What was expected.
        what: &'static str,
    },
    /// Longer or in more parts than allowed.
    #[error("the {what} is too large: at most {max_bytes} bytes and {max_sections} sections are read")]
    TooLarge {
        /// What was expected.
        what: &'static str,
        /// Limit.
        max_bytes: usize,
        /// Limit.
        max_sections: usize,
    },
    /// A section is not what was written.
    #[error("section {number} ({name}, bytes {from} to {to} of the file) was changed: its checksum does not fit")]
    Changed {
        /// 1 for the first.
        number: usize,
        /// What it is, or says it is.
        name: String,
        /// Where it begins.
        from: usize,
        /// Where it ends.
        to: usize,
    },
    /// The end is missing.
    #[error("the file was cut off in section {number} ({name}), which begins at byte {from}")]
    CutOff {
        /// 1 for the first.
        number: usize,
        /// What it is, or says it is.
        name: String,
        /// Where it begins.
        from: usize,
    },
    /// Something follows the end.
    #[error("{0} bytes follow the end of the file's last section")]
    Trailing(usize),
}

/// Kind, length and checksum.
const HEAD: usize = 1 + 4 + 32;
/// Kind of the mark at the end, which holds the file's sections together.
const END: u8 = 0;

impl Format {
    /// The name of a kind.
    pub fn name(&self, kind: u8) -> &'static str {
        match kind {
            END => "end mark",
            kind => self.names.get(usize::from(kind) - 1).copied().unwrap_or("unknown kind"),
        }
    }

    /// The file of these sections.
    pub fn write(&self, sections: &[Section]) -> Vec<u8> {
        let mut out = self.magic.to_vec();
        let mut running = self.start();
        for (number, section) in sections.iter().enumerate() {
            let digest = self.digest(number, section.kind, &section.bytes, &running);
            out.push(section.kind);
            // A section is far below 4 GiB: the largest document has 384 KiB.
            out.extend_from_slice(&u32::try_from(section.bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
            out.extend_from_slice(digest.as_bytes());
            out.extend_from_slice(&section.bytes);
            running = digest;
        }
        out.push(END);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(self.digest(sections.len(), END, &[], &running).as_bytes());
        out
    }

    /// The sections of a file.
    ///
    /// # Errors
    /// [`SectionError`] names the first section that is not as it was written.
    pub fn read(&self, bytes: &[u8]) -> Result<Vec<Section>, SectionError> {
        let Format { what, max_bytes, max_sections, .. } = *self;
        if bytes.len() > max_bytes {
            return Err(SectionError::TooLarge { what, max_bytes, max_sections });
        }
        let mut rest = bytes.strip_prefix(self.magic.as_slice()).ok_or(SectionError::Magic { what })?;
        let (mut sections, mut running) = (Vec::new(), self.start());
        loop {
            let (number, from) = (sections.len() + 1, bytes.len() - rest.len());
            let cut = |name: &str| SectionError::CutOff { number, name: name.to_owned(), from };
            let (head, body) = rest.split_first_chunk::<HEAD>().ok_or_else(|| cut("head"))?;
            let [kind, a, b, c, d, digest @ ..] = *head;
            let name = self.name(kind);
            let len = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
            let (content, after) = body.split_at_checked(len).ok_or_else(|| cut(name))?;
            let expected = self.digest(number - 1, kind, content, &running);
            if *expected.as_bytes() != digest {
                let to = bytes.len() - after.len();
                return Err(SectionError::Changed { number, name: name.to_owned(), from, to });
            }
            if kind == END {
                if !content.is_empty() {
                    return Err(SectionError::Trailing(content.len() + after.len()));
                }
                return if after.is_empty() { Ok(sections) } else { Err(SectionError::Trailing(after.len())) };
            }
            if sections.len() >= max_sections {
                return Err(SectionError::TooLarge { what, max_bytes, max_sections });
            }
            sections.push(Section { kind, bytes: content.to_vec() });
            (rest, running) = (after, expected);
        }
    }

    fn start(&self) -> Digest {
        Digest::of("willcall 2026-11 file section", &[self.magic])
    }

    /// Each over the one before, so that no section can be left out or moved.
    fn digest(&self, number: usize, kind: u8, bytes: &[u8], before: &Digest) -> Digest {
        let number = (number as u64).to_le_bytes();
        Digest::of("willcall 2026-11 file section", &[before.as_bytes(), &number, &[kind], bytes])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    const FORMAT: Format = Format {
        magic: b"willcall test  1",
        what: "test file",
        names: &["one", "two"],
        max_bytes: 4096,
        max_sections: 4,
    };

    #[test]
    fn a_changed_byte_anywhere_is_found_and_its_section_named() {
        let sections = vec![
            Section { kind: 1, bytes: vec![7; 20] },
            Section { kind: 2, bytes: vec![8; 30] },
            Section { kind: 1, bytes: Vec::new() },
        ];
        let file = FORMAT.write(&sections);
        assert_eq!(FORMAT.read(&file).unwrap(), sections);
        let starts = [16, 16 + HEAD + 20, 16 + 2 * HEAD + 50, 16 + 3 * HEAD + 50, file.len()];
        for at in 16..file.len() {
            let expected = starts.iter().filter(|start| **start <= at).count();
            let mut changed = file.clone();
            changed[at] ^= 1;
            match FORMAT.read(&changed).unwrap_err() {
                SectionError::Changed { number, .. } | SectionError::CutOff { number, .. } => {
                    assert_eq!(number, expected, "byte {at}");
                }
                other => unreachable!("byte {at}: {other}"),
            }
        }
        for end in 16..file.len() {
            assert!(FORMAT.read(&file[..end]).is_err());
        }
        assert!(matches!(FORMAT.read(b"something else"), Err(SectionError::Magic { .. })));
        let mut longer = file.clone();
        longer.push(0);
        assert_eq!(FORMAT.read(&longer), Err(SectionError::Trailing(1)));
        // Left out, or in another order.
        assert!(FORMAT.read(&[&file[..16], &file[starts[1]..]].concat()).is_err());
        let five = vec![Section { kind: 1, bytes: vec![] }; 5];
        assert!(matches!(FORMAT.read(&FORMAT.write(&five)), Err(SectionError::TooLarge { .. })));
    }
}
