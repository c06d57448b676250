//! How fast a seeder is, measured only while it owes something: a seeder that was asked for nothing is not slow, and
//! chunks that arrive together do not make it fast.

/// What is older than this counts half, milliseconds of owing time.
const HALF_LIFE_MS: f64 = 2000.0;

/// A seeder's pace.
#[derive(Debug, Default)]
pub(super) struct Pace {
    bytes: f64,
    ms: f64,
    /// When it was asked after it had owed nothing, until the first arrival.
    began: Option<u64>,
    last: u64,
    /// From the first ask to the first arrival, milliseconds.
    reply_ms: f64,
    /// When it was asked after it had owed nothing, until the first byte.
    unheard: Option<u64>,
    /// From the first ask to the first byte of the answer, milliseconds, as far as that was told.
    first_byte_ms: f64,
}

impl Pace {
    /// It owes something again, from now on.
    pub(super) fn begins(&mut self, now: u64) {
        self.began = Some(now);
        self.unheard = self.began;
        self.last = now;
    }

    /// Bytes of a chunk came, whether or not that is whole.
    pub(super) fn heard(&mut self, at: u64) {
        if let Some(asked) = self.unheard.filter(|asked| at > *asked) {
            self.first_byte_ms = millis(at - asked);
            self.unheard = None;
        }
    }

    /// So many bytes came.
    pub(super) fn arrived(&mut self, bytes: u32, now: u64) {
        let elapsed = millis(now.saturating_sub(self.last));
        let keep = (-elapsed / HALF_LIFE_MS).exp2();
        self.bytes = self.bytes * keep + f64::from(bytes);
        self.ms = self.ms * keep + elapsed;
        if let Some(began) = self.began.take() {
            self.reply_ms = millis(now.saturating_sub(began));
            self.heard(now);
        }
        self.last = now;
    }

    /// Bytes per second; 0 before anything came.
    pub(super) fn rate(&self) -> f64 {
        self.bytes * 1000.0 / self.ms.max(1.0)
    }

    /// Milliseconds that `bytes` take; `None` before anything came.
    pub(super) fn each_ms(&self, bytes: u32) -> Option<f64> {
        (self.bytes > 0.0).then(|| f64::from(bytes) * self.ms.max(1.0) / self.bytes)
    }

    /// Milliseconds from an ask to the first byte of the answer; 0 before anything came. What the first chunk took beyond that
    /// was the line, which may have had more to carry then.
    pub(super) fn distance_ms(&self, bytes: u32) -> f64 {
        let beyond = self.reply_ms - self.each_ms(bytes).unwrap_or(self.reply_ms);
        beyond.min(self.first_byte_ms).max(0.0)
    }

    /// Milliseconds until the first chunk comes when it owes nothing yet.
    pub(super) fn reply_ms(&self, bytes: u32) -> f64 {
        self.each_ms(bytes).map_or(self.reply_ms, |each| each + self.distance_ms(bytes))
    }
}

/// Durations are far below 2^52 milliseconds, where this would lose anything.
#[expect(clippy::cast_precision_loss, reason = "see above")]
pub(super) fn millis(ms: u64) -> f64 {
    ms as f64
}
