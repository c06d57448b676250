//! Setting up a seeder's directory. It never touches a directory that already holds a node: a key that is overwritten
//! is an identity, and earnings, lost.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use protocol::trust::JoinLine;
use protocol::{Address, PeerId};

use crate::config::{Config, config_path};

/// What a new seeder is told; everything else is in its `config.toml` afterwards.
#[derive(Clone, Debug)]
pub struct InitOptions {
    /// The line with an invitation for a seeder.
    pub join: JoinLine,
    /// A name for people, at most 64 bytes.
    pub name: String,
    /// Bytes offered.
    pub capacity: u64,
    /// Addresses to listen on; empty for the default.
    pub listen: Vec<Address>,
    /// Addresses to tell others; empty for those listened on.
    pub external: Vec<Address>,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct InitReport {
    /// The new seeder.
    pub peer: PeerId,
    /// Its directory.
    pub dir: PathBuf,
    /// Its configuration file.
    pub config: PathBuf,
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// The directory is in use.
    #[error("{} already holds a node; use run, or choose another --dir", dir.display())]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// A value that makes no sense.
    #[error("{key} {reason}")]
    Value {
        /// The key as in the configuration.
        key: &'static str,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// The key file.
    #[error(transparent)]
    Key(#[from] node::KeyFileError),
    /// The system refused.
    #[error("cannot make {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// Sets up `dir`: mode 0700, a new key, `config.toml`.
///
/// # Errors
/// [`InitError`]; a directory that holds a node is left as it is.
pub fn init(dir: &Path, options: InitOptions) -> Result<InitReport, InitError> {
    let mut config = Config::new(&options.join, &options.name, options.capacity);
    if !options.listen.is_empty() {
        config.listen = options.listen;
    }
    config.external = options.external;
    init_with(dir, &config)
}

/// As [`init`], with the whole configuration given.
///
/// # Errors
/// As [`init`].
pub fn init_with(dir: &Path, config: &Config) -> Result<InitReport, InitError> {
    config.check().map_err(|(key, reason)| InitError::Value { key, reason })?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| InitError::Io { path, source }
    };
    let (key_path, config_path) = (key_path(dir), config_path(dir));
    if key_path.exists() || config_path.exists() {
        return Err(InitError::Exists { dir: dir.to_owned() });
    }
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(failed(dir))?;
    let text = toml::to_string(config).map_err(|error| failed(&config_path)(io::Error::other(error)))?;
    let keypair = node::create_key(&key_path, None)?;
    // The key is first: without a configuration the directory is told apart from a whole one at `run`. The file holds
    // the invitation, so it is the owner's alone.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&config_path);
    file.and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    })
    .map_err(failed(&config_path))?;
    Ok(InitReport { peer: keypair.peer_id(), dir: dir.to_owned(), config: config_path })
}

pub(crate) fn key_path(dir: &Path) -> PathBuf {
    dir.join("key")
}
