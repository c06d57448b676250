//! Makes a network: its root key, its keys, the manager's identity and a configuration, once per directory.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use protocol::root::RootHandover;
use protocol::trust::KeyPurpose;
use protocol::{Address, Currency, NetworkId, PeerId, Signed, codec};

use crate::config::{self, Config, MAX_SHARDS};
use crate::context::now_ms;
use crate::keys;

/// What can be chosen at the start of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitOptions {
    /// Addresses to listen on; empty for the default of [`Config::listen`].
    pub listen: Vec<Address>,
    /// Addresses to tell others, where they differ.
    pub external: Vec<Address>,
    /// Topics that receipts are spread over, 1 to 256. Fixed in the key set.
    pub gossip_shards: u16,
    /// Currency of delivery rates.
    pub currency: Currency,
    /// Everything else, as it goes into `config.toml`.
    pub config: Config,
}

impl Default for InitOptions {
    fn default() -> Self {
        InitOptions {
            listen: Vec::new(),
            external: Vec::new(),
            gossip_shards: 4,
            currency: Currency::USD,
            config: Config::default(),
        }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub struct InitReport {
    /// The directory.
    pub dir: PathBuf,
    /// The manager's peer ID.
    pub peer: PeerId,
    /// The network.
    pub network: NetworkId,
    /// The network's root key.
    pub root: PeerId,
    /// File of the root key: to be moved to a safe place; the manager runs without it.
    pub root_key: PathBuf,
    /// The configuration.
    pub config: PathBuf,
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// There is one.
    #[error("{} already holds a manager; use run, or choose another --dir", dir.display())]
    Exists {
        /// The directory.
        dir: PathBuf,
    },
    /// A number out of its range.
    #[error("{0} gossip shards are not possible; choose 1 to {MAX_SHARDS}")]
    Shards(u16),
    /// A configuration that would not load.
    #[error("{key} {reason}")]
    Config {
        /// The key.
        key: &'static str,
        /// What is wrong.
        reason: &'static str,
    },
    /// The system refused.
    #[error("cannot make {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A key file.
    #[error(transparent)]
    Key(#[from] node::KeyFileError),
}

/// The root key that is to follow the first one, and the first one's word for it; both are to be kept elsewhere.
const NEXT_ROOT_KEY: &str = "next-root.key";
const NEXT_ROOT_HANDOVER: &str = "next-root.handover";

/// Sets `dir` up as the manager of a new network. Blocks for some file operations.
///
/// # Errors
/// [`InitError`]; a directory that holds a manager stays as it is.
pub fn init(dir: &Path, options: InitOptions) -> Result<InitReport, InitError> {
    if options.gossip_shards == 0 || options.gossip_shards > MAX_SHARDS {
        return Err(InitError::Shards(options.gossip_shards));
    }
    let mut config = Config { external: options.external, currency: options.currency, ..options.config };
    if !options.listen.is_empty() {
        config.listen = options.listen;
    }
    config.check().map_err(|(key, reason)| InitError::Config { key, reason })?;

    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| InitError::Io { path, source }
    };
    make_private_dir(dir).map_err(failed(dir))?;
    let config_path = config::config_path(dir);
    let marks = [config_path.clone(), keys::key_set_path(dir), dir.join("key"), dir.join("root.key")];
    if marks.iter().any(|path| path.exists()) {
        return Err(InitError::Exists { dir: dir.to_owned() });
    }

    let keys_dir = keys::keys_dir(dir);
    make_private_dir(&keys_dir).map_err(failed(&keys_dir))?;
    let node_key = node::create_key(&dir.join("key"), None)?;
    let root_path = dir.join("root.key");
    let root = node::create_key(&root_path, None)?;
    let network = NetworkId::of_root(&root.peer_id());
    // The next root key and the word that makes it one, for the day on which this one is lost or stolen.
    let next_root = node::create_key(&dir.join(NEXT_ROOT_KEY), None)?;
    let handover = RootHandover { network, root: next_root.peer_id(), at: now_ms() };
    let handover_path = dir.join(NEXT_ROOT_HANDOVER);
    write_file(&handover_path, &codec::encode(&Signed::sign(&handover, &root))).map_err(failed(&handover_path))?;
    let mut entries = Vec::new();
    for purpose in KeyPurpose::ALL {
        let path = keys_dir.join(format!("{}.key", keys::purpose_name(purpose)));
        entries.push((purpose, node::create_key(&path, None)?.peer_id()));
    }
    let set =
        keys::first_key_set(&root, &entries, node_key.peer_id(), options.gossip_shards, &next_root.peer_id(), now_ms());
    let set_path = keys::key_set_path(dir);
    write_file(&set_path, &codec::encode(&set)).map_err(failed(&set_path))?;
    // The configuration last: a directory with one is complete.
    write_file(&config_path, config_text(&config).as_bytes()).map_err(failed(&config_path))?;
    Ok(InitReport {
        dir: dir.to_owned(),
        peer: node_key.peer_id(),
        network,
        root: root.peer_id(),
        root_key: root_path,
        config: config_path,
    })
}

/// Plain numbers and lists always serialise; an empty file would mean the defaults.
fn config_text(config: &Config) -> String {
    let body = toml::to_string(config).unwrap_or_default();
    format!("# Willcall manager. Times are milliseconds, rates millionths of the minor unit per MiB.\n{body}")
}

fn make_private_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o700))
}

/// Writes a file of mode 0600 so that after a crash there is the old one, the new one or none, but never a part.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let write = || {
        let mut file: File = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    let written = write();
    if written.is_err() {
        // The error that matters is the first one.
        let _ = fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_network_is_made_once_with_private_keys() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("manager");
        let report = init(&dir, InitOptions::default()).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&dir), 0o700);
        assert_eq!(mode(&dir.join("keys")), 0o700);
        for file in ["key", "root.key", "keys/ticket.key", "keys/receipt-sealing.key", "config.toml", "keyset"] {
            assert_eq!(mode(&dir.join(file)), 0o600, "{file}");
        }
        assert_eq!(Config::load(&dir).unwrap(), Config::default());

        // The root key may be away.
        fs::remove_file(&report.root_key).unwrap();
        let (keys, trust) = keys::ManagerKeys::load(&dir, 0).unwrap();
        assert_eq!(trust.root(), report.root);
        assert_eq!(trust.network(), report.network);
        assert_eq!(Some(keys.signer(KeyPurpose::Ticket).peer_id()), trust.active_key(KeyPurpose::Ticket));

        let error = init(&dir, InitOptions::default()).unwrap_err().to_string();
        assert!(error.ends_with("already holds a manager; use run, or choose another --dir"), "{error}");

        fs::remove_file(dir.join("keys/ticket.key")).unwrap();
        let error = keys::ManagerKeys::load(&dir, 0).err().unwrap().to_string();
        assert!(error.contains("ticket key"), "{error}");
        assert!(init(&temp.path().join("x"), InitOptions { gossip_shards: 0, ..Default::default() }).is_err());
    }
}
