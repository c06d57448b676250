//! What a user sets once for all fetches: `config.toml` in the home. There need be none; unknown keys are refused, because
//! a misspelt key that is passed over is a setting that silently is not set.

use std::path::PathBuf;

use serde::Deserialize;

use crate::home::{FileError, Home, read_file};

/// Longest file, bytes: it has a few lines.
const MAX: usize = 64 * 1024;

/// Least bytes per second that a limit may be: a seeder lets go of whoever takes less than some 9 kB in each.
const LEAST_RATE: u64 = 16_000;

/// A limit, bytes per second, that a fetch can go by; 0 for none.
///
/// # Errors
/// One line for people.
pub fn check_rate(rate: u64) -> Result<u64, String> {
    match rate {
        1..LEAST_RATE => Err(format!(
            "{rate} bytes per second are too few: seeders let go of whoever is so slow; give 16kB, more, or none"
        )),
        _ => Ok(rate),
    }
}

fn rate<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    check_rate(node::units::size(deserializer)?).map_err(serde::de::Error::custom)
}

/// The file's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Settings {
    /// Bytes per second that all transfers of one process take together at most; 0 for no limit. Default: 0.
    #[serde(deserialize_with = "rate")]
    pub download_limit: u64,
    /// Bytes per second that each transfer takes at most, where the command does not say otherwise. Default: 0.
    #[serde(deserialize_with = "rate")]
    pub download_limit_per_transfer: u64,
    /// Look for seeders on the local network by multicast (mDNS). Default: true.
    pub lan: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { download_limit: 0, download_limit_per_transfer: 0, lan: true }
    }
}

/// Why the settings are not known.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is no settings file.
    #[error("{}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, key and what is expected there.
        reason: String,
    },
}

impl Home {
    /// Reads `config.toml`; without one, everything has its default. Blocks.
    ///
    /// # Errors
    /// [`SettingsError`], naming the key or line.
    pub fn settings(&self) -> Result<Settings, SettingsError> {
        let path = self.dir().join("config.toml");
        let Some(bytes) = read_file(&path, MAX)? else { return Ok(Settings::default()) };
        let syntax = |reason: String| SettingsError::Syntax { path: path.clone(), reason };
        if bytes.len() > MAX {
            return Err(syntax(format!("it has more than {MAX} bytes")));
        }
        let text = String::from_utf8(bytes).map_err(|error| syntax(error.to_string()))?;
        toml::from_str(&text).map_err(|error| syntax(error.to_string().trim_end().to_owned()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn there_need_be_no_file_and_misspelt_keys_are_named() {
        let root = tempfile::tempdir().unwrap();
        let home = Home::open(root.path(), None).unwrap();
        assert_eq!(home.settings().unwrap(), Settings::default());
        let file = home.dir().join("config.toml");
        std::fs::write(&file, "download-limit = 16000\n").unwrap();
        assert_eq!(home.settings().unwrap(), Settings { download_limit: 16_000, ..Settings::default() });
        std::fs::write(&file, "download-limit = \"5MB\"\ndownload-limit-per-transfer = \"none\"\n").unwrap();
        assert_eq!(home.settings().unwrap(), Settings { download_limit: 5_000_000, ..Settings::default() });
        for bad in ["\"5 parsecs\"", "-1", "true", "5", "\"15.9kB\""] {
            std::fs::write(&file, format!("lan = true\ndownload-limit = {bad}\n")).unwrap();
            let error = home.settings().unwrap_err().to_string();
            assert!(error.contains("config.toml") && error.contains("line 2"), "{error}");
        }
        std::fs::write(&file, "downlod-limit = 5\n").unwrap();
        let error = home.settings().unwrap_err().to_string();
        assert!(error.contains("config.toml") && error.contains("downlod-limit"), "{error}");
    }
}
