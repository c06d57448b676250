//! What the demo tells while it runs: a story on standard output for people, nothing at all with `--json`.

use crate::cli::output;

/// Tells, or keeps silent.
#[derive(Debug)]
pub(crate) struct Narrator {
    silent: bool,
}

impl Narrator {
    /// Silent with `--json`, where standard output holds the one object only.
    pub(crate) fn new(silent: bool) -> Self {
        Narrator { silent }
    }

    /// True when nothing is to be shown.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent
    }

    /// A line or block.
    pub(crate) fn say(&self, text: &str) {
        if !self.silent {
            // A closed pipe must not stop the sale.
            let _ = output::line(text);
        }
    }

    /// One of the twelve steps.
    pub(crate) fn step(&self, number: u64, name: &str, evidence: &str) {
        self.say(&format!("  {number:>2}  {name:<28} {evidence}"));
    }

    /// A heading.
    pub(crate) fn part(&self, title: &str) {
        self.say(&format!("\n{title}"));
    }
}
