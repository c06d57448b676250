//! The one place where this crate asks what time it is; the machines are told.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix milliseconds; 0 for a clock that stands before 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
