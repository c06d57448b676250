//! Progress as a person sees it: a bar on a terminal, a plain line now and then elsewhere, nothing where tools read.

use std::collections::VecDeque;
use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output;

/// Bytes done of bytes in all, with rate and time left.
#[derive(Debug)]
pub(crate) struct Bytes {
    what: &'static str,
    bar: ProgressBar,
    /// What was said already, where there is no terminal.
    said: Option<Mutex<Said>>,
    recent: Mutex<Recent>,
}

/// Tenths that were said, of so many bytes.
#[derive(Debug, Default)]
struct Said {
    of: u64,
    tenths: u64,
}

impl Said {
    /// Is this tenth to be said? Once each; of something else, as of the next part of what a fetch brings, all anew.
    fn is_new(&mut self, tenths: u64, of: u64) -> bool {
        if self.of != of {
            *self = Said { of, tenths: 0 };
        }
        let before = self.tenths;
        self.tenths = before.max(tenths);
        tenths > before
    }
}

/// What was done when, over the last seconds: a rate over all of it says nothing of now, once it stood still.
#[derive(Debug, Default)]
struct Recent(VecDeque<(Duration, u64)>);

impl Recent {
    const WINDOW: Duration = Duration::from_secs(10);
    /// Notes in a window, at most: one in so long.
    const APART: Duration = Duration::from_millis(100);

    /// Notes what is done at a time since the begin; gives the bytes per second of the window, once there is one.
    fn rate(&mut self, at: Duration, done: u64) -> Option<u64> {
        if self.0.back().is_none_or(|(last, _)| at.saturating_sub(*last) >= Self::APART) {
            self.0.push_back((at, done));
        }
        // One that is older stays, so that what came after a longer silence has a time to be measured by.
        while self.0.get(1).is_some_and(|(next, _)| at.saturating_sub(*next) >= Self::WINDOW) {
            self.0.pop_front();
        }
        let since = match (self.0.front(), self.0.get(1)) {
            // Of a silence only its end counts.
            (Some((first, before)), Some((next, _))) if at.saturating_sub(*first) > Self::WINDOW => {
                Some(((*next).saturating_sub(Self::APART), *before))
            }
            (first, _) => first.copied(),
        };
        let (from, before) = since?;
        let ms = u64::try_from(at.saturating_sub(from).as_millis()).unwrap_or(u64::MAX);
        done.saturating_sub(before).saturating_mul(1000).checked_div(ms)
    }
}

fn mean(bytes: u64, time: Duration) -> u64 {
    let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    bytes.saturating_mul(1000) / ms.max(1)
}

/// The rate told at the end. What was over in less than a second has no last seconds to go by: much of it, or all, had
/// come when it was first looked at.
pub(crate) fn last_rate(recent: Option<u64>, bytes: u64, time: Duration) -> Option<u64> {
    match recent {
        Some(rate @ 1..) if time >= Duration::from_secs(1) => Some(rate),
        _ => Some(mean(bytes, time)).filter(|rate| *rate > 0),
    }
}

/// Whole tenths done.
pub(crate) fn tenths(done: u64, total: u64) -> u64 {
    done.saturating_mul(10).checked_div(total).unwrap_or(0)
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
        let said = (!terminal && !silent).then(Mutex::default);
        Bytes { what, bar, said, recent: Mutex::default() }
    }

    /// So much is done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.set_after(done, done, total);
    }

    /// The bytes per second of all that was done since the begin.
    pub(crate) fn mean(&self, bytes: u64) -> u64 {
        mean(bytes, self.bar.elapsed())
    }

    /// So much is done, `own` of it since the begin: the rest was there before.
    pub(crate) fn set_after(&self, own: u64, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        // What earlier runs left is no progress of this one: it is the first that is known.
        let Some(said) = self.said.as_ref().filter(|_| total > 0) else { return };
        // A thread that panicked while it held this lock left a note more or less.
        let at = self.bar.elapsed();
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner).rate(at, done);
        let rate = if done >= total { last_rate(recent, own, at) } else { recent };
        let tenth = tenths(done, total);
        if said.lock().unwrap_or_else(PoisonError::into_inner).is_new(tenth, total) {
            let mut line =
                format!("{}: {} of {} ({}%)", self.what, output::bytes(done), output::bytes(total), tenth * 10,);
            if let Some(rate) = rate {
                line.push_str(&format!(", {}/s", output::bytes(rate)));
                if let Some(left) = total.saturating_sub(done).checked_div(rate) {
                    line.push_str(&format!(", {left} s left"));
                }
            }
            output::note(&line);
        }
    }

    /// A word about why nothing moves, or what is done now.
    pub(crate) fn say(&self, text: &str) {
        if self.said.is_some() {
            output::note(&format!("{}: {text}", self.what));
        } else {
            self.bar.println(format!("{}: {}", self.what, output::harmless(text)));
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_at_once_ends_with_the_mean_of_its_whole_time() {
        let (half, long) = (Duration::from_millis(500), Duration::from_secs(20));
        let mut recent = Recent::default();
        assert_eq!(recent.rate(half, 1000), None);
        assert_eq!(last_rate(recent.rate(half, 1000), 1000, half), Some(2000));
        // Seen twice when all of it was there already.
        assert_eq!(recent.rate(half * 3 / 2, 1000), Some(0));
        assert_eq!(last_rate(Some(0), 1000, half), Some(2000));
        assert_eq!(last_rate(Some(0), 0, half), None, "nothing came: there is no rate");
        assert_eq!(last_rate(Some(7), 1000, long), Some(7));
    }

    #[test]
    fn tenths_of_a_part_are_none_of_what_comes_after_it() {
        let mut said = Said::default();
        let mut new = |tenths, of| said.is_new(tenths, of);
        assert!(!new(0, 1000) && new(10, 1000) && !new(10, 1000), "the first chunk");
        assert!(!new(0, 9000) && new(3, 9000) && !new(3, 9000) && !new(2, 9000) && new(4, 9000));
    }

    #[test]
    fn the_rate_is_of_the_last_seconds_and_a_silence_does_not_slow_it() {
        let mut recent = Recent::default();
        let (mut at, mut done, mut rate) = (Duration::ZERO, 0, 0);
        assert_eq!(Recent::default().rate(at, 1000), None, "of one moment there is none");
        let mut run = |silence: u64, steps: u64, bytes: u64| {
            at += Duration::from_secs(silence);
            for _ in 0..steps {
                at += Duration::from_millis(200);
                done += bytes;
                rate = recent.rate(at, done).unwrap_or(0);
            }
            rate
        };
        run(0, 1, 0);
        assert_eq!(run(0, 30, 200), 1000);
        // Twenty minutes of nothing, then ten times as fast.
        let after = run(1200, 5, 2000);
        assert!((9_000..=12_000).contains(&after), "{after}");
        assert_eq!(run(0, 100, 2000), 10_000);
    }
}
