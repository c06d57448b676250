//! Progress as a person sees it: a bar on a terminal, a plain line now and then elsewhere, nothing where tools read.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output;

/// Bytes done of bytes in all, with rate and time left.
#[derive(Debug)]
pub(crate) struct Bytes {
    what: &'static str,
    bar: ProgressBar,
    /// Tenths already said, where there is no terminal.
    said: Option<AtomicU64>,
}

impl Bytes {
    /// Shows progress on standard error, unless `silent`.
    pub(crate) fn new(what: &'static str, silent: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
        if terminal && !silent {
            bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
            let template = "{msg:<12} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left";
            // A template that indicatif does not understand leaves its default look.
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(what);
        }
        Bytes { what, bar, said: (!terminal && !silent).then(|| AtomicU64::new(0)) }
    }

    /// So much is done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        let Some(said) = &self.said else { return };
        let tenth = done.saturating_mul(10).checked_div(total).unwrap_or(0);
        if tenth > said.fetch_max(tenth, Ordering::Relaxed) {
            let rate = output::bytes(self.rate());
            output::note(&format!(
                "{}: {} of {} ({}%), {rate}/s, {} s left",
                self.what,
                output::bytes(done),
                output::bytes(total),
                tenth * 10,
                self.bar.eta().as_secs()
            ));
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate; the cast saturates")]
    fn rate(&self) -> u64 {
        self.bar.per_sec() as u64
    }

    /// A word about why nothing moves, or what is done now.
    pub(crate) fn say(&self, text: &str) {
        if self.said.is_some() {
            output::note(&format!("{}: {text}", self.what));
        } else {
            self.bar.println(format!("{}: {text}", self.what));
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
